"""A datastore as the control API sees it, on the services of one life, without daemon or mount."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import cast

import trio

from tests.datastore_harness import Services
from tests.sited_hypervisor import SitedHypervisor
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config, parse_config
from vmfs_stub.control.jobs import Jobs, open_jobs
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import MapFrozen, PrimaryIOError
from vmfs_stub.core.ids import JobId
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.serving import Mount
from vmfs_stub.services.backup_turn import Decide
from vmfs_stub.services.hypervisor import NoHypervisor
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.mount_usage import MountUsage
from vmfs_stub.services.single_error import single_error
from vmfs_stub.settings import Settings

PATHS = ("vm/disk.img", "vm/below/second.img")
"""The disks of the one VM."""
ROOT_PEER = Peer(1, 0, 0)


class NotWhole(AssertionError):
    """A disk is not what it should be after a failure."""


async def with_datastore(
    services: Services,
    text: str,
    act: Callable[[Datastore, Services], Awaitable[None]],
    *,
    decide: Decide | None = None,
    save_place: str = "/nowhere",
) -> None:
    """Act on a datastore with the services of a life; ``text`` is more of its config, ``decide`` its policy.

    ``save_place`` is where the hypervisor saves memory: a VM's directory, or the rig's ``memory_dir``.
    """
    rig = services.rig
    where = f'name = "vms"\nbacking = "{rig.backing}"\nmountpoint = "{rig.base}/mount"\nruntime_dir = "{rig.runtime}"'
    store = f'url = "{(rig.base / "store").as_uri()}"'
    config = parse_config(f"[datastore]\n{where}\n[store]\n{store}\n{text}", origin="test")
    catalog = Catalog.in_memory()
    with closing(catalog), single_error():
        async with open_jobs(catalog, running_max=1, kept=1) as jobs:
            with closing(_datastore(services, config, catalog, jobs, decide, save_place)) as datastore:
                await act(datastore, services)


def _datastore(
    services: Services, config: Config, catalog: Catalog, jobs: Jobs, decide: Decide | None, save_place: str
) -> Datastore:
    rig = services.rig
    return Datastore(
        settings=Settings(config),
        threads=services.threads,
        private=services.private,
        inventory=DirectoryInventory(rig.backing, files=services.files, memory_dir=rig.memory_dir),
        catalog=catalog,
        store=services.store,
        replica=None,
        services=services.connected,
        hypervisor=NoHypervisor() if rig.hypervisor is None else SitedHypervisor(rig.hypervisor, services.files),
        mount_usage=MountUsage(()),
        managed_save=ManagedSave(rig.mountpoint / save_place, rig.mountpoint, save_place, is_vm=rig.memory_dir is None),
        findings=services.findings,
        jobs=jobs,
        mount=cast("Mount", SimpleNamespace(ended=trio.Event())),
        reserve=partial(services.private.reserve.fill, services.files),
        stop=trio.Event(),
        decide=decide,
    )


async def ended(datastore: Datastore, job: JobId) -> JobInfo:
    """Wait for a job as a client does, however it ends."""
    while (info := await datastore.job(job, wait_s=0)).state == "running":  # noqa: ASYNC110
        await trio.sleep(0.001)
    if info.state == "interrupted":
        await trio.sleep_forever()  # killed, which ends this soon
    return info


async def done(datastore: Datastore, job: JobId) -> JobInfo:
    """Wait for a job as a client does; raises what it failed with."""
    info = await ended(datastore, job)
    if info.state != "done":
        if "log has the traceback" in str(info.error):
            raise NotWhole(f"a programming error: {info.error}")
        error = MapFrozen if "MapFrozen" in str(info.error) else PrimaryIOError
        raise error(str(info.error))
    return info
