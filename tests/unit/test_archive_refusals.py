"""What stands against an operator's `archive`: of one VM it is that VM's trouble, and told; of all it refuses all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio

from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import ROOT_PEER, with_datastore
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.errors import HypervisorAway, InUse, Protected, Refused, VmNotFound
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore import Datastore

LAX = "lax"


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        made.make_disk("web/disk.img", b"x" * 3 * CHUNK)
        made.make_disk("other/disk.img", b"y" * 3 * CHUNK)
        yield made


def hypervisor_of(rig: Rig, changes: dict[str, Any]) -> FakeHypervisor:
    web = domain("guest", rig.mountpoint / "web/disk.img")
    if changes.pop(LAX, False):
        changes["disks"] = (replace(web.disks[0], stops_on_error=False),)
    rig.hypervisor = FakeHypervisor(replace(web, **changes))
    return rig.hypervisor


async def archived(datastore: Datastore, *names: str) -> JobInfo:
    job = await datastore.start_archive(names, peer=ROOT_PEER)
    return await done(datastore, job)


async def done(datastore: Datastore, job: JobId) -> JobInfo:
    with trio.fail_after(60):
        while (info := await datastore.job(job, wait_s=0)).state == "running":  # noqa: ASYNC110
            await trio.sleep(0.005)
    return info


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({LAX: True}, Refused, "domain guest: vda without error_policy"),
        ({"problems": ("it is transient",)}, Refused, "domain guest: it is transient"),
        ({"metadata": {"protected": "yes"}}, Protected, "metadata of domain guest says that it is protected"),
        ({"state": GuestState.RUNNING}, InUse, "domain guest is running"),
        ({"state": GuestState.PAUSED}, InUse, "domain guest is paused"),
    ],
)
async def test_what_stands_against_one_vm_stops_no_other(
    rig: Rig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    rig.make_disk("third/disk.img", b"z" * 3 * CHUNK)
    hypervisor_of(rig, dict(changes))
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            info = await archived(datastore, "other", "web", "third")
            assert (info.state, None if info.error is None else info.error.error) == ("failed", error.__name__)
            assert info.result is not None
            outcomes = {vm["vm"]: vm for vm in info.result["vms"]}
            assert {name: vm["outcome"] for name, vm in outcomes.items()} == {
                "other": "archived",
                "web": "skipped",
                "third": "archived",
            }
            assert message in outcomes["web"]["message"]
            assert services.store.points(rig.vm("web").id) == []

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("web/disk.img")


async def test_a_name_that_is_no_vms_is_refused_before_anything_is_done(rig: Rig) -> None:
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            for start in (
                datastore.start_archive,
                datastore.start_recall,
                partial(datastore.start_backup, archive=False),
            ):
                with pytest.raises(VmNotFound, match="'wbe'"):
                    await start(["other", "wbe"], peer=ROOT_PEER)
            assert await datastore.jobs() == []

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("other/disk.img")


async def test_a_vm_that_cannot_be_read_stops_no_other(rig: Rig) -> None:
    (rig.backing / "mine" / "/".join(["d"] * 70)).mkdir(parents=True)
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            starts = {
                "archived": datastore.start_archive,
                "recalled": datastore.start_recall,
                "backed up": partial(datastore.start_backup, archive=False),
                "would be backed up": partial(datastore.start_backup, archive=True, rehearsal=True),
            }
            for outcome, start in starts.items():
                info = await done(datastore, await start(["mine", "other"], peer=ROOT_PEER))
                assert (info.state, sorted(info.vms)) == ("failed", ["mine", "other"])
                assert info.result is not None
                told = {vm["vm"]: vm for vm in info.result["vms"]}
                assert told["other"]["outcome"] == outcome
                assert told["mine"]["outcome"] == "failed"
                assert "VM mine cannot be read" in told["mine"]["message"]

        await with_datastore(services, "", act)


async def test_a_vm_named_twice_is_archived_once(rig: Rig) -> None:
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            info = await archived(datastore, "other", rig.vm("other").id, "other/")
            assert (info.state, info.vms) == ("done", ["other"])

        await with_datastore(services, "", act)


@pytest.mark.parametrize(
    ("changes", "text"),
    [({LAX: True}, "[libvirt]\nrequire_stop_on_error = false\n"), ({"state": GuestState.SAVED}, "")],
)
async def test_archives_are_allowed_where_nothing_is_against_it(rig: Rig, changes: dict[str, Any], text: str) -> None:
    hypervisor_of(rig, dict(changes))
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            assert (await archived(datastore, "web")).state == "done"

        await with_datastore(services, text, act)
    assert rig.is_placeholder("web/disk.img")


async def test_a_domain_that_has_the_disk_only_now_counts_at_once(rig: Rig) -> None:
    """An image is moved into the datastore, and a link left where it was."""
    old = rig.base / "old.img"
    rig.hypervisor = FakeHypervisor(replace(domain("guest", old), metadata={"protected": "yes"}))
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            assert (await archived(datastore, "other")).state == "done"
            old.symlink_to(rig.mountpoint / "web/disk.img")
            info = await archived(datastore, "web")
            assert info.error is not None
            assert info.error.error == Protected.__name__

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("web/disk.img")


async def test_archives_are_refused_where_it_is_not_known(rig: Rig) -> None:
    hypervisor_of(rig, {}).away = True
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            for name in ("web", "other"):
                with pytest.raises(HypervisorAway):
                    await datastore.start_archive([name], peer=ROOT_PEER)

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("web/disk.img")
