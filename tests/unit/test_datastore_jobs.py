"""What the API starts: jobs follow policy where the configuration lets them, and their reports say why."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tests.backup_jobs import Policy
from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import parse_config
from vmfs_stub.control.jobs import open_jobs
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import NotFound, Refused
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.mount.serving import Mount
from vmfs_stub.services.hypervisor import NoHypervisor
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.mount_usage import MountUsage
from vmfs_stub.settings import Settings

ME = Peer(1, 0, 0)
ENABLED = "[archive]\nenabled = true\n"


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        made.inline = True
        for number, name in enumerate(("idle", "used")):
            made.make_disk(f"{name}/disk.img", bytes([number + 1]) * (2 * CHUNK))
        yield made


@asynccontextmanager
async def opened(
    rig: Rig,
    text: str,
    policy: Policy,
    *,
    hypervisor: FakeHypervisor | None = None,
    catalog: Catalog | None = None,
    memory_place: str = "/nowhere",
) -> AsyncIterator[Datastore]:
    where = f'name = "vms"\nbacking = "{rig.backing}"\nmountpoint = "{rig.base}/mount"\nruntime_dir = "{rig.runtime}"'
    store = f'url = "{(rig.base / "store").as_uri()}"'
    config = parse_config(f"[datastore]\n{where}\n[store]\n{store}\n{text}", origin="test")
    kept = catalog or Catalog.in_memory()
    managed_save = ManagedSave(Path("/var/save"), rig.base / "mount", memory_place)
    async with rig.running() as services, open_jobs(kept, running_max=4, kept=10) as jobs:
        made = Datastore(
            settings=Settings(config),
            threads=services.threads,
            private=services.private,
            inventory=DirectoryInventory(rig.backing, files=services.files, memory_dir=managed_save.memory_dir),
            catalog=kept,
            store=services.store,
            replica=None,
            services=services.connected,
            hypervisor=hypervisor or NoHypervisor(),
            mount_usage=MountUsage(()),
            managed_save=managed_save,
            findings=services.findings,
            jobs=jobs,
            mount=cast("Mount", SimpleNamespace(ended=trio.Event())),
            reserve=partial(services.private.reserve.fill, services.files),
            stop=trio.Event(),
            decide=policy.decide,
        )
        with closing(made):
            yield made


async def run(datastore: Datastore, **options: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    """State of a backup job of all VMs, and its report by VM."""
    job_id = await datastore.start_backup([], peer=ME, **{"archive": True, **options})
    info = await datastore.job(job_id, wait_s=60)
    assert info.result is not None
    return info.state, {vm["vm"]: vm for vm in info.result["vms"]}


async def test_a_job_archives_what_policy_says_and_says_why(rig: Rig) -> None:
    policy = Policy({"idle": WhenRunning.SKIP})
    async with opened(rig, ENABLED, policy) as datastore:
        state, report = await run(datastore)
        assert state == "done"
        assert (report["idle"]["outcome"], report["idle"]["rule"]) == ("archived", "idle")
        assert report["idle"]["reason"] == "idle for 20 days"
        assert report["idle"]["read_bytes"] == 2 * CHUNK
        assert report["idle"]["seconds"] >= 0
        assert (report["used"]["outcome"], report["used"]["reason"]) == ("backed up", "used yesterday")


@pytest.mark.parametrize(("text", "archive"), [("", True), (ENABLED, False), (f"{ENABLED}dry_run = true\n", True)])
async def test_nothing_is_archived_without_leave(rig: Rig, text: str, archive: bool) -> None:
    policy = Policy({"idle": WhenRunning.SKIP})
    async with opened(rig, text, policy) as datastore:
        _, report = await run(datastore, archive=archive)
        assert {vm["outcome"] for vm in report.values()} == {"backed up"}
        assert not rig.is_placeholder("idle/disk.img")


async def test_a_rehearsal_does_nothing_and_says_all(rig: Rig) -> None:
    async with opened(rig, "", Policy({"idle": WhenRunning.SKIP})) as datastore:
        await datastore.pause_jobs(paused=True, peer=ME)
        _, report = await run(datastore, rehearsal=True)
        assert {name: vm["outcome"] for name, vm in report.items()} == {
            "idle": "would be archived",
            "used": "would be backed up",
        }
        assert [key for key in rig.objects.contents if key.startswith("manifests/")] == []
        with pytest.raises(Refused, match="--unpause"):
            await run(datastore)


async def test_a_guest_that_an_earlier_daemon_stopped_is_started(rig: Rig) -> None:
    policy = Policy({"idle": WhenRunning.SHUTDOWN})
    disk = rig.base / "mount/idle/disk.img"
    hypervisor = FakeHypervisor(domain("idle", disk, state=GuestState.RUNNING))
    (uuid,) = hypervisor.known
    async with opened(rig, ENABLED, policy, hypervisor=hypervisor) as datastore:
        hypervisor.stubborn.add(uuid)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(run, datastore))
                while "shut down idle" not in hypervisor.asked:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                scope.cancel()
    hypervisor.put(uuid, state=GuestState.OFF)
    async with opened(rig, ENABLED, policy, hypervisor=hypervisor) as datastore, trio.open_nursery() as nursery:
        nursery.start_soon(datastore.backups.watch_guests)
        with trio.fail_after(10):
            while hypervisor.known[uuid].state is GuestState.OFF:  # noqa: ASYNC110
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()


class SavingHypervisor(FakeHypervisor):
    """Puts the memory of guests where it belongs."""

    def __init__(self, rig: Rig, *domains: Domain) -> None:
        super().__init__(*domains)
        self.rig = rig

    async def save(self, uuid: str, *, limit_s: float) -> None:
        self.rig.make_disk(f"save/{self.known[uuid].name}.save", b"memory" * CHUNK)
        await super().save(uuid, limit_s=limit_s)


async def test_the_memory_of_a_guest_is_archived_with_its_vm_and_stays_its_vms(rig: Rig) -> None:
    """The domain is called otherwise than its VM, whose disks tell which it is."""
    guests = [domain(f"{name}-guest", rig.base / f"mount/{name}/disk.img") for name in ("idle", "used")]
    hypervisor = SavingHypervisor(rig, *(replace(each, state=GuestState.RUNNING) for each in guests))
    policy = Policy({"idle": WhenRunning.MANAGED_SAVE})
    async with opened(rig, ENABLED, policy, hypervisor=hypervisor, memory_place="save") as datastore:
        _, report = await run(datastore)
        assert {name: vm["outcome"] for name, vm in report.items()} == {"idle": "archived", "used": "backed up"}
        assert sorted(report["idle"]["placeholders"]) == ["idle/disk.img", "save/idle-guest.save"]
        assert hypervisor.known[guests[0].uuid].state is GuestState.SAVED
    async with opened(rig, "", policy, hypervisor=hypervisor, memory_place="save") as datastore:
        assert sorted((row.vm, row.disk) for row in await datastore.list_disks(None)) == [
            ("idle", "disk.img"),
            ("idle", "idle-guest.save"),
            ("used", "disk.img"),
        ]


async def test_jobs_of_earlier_daemons_are_known(rig: Rig) -> None:
    with closing(Catalog.in_memory()) as catalog:
        earlier, wrong = JobId("a" * 32), JobId("b" * 32)
        catalog.start_job(earlier, kind="backup", vms=["x"], caller_uid=0, now=1.0)
        catalog.end_job(earlier, state="interrupted", report=None, error=None, now=2.0)
        catalog.start_job(wrong, kind="nothing that we know", vms=["x"], caller_uid=0, now=1.0)
        async with opened(rig, "", Policy(), catalog=catalog) as datastore:
            await run(datastore)
            assert [(job.kind, job.state) for job in await datastore.jobs()] == [
                ("backup", "done"),
                ("backup", "interrupted"),
            ]
            assert (await datastore.job(earlier, wait_s=0)).vms == ["x"]
            for unknown in (wrong, JobId("c" * 32)):
                with pytest.raises(NotFound):
                    await datastore.job(unknown, wait_s=0)
