"""What an operator's `archive` and `backup` make of chains and of domains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
import trio

from tests.datastore_harness import CHUNK, Rig, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import ROOT_PEER, with_datastore
from tests.unit.test_services_image_chains import make_base, make_overlay, with_format
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.errors import HypervisorAway, InUse, Protected, Refused
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        yield made


async def done(datastore: Datastore, job: JobId) -> JobInfo:
    with trio.fail_after(60):
        while (info := await datastore.job(job, wait_s=0)).state == "running":  # noqa: ASYNC110
            await trio.sleep(0.005)
    return info


async def with_it(rig: Rig, act: Callable[[Datastore, Services], Awaitable[None]]) -> None:
    async with rig.running() as services:
        await with_datastore(services, "", act)


async def test_overlays_go_before_their_bases_however_they_are_named(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")

    async def act(datastore: Datastore, services: Services) -> None:
        info = await done(datastore, await datastore.start_archive(["golden"], peer=ROOT_PEER))
        assert info.state == "failed"
        assert "is the base of clone/disk.qcow2, which is resident" in str(info.error)
        assert not rig.is_placeholder("golden/base.qcow2")
        info = await done(datastore, await datastore.start_archive(["golden", "clone"], peer=ROOT_PEER))
        assert info.state == "done", info
        assert info.result is not None
        assert [outcome["vm"] for outcome in info.result["vms"]] == ["clone", "golden"]
        assert rig.is_placeholder("golden/base.qcow2")

    await with_it(rig, act)


async def test_what_a_domain_has_against_it_is_told_by_name(rig: Rig) -> None:
    rig.make_disk("vm/disk.img", b"x" * 3 * CHUNK)
    told = domain("guest", rig.mountpoint / "vm/disk.img")
    hypervisor = rig.hypervisor = FakeHypervisor(replace(told, problems=("vdb (/dev/sdb) is passed through",)))

    async def act(datastore: Datastore, services: Services) -> None:
        info = await done(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
        assert "domain guest: vdb (/dev/sdb) is passed through" in str(info.error)
        assert (
            await done(datastore, await datastore.start_backup(["vm"], peer=ROOT_PEER, archive=False))
        ).state == "done"
        hypervisor.away = True
        with pytest.raises(HypervisorAway):
            await datastore.start_archive(["vm"], peer=ROOT_PEER)
        assert (
            await done(datastore, await datastore.start_backup(["vm"], peer=ROOT_PEER, archive=False))
        ).state == "done"
        assert not rig.is_placeholder("vm/disk.img")

    await with_it(rig, act)


async def test_what_comes_up_before_its_turn_is_told_then(rig: Rig) -> None:
    """Nothing stood against it when the operator asked: the job looks again, at its turn and under the lease."""
    rig.make_disk("vm/disk.img", b"x" * 3 * CHUNK)
    told = domain("guest", rig.mountpoint / "vm/disk.img")
    hypervisor = rig.hypervisor = FakeHypervisor(told)

    async def act(datastore: Datastore, services: Services) -> None:
        job = await datastore.start_archive(["vm"], peer=ROOT_PEER)
        hypervisor.put(told.uuid, problems=("vdb is passed through",))
        info = await done(datastore, job)
        assert "domain guest: vdb is passed through" in str(info.error)
        hypervisor.put(told.uuid, problems=())

        def put_and_share(put: Callable[..., object], *args: object, **kwargs: object) -> object:
            """The copy is there by now, and nobody can use the VM."""
            hypervisor.known[told.uuid] = replace(told, problems=("vdc is shared",))
            return put(*args, **kwargs)

        services.files.instead["store.manifest.put"] = put_and_share
        info = await done(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
        assert (info.state, info.error is not None and info.error.error) == ("failed", "Refused"), info
        assert info.result is not None
        (outcome,) = info.result["vms"]
        assert outcome["outcome"] == "backed up"
        assert "not archived after all: VM vm is not archived: domain guest: vdc is shared" in outcome["message"]
        assert not rig.is_placeholder("vm/disk.img")

    await with_it(rig, act)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"state": GuestState.RUNNING}, InUse),
        ({"state": GuestState.PAUSED}, InUse),
        ({"metadata": {"protected": "yes"}}, Protected),
        ({"disks": "without stop"}, Refused),
    ],
)
async def test_a_domain_that_is_used_or_protected_is_named_and_nothing_done(
    rig: Rig, changes: dict[str, object], error: type[Exception]
) -> None:
    rig.make_disk("vm/disk.img", b"x" * 3 * CHUNK)
    told = domain("guest", rig.mountpoint / "vm/disk.img")
    if "disks" in changes:
        changes = {"disks": (replace(told.disks[0], stops_on_error=False),)}
    rig.hypervisor = FakeHypervisor(replace(told, **changes))  # type: ignore[arg-type]

    async def act(datastore: Datastore, services: Services) -> None:
        info = await done(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
        assert info.error is not None
        assert (info.error.error, "domain guest" in info.error.message) == (error.__name__, True)
        assert services.store.points(rig.vm("vm").id) == []
        assert not rig.is_placeholder("vm/disk.img")

    await with_it(rig, act)


async def test_a_base_stays_while_a_clone_runs(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    clone = with_format(domain("c", rig.mountpoint / "clone/disk.qcow2"), "qcow2")
    hypervisor = rig.hypervisor = FakeHypervisor(clone)

    async def act(datastore: Datastore, services: Services) -> None:
        assert (await done(datastore, await datastore.start_archive(["clone"], peer=ROOT_PEER))).state == "done"
        hypervisor.put(clone.uuid, state=GuestState.RUNNING)
        info = await done(datastore, await datastore.start_archive(["golden"], peer=ROOT_PEER))
        assert "a disk of domain c, which is not off" in str(info.error)
        hypervisor.put(clone.uuid, state=GuestState.OFF)
        assert (await done(datastore, await datastore.start_archive(["golden"], peer=ROOT_PEER))).state == "done"

    await with_it(rig, act)


async def test_the_files_of_a_domain_are_one_vm_from_the_first_job_on(rig: Rig) -> None:
    make_base(rig, "vm.qcow2")
    make_overlay(rig, "vm.snap1", "vm.qcow2")
    rig.hypervisor = FakeHypervisor(with_format(domain("web", rig.mountpoint / "vm.snap1"), "qcow2"))

    async def act(datastore: Datastore, services: Services) -> None:
        info = await done(datastore, await datastore.start_archive(["web"], peer=ROOT_PEER))
        assert info.state == "done", info
        assert info.result is not None
        assert sorted(info.result["vms"][0]["placeholders"]) == ["vm.qcow2", "vm.snap1"]
        assert {(row.vm, row.disk) for row in await datastore.list_disks(None)} == {
            ("web", "vm.qcow2"),
            ("web", "vm.snap1"),
        }

    await with_it(rig, act)


async def test_the_agent_of_a_guest_is_asked_whichever_way_its_vm_is_known_to_run(rig: Rig) -> None:
    rig.make_disk("vm/disk.img", b"x" * 3 * CHUNK)
    told = domain("guest", rig.mountpoint / "vm/disk.img", state=GuestState.RUNNING)
    hypervisor = rig.hypervisor = FakeHypervisor(told)
    hypervisor.agents.add(told.uuid)

    async def act(datastore: Datastore, services: Services) -> None:
        disk = await services.open("vm/disk.img")
        for away, message in ((False, "while it was in use (quiesced)"), (True, "while it was in use (crash)")):
            hypervisor.away = away
            info = await done(datastore, await datastore.start_backup(["vm"], peer=ROOT_PEER, archive=False))
            assert info.result is not None
            (outcome,) = info.result["vms"]
            assert (outcome["outcome"], message in outcome["message"]) == ("backed up", True), outcome
        assert [asked for asked in hypervisor.asked if asked != "domains"] == ["freeze guest", "thaw guest"]
        await services.disks.release(disk)

    await with_it(rig, act)


async def test_what_an_operator_protects_while_it_is_copied_stays(rig: Rig) -> None:
    rig.make_disk("vm/disk.img", b"x" * 3 * CHUNK)

    async def act(datastore: Datastore, services: Services) -> None:
        def put_and_protect(put: Callable[..., object], *args: object, **kwargs: object) -> object:
            DirectoryInventory(rig.backing).protect(rig.vm("vm"), True)
            return put(*args, **kwargs)

        services.files.instead["store.manifest.put"] = put_and_protect
        info = await done(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
        assert info.result is not None
        (outcome,) = info.result["vms"]
        assert outcome["outcome"] == "backed up"
        assert "is protected" in outcome["message"]
        assert not rig.is_placeholder("vm/disk.img")
        info = await done(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
        assert info.error is not None
        assert info.error.error == Protected.__name__

    await with_it(rig, act)
