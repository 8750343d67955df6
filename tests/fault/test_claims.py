"""No two datastores use an archived VM, and none uses an older state of it: one store, two hosts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, Services, survives_kill, temporary_rig
from tests.fault.datastores import ROOT_PEER, with_datastore
from tests.fault.scenarios import (
    DISK,
    PATHS,
    SECOND,
    bring_back,
    contents_of,
    first_contents,
    make_vm,
)
from tests.fault.site_faults import short_waits
from vmfs_stub.control.messages import JobInfo, JobReport
from vmfs_stub.core.errors import ClaimedElsewhere, RecallTimeout, StoreUnavailable
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.identity import write_vm_id
from vmfs_stub.services.disk import Disk
from vmfs_stub.store.claims import Claim, ClaimState, newest_claim
from vmfs_stub.store.keys import CLAIMS, MANIFESTS, PACKS
from vmfs_stub.store.objects import Buffer


@contextmanager
def one_host() -> Iterator[Rig]:
    with short_waits(), temporary_rig(head=BLOCK) as rig:
        make_vm(rig)
        yield rig


@contextmanager
def two_hosts() -> Iterator[tuple[Rig, Rig]]:
    """Datastores of two hosts with one store; the VM is in the first."""
    with ExitStack() as stack:
        first = stack.enter_context(one_host())
        second = stack.enter_context(temporary_rig(head=BLOCK))
        second.objects, second.store = first.objects, first.store
        second.settings = replace(second.settings, host="host2")
        yield first, second


@contextmanager
def store_away(rig: Rig) -> Iterator[None]:
    before = rig.objects.before

    def refuse(call: str, key: str) -> None:
        raise StoreUnavailable("the store is away")

    rig.objects.before = refuse
    try:
        yield
    finally:
        rig.objects.before = before


def the_vm(rig: Rig) -> VmId:
    return rig.vm("vm").id


def newest(rig: Rig) -> Claim:
    found = newest_claim(rig.objects, the_vm(rig))
    assert found is not None
    return found


def epochs(rig: Rig) -> list[int]:
    return sorted(int(key.rpartition("/")[2]) for key in rig.objects.contents if key.startswith(CLAIMS))


def point_of(rig: Rig) -> PointId:
    """The restore point of the placeholders."""
    (point,) = {key.split("/")[2] for key in rig.pins()}
    return PointId(point)


async def archive(rig: Rig) -> PointId:
    async with rig.running() as services:
        report = await services.archive("vm")
        assert report.warning == ""
    return report.point_id


async def opened_and_read(services: Services, offset: int = CHUNK) -> None:
    disk = await services.open(DISK)
    try:
        expect = first_contents()[DISK][offset : offset + 10]
        assert bytes(await disk.read(offset, 10)) == expect
    finally:
        await services.disks.release(disk)


async def test_an_archived_vm_is_free_until_it_is_used_and_then_held() -> None:
    with one_host() as rig:
        point_id = await archive(rig)
        free = newest(rig)
        assert (free.state, free.point_id, epochs(rig)) == (ClaimState.FREE, point_id, [1, 2])
        async with rig.running() as services:
            await opened_and_read(services, offset=0)
            assert epochs(rig) == [1, 2], "what is resident needs no claim"
            await opened_and_read(services)
            held = newest(rig)
            assert (held.state, held.epoch, held.host, held.datastore) == (ClaimState.HELD, 3, "host1", "vms")
            assert held.datastore_id == services.private.datastore_id
            await opened_and_read(services, offset=2 * CHUNK + 5)
        assert epochs(rig) == [1, 2, 3]


async def refused(services: Services, disk: Disk) -> None:
    """Whatever needs the claim gives an error."""
    with pytest.raises(ClaimedElsewhere, match=r"vm/disk\.img.*host2"):
        await disk.read(CHUNK, 10)
    with pytest.raises(ClaimedElsewhere, match=r"vm/disk\.img.*host2"):
        await disk.read(CHUNK, 10)  # what had arrived meanwhile is not given out by a second try
    with pytest.raises(ClaimedElsewhere, match="host2"):
        await disk.read(2 * CHUNK, 10)  # zeros that need no fetch
    for offset, data in ((0, b"w" * BLOCK), (CHUNK, b"w" * BLOCK), (CHUNK + 5, b"w")):
        with pytest.raises(ClaimedElsewhere, match="host2"):
            await disk.write(offset, data)
    with pytest.raises(ClaimedElsewhere, match="host2"):
        await disk.truncate(CHUNK)
    with services.rig.path_fd(SECOND) as fd, pytest.raises(ClaimedElsewhere, match="host2"):
        await services.disks.truncate(fd, 0)


async def test_what_another_host_has_taken_is_not_used_here() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with second.running() as there:
            assert await there.claims.take(the_vm(first), point_id)
        before = {path: (first.backing / path).read_bytes() for path in PATHS}
        async with first.running() as services:
            disk = await services.open(DISK)
            assert disk.placeholder is not None
            absent = disk.placeholder.absent_bytes()
            await refused(services, disk)
            assert disk.placeholder.absent_bytes() == absent, "nothing becomes resident without the claim"
            assert bytes(await disk.read(0, 10)) == first_contents()[DISK][:10]
            found = [finding for finding in services.findings.all() if isinstance(finding.error, ClaimedElsewhere)]
            assert [finding.severity for finding in found] == ["problem", "problem"]
            assert "since 20" in str(found[0].error)
            assert "adopt" in str(found[0].error)
            await services.disks.release(disk)
            for is_archive in (False, True):
                with pytest.raises(ClaimedElsewhere, match="host2"):
                    await services.archive("vm", archive=is_archive)
            with pytest.raises(ClaimedElsewhere, match="host2"):
                await services.bring_back(DISK)
        assert {path: (first.backing / path).read_bytes() for path in PATHS} == before
        assert newest(first).host == "host2"


async def test_what_another_host_has_archived_since_is_not_used_here_in_an_older_state() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with second.running() as there:
            await there.claims.take(the_vm(first), point_id)
            await there.claims.set_free(the_vm(first), PointId("e" * 32))
        async with first.running() as services:
            disk = await services.open(DISK)
            with pytest.raises(ClaimedElsewhere, match=f"was last archived.*host2.*{'e' * 32}"):
                await disk.read(CHUNK, 1)
            await services.disks.release(disk)


async def test_a_vm_that_came_back_unchanged_goes_on_where_its_placeholders_are() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with second.running() as there:
            await there.claims.take(the_vm(first), point_id)
            await there.claims.set_free(the_vm(first), point_id)
        async with first.running() as services:
            report = await services.archive("vm", archive=False)
            assert (newest(first).host, newest(first).point_id) == ("host1", report.point_id)
            await opened_and_read(services)


async def test_placeholders_of_points_that_are_the_same_are_one_state() -> None:
    """An archive of which a record could not be made durable left some of its point, as a power loss has shown."""
    with two_hosts() as (first, second):
        async with first.running() as services:
            before = (await services.archive("vm", archive=False)).point_id
            disk = await services.open(DISK)
            await disk.write(0, b"changed")
            await services.disks.release(disk)
        points = [await archive(first), await archive(first)]
        for free_at in points:
            async with second.running() as there:
                await there.claims.take(the_vm(first), free_at, force=True)
                await there.claims.set_free(the_vm(first), free_at)
            async with first.running() as services:
                for others in ({before}, {before, *points}, set[PointId](), {None}):
                    with pytest.raises(ClaimedElsewhere):
                        await services.claims.begin(the_vm(first), others)
                assert await services.claims.begin(the_vm(first), points) == free_at


async def test_what_is_used_here_is_taken_by_another_host_only_when_it_is_told_to() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with first.running() as services, second.running() as there:
            await opened_and_read(services)
            with pytest.raises(ClaimedElsewhere, match="in use in datastore vms of host host1"):
                await there.claims.take(the_vm(first), point_id)
            assert newest(first).host == "host1"
            await opened_and_read(services, offset=3 * CHUNK)
            assert await there.claims.take(the_vm(first), point_id, force=True)
            assert newest(first).host == "host2"
            with pytest.raises(ClaimedElsewhere):
                await services.archive("vm", archive=False)
            disk = await services.open(SECOND)
            with pytest.raises(ClaimedElsewhere):
                await disk.read(CHUNK, 1)
            await services.disks.release(disk)


async def test_an_older_point_is_adopted_only_when_that_is_told() -> None:
    with two_hosts() as (first, second):
        older = await archive(first)
        (first.backing / DISK).chmod(0o604)
        await archive(first)
        async with second.running() as there:
            with pytest.raises(ClaimedElsewhere, match="last archived"):
                await there.claims.take(the_vm(first), older)
            assert await there.claims.take(the_vm(first), older, force=True)
            assert not await there.claims.take(the_vm(first), older)


async def test_a_vm_that_was_taken_over_while_its_host_was_away_is_noticed() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with first.running() as services:
            await opened_and_read(services)
        async with second.running() as there:
            await there.claims.take(the_vm(first), point_id, force=True)
        async with first.running() as services:
            assert services.claims.use(the_vm(first))
            await services.claims.run()
            assert not services.claims.use(the_vm(first))
            assert taken_over(services) == [f"VM {the_vm(first)}"]
            disk = await services.open(DISK)
            with pytest.raises(ClaimedElsewhere, match="host2"):
                await disk.read(3 * CHUNK, 1)
            await services.disks.release(disk)
        async with first.running() as services:
            assert not services.claims.use(the_vm(first))
            with pytest.raises(ClaimedElsewhere, match="host2"):
                await services.archive("vm")
            assert taken_over(services) == [f"VM {the_vm(first)}"]
            await services.claims.take(the_vm(first), point_id, force=True)
            assert taken_over(services) == []


def taken_over(services: Services) -> list[str]:
    return [
        finding.subject
        for finding in services.findings.all()
        if isinstance(finding.error, ClaimedElsewhere)
        and finding.severity == "problem"
        and finding.subject.startswith("VM ")
    ]


async def test_a_start_asks_the_store_once_for_all_vms() -> None:
    with one_host() as rig:
        await archive(rig)
        async with rig.running() as services:
            rig.objects.calls.clear()
            await services.claims.run()
            assert rig.objects.calls == []
            await opened_and_read(services)
        asked: list[tuple[str, str]] = []
        rig.objects.before = lambda call, key: asked.append((call, key))
        async with rig.running() as services:
            await services.claims.run()
            assert asked == [("list", CLAIMS)]
            assert services.claims.use(the_vm(rig))


async def test_what_is_held_needs_no_store_also_after_a_restart() -> None:
    with one_host() as rig:
        await archive(rig)
        async with rig.running() as services:
            await opened_and_read(services)
        rig.lose_power(random.Random(1))
        async with rig.running() as services:
            with store_away(rig):
                disk = await services.open(SECOND)
                assert await disk.write(CHUNK - BLOCK, b"w" * BLOCK) == BLOCK
                await services.disks.release(disk)
            found = bytearray(first_contents()[SECOND])
            found[CHUNK - BLOCK : CHUNK] = b"w" * BLOCK
            assert await contents_of(services, SECOND) == bytes(found)
        assert epochs(rig) == [1, 2, 3]


async def test_the_first_write_to_an_archived_vm_needs_the_store_and_waits_no_longer_than_a_recall() -> None:
    with one_host() as rig:
        await archive(rig)
        async with rig.running() as services:
            services.recall.deadline_s = 0.05
            disk = await services.open(SECOND)
            with store_away(rig):
                with pytest.raises(RecallTimeout):
                    await disk.write(CHUNK - BLOCK, b"w" * BLOCK)
                with pytest.raises(RecallTimeout):
                    await disk.truncate(0)
                assert [type(finding.error) for finding in services.findings.all()] == [StoreUnavailable]
            services.recall.deadline_s = 30
            assert await disk.write(CHUNK - BLOCK, b"w" * BLOCK) == BLOCK
            assert services.findings.all() == []
            await services.disks.release(disk)


async def test_a_store_that_comes_back_in_time_lets_the_write_go_on() -> None:
    with one_host() as rig:
        await archive(rig)
        tries = 0

        def away(call: str, key: str) -> None:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise StoreUnavailable("the store is away")

        async with rig.running() as services:
            disk = await services.open(SECOND)
            rig.objects.before = away
            assert await disk.write(CHUNK - BLOCK, b"w" * BLOCK) == BLOCK
            await services.disks.release(disk)


async def test_all_who_come_at_once_share_one_claim() -> None:
    with one_host() as rig:
        await archive(rig)
        async with rig.running() as services:
            disks = [await services.open(path) for path in PATHS]
            async with trio.open_nursery() as nursery:
                for disk in disks:
                    for offset in range(0, CHUNK, 4 * BLOCK):
                        nursery.start_soon(disk.read, offset, 10)
                    nursery.start_soon(disk.write, BLOCK, b"w" * BLOCK)
            for disk in disks:
                await services.disks.release(disk)
        assert epochs(rig) == [1, 2, 3]


async def test_a_resident_file_has_nothing_to_do_with_claims() -> None:
    with two_hosts() as (first, second):
        point_id = await archive(first)
        async with first.running() as services:
            await bring_back(services)
        async with second.running() as there:
            await there.claims.take(the_vm(first), point_id, force=True)
        async with first.running() as services:
            with store_away(first):
                disk = await services.open(DISK)
                assert bytes(await disk.read(CHUNK, 10)) == first_contents()[DISK][CHUNK : CHUNK + 10]
                await disk.write(CHUNK, b"w" * BLOCK)
                await disk.truncate(CHUNK)
                await services.disks.release(disk)


async def test_a_backup_leaves_a_vm_free_that_nobody_uses_and_a_used_one_held() -> None:
    with one_host() as rig:
        async with rig.running() as services:
            await services.archive("vm", archive=False)
            assert (newest(rig).state, epochs(rig)) == (ClaimState.HELD, [1])
            await services.archive("vm", archive=False)
            assert epochs(rig) == [1]
            await services.archive("vm")
            assert (newest(rig).state, epochs(rig)) == (ClaimState.FREE, [1, 2])
            report = await services.archive("vm", archive=False)
            assert (newest(rig).state, newest(rig).point_id) == (ClaimState.FREE, report.point_id)
            assert epochs(rig) == [1, 2, 3, 4]
            await opened_and_read(services)
            await services.archive("vm", archive=False)
            assert (newest(rig).state, epochs(rig)) == (ClaimState.HELD, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("is_archive", [False, True])
async def test_a_vm_that_is_used_during_the_job_stays_held(is_archive: bool) -> None:
    with one_host() as rig:
        await archive(rig)
        async with rig.running() as services:
            vm = rig.vm("vm")

            def used(count: int) -> None:
                services.claims.use(vm.id)

            await services.archiver.run(vm, archive=is_archive, progress=used)
            assert newest(rig).state is ClaimState.HELD


async def test_a_backup_that_fails_leaves_the_vm_free_where_it_was() -> None:
    with one_host() as rig:
        point_id = await archive(rig)
        files = RigFiles(rig.medium)
        async with rig.running(files=files) as services:
            files.fail("store.manifest.put", 1, StoreUnavailable("planted"))
            with pytest.raises(StoreUnavailable):
                await services.archive("vm", archive=False)
        assert (newest(rig).state, newest(rig).point_id, epochs(rig)) == (ClaimState.FREE, point_id, [1, 2, 3, 4])


async def test_a_disk_that_stays_resident_keeps_the_vm_held() -> None:
    """Nothing would stop this host from using it, whoever had the VM."""
    with one_host() as rig:
        await archive(rig)
        rig.make_disk("vm/third.img", b"n" * CHUNK)
        async with rig.running() as services:
            await services.archive("vm", archive=False)
        assert newest(rig).state is ClaimState.HELD


async def test_a_disk_of_another_vm_keeps_the_one_it_was_moved_to_held() -> None:
    with one_host() as rig:
        await archive(rig)
        (rig.backing / "other").mkdir()
        (rig.backing / DISK).rename(rig.backing / "other/disk.img")
        async with rig.running() as services:
            await services.archive("other", archive=False)
            claim = newest_claim(rig.objects, rig.vm("other").id)
            assert claim is not None
            assert claim.state is ClaimState.HELD
            disk = await services.open("other/disk.img")
            await disk.read(CHUNK, 1)
            await services.disks.release(disk)
        assert newest(rig).state is ClaimState.HELD


async def test_a_disk_that_was_moved_out_keeps_the_vm_held_until_it_is_no_placeholder_of_it() -> None:
    """Another host would go on from a point without it, and it could never be recalled again."""
    with two_hosts() as (first, second):
        await archive(first)
        (first.backing / "other").mkdir()
        (first.backing / SECOND).rename(first.backing / "other/disk.img")
        async with first.running() as services:
            for is_archive in (False, True):
                report = await services.archive("vm", archive=is_archive)
                assert "other/disk.img was moved out of it" in report.warning
                assert newest(first).state is ClaimState.HELD
            async with second.running() as there:
                with pytest.raises(ClaimedElsewhere):
                    await there.claims.take(the_vm(first), report.point_id)
            assert await contents_of(services, "other/disk.img") == first_contents()[SECOND]
            await services.archive("other")
            report = await services.archive("vm")
            assert report.warning == ""
            assert (newest(first).state, newest(first).point_id) == (ClaimState.FREE, report.point_id)


async def test_a_job_that_fails_leaves_a_vm_free_of_which_a_disk_was_moved_out() -> None:
    with one_host() as rig:
        point_id = await archive(rig)
        (rig.backing / "other").mkdir()
        (rig.backing / SECOND).rename(rig.backing / "other/disk.img")
        files = RigFiles(rig.medium)
        async with rig.running(files=files) as services:
            files.fail("store.manifest.put", 1, StoreUnavailable("planted"))
            with pytest.raises(StoreUnavailable):
                await services.archive("vm", archive=False)
        assert (newest(rig).state, newest(rig).point_id) == (ClaimState.FREE, point_id)


async def test_one_that_could_not_be_set_free_stays_held_and_a_late_put_does_not_free_it() -> None:
    with two_hosts() as (first, second):
        late: list[tuple[str, bytes]] = []
        put = first.objects.put

        def hanging(key: str, data: Buffer, *, if_absent: bool = True) -> None:
            if key.startswith(CLAIMS) and b'"free"' in bytes(data):
                late.append((key, bytes(data)))
                raise StoreUnavailable("no answer")
            put(key, data, if_absent=if_absent)

        first.objects.put = hanging  # type: ignore[method-assign]
        async with first.running() as services:
            report = await services.archive("vm")
            assert "no answer" in report.warning
            assert len(report.placeholders) == 2
            assert newest(first).state is ClaimState.HELD
            await opened_and_read(services)
        ((key, data),) = late
        with pytest.raises(Exception, match=key):
            put(key, data)
        assert newest(first).state is ClaimState.HELD
        async with second.running() as there:
            with pytest.raises(ClaimedElsewhere):
                await there.claims.take(the_vm(first), report.point_id)


async def test_a_put_that_came_late_is_known_as_our_own() -> None:
    with one_host() as rig:
        await archive(rig)
        files = RigFiles(rig.medium)
        async with rig.running(files=files) as services:
            put = rig.objects.put

            def overtaken(key: str, data: Buffer, *, if_absent: bool = True) -> None:
                if key.startswith(CLAIMS) and len(epochs(rig)) == 2:
                    put(key, data, if_absent=if_absent)  # the one that was given up
                put(key, data, if_absent=if_absent)

            rig.objects.put = overtaken  # type: ignore[method-assign]
            await opened_and_read(services)
        assert (newest(rig).state, epochs(rig)) == (ClaimState.HELD, [1, 2, 3, 4])


@pytest.mark.parametrize("site", ["claims.note", "claims.note_sync", "store.claim.put"])
async def test_a_kill_after_the_claim_is_there_and_before_it_is_noted(site: str) -> None:
    with one_host() as rig:
        await archive(rig)
        files = RigFiles(rig.medium)
        files.fail(site, 1, Killed())
        with survives_kill():
            async with rig.running(files=files) as services:
                await opened_and_read(services)
        assert files.dead
        async with rig.running() as services:
            await opened_and_read(services)
        assert newest(rig).state is ClaimState.HELD


@pytest.mark.parametrize("site", ["claims.clear", "claims.clear_sync", "store.claim.put"])
async def test_a_kill_while_it_is_set_free(site: str) -> None:
    """The note goes first: with the note a start would use what others may have by then."""
    with two_hosts() as (first, second):
        async with first.running() as services:
            await services.archive("vm", archive=False)
        files = RigFiles(first.medium)
        files.fail(site, 1, Killed())
        with survives_kill():
            async with first.running(files=files) as services:
                await services.archive("vm")
        assert files.dead
        async with second.running() as there:
            is_free = newest(first).state is ClaimState.FREE
            try:
                await there.claims.take(the_vm(first), point_of(first))
            except ClaimedElsewhere:
                assert not is_free
        async with first.running() as services:
            if is_free:
                with pytest.raises(ClaimedElsewhere):
                    await opened_and_read(services)
            else:
                await opened_and_read(services)


async def test_a_note_that_cannot_be_removed_keeps_the_vm_held() -> None:
    with one_host() as rig:
        files = RigFiles(rig.medium)
        async with rig.running(files=files) as services:
            files.fail("claims.clear", 1, OSError(5, "planted"))
            report = await services.archive("vm")
            assert "stays claimed here" in report.warning
            assert (newest(rig).state, epochs(rig)) == (ClaimState.HELD, [1])
            with store_away(rig):
                disk = await services.open(DISK)
                await disk.write(BLOCK, b"w" * BLOCK)
                await services.disks.release(disk)


async def test_a_note_that_cannot_be_made_costs_the_next_start_a_look() -> None:
    with one_host() as rig:
        await archive(rig)
        files = RigFiles(rig.medium)
        async with rig.running(files=files) as services:
            files.fail("claims.note", 1, OSError(28, "No space left on device"))
            await opened_and_read(services)
        async with rig.running() as services:
            await opened_and_read(services, offset=3 * CHUNK)
        assert epochs(rig) == [1, 2, 3, 4]


async def test_a_store_without_claims_is_taken_as_it_is() -> None:
    with one_host() as rig:
        await archive(rig)
        for key in [key for key in rig.objects.contents if key.startswith(CLAIMS)]:
            del rig.objects.contents[key]
        async with rig.running() as services:
            await opened_and_read(services)
        assert (newest(rig).state, epochs(rig)) == (ClaimState.HELD, [1])


async def test_a_claim_that_cannot_be_read_is_not_none() -> None:
    with one_host() as rig:
        await archive(rig)
        key = f"{CLAIMS}{the_vm(rig)}/{2:012d}"
        whole = rig.objects.contents[key]
        rig.objects.contents[key] = whole[:-1]
        async with rig.running() as services:
            disk = await services.open(DISK)
            with pytest.raises(Exception, match="claims/"):
                await disk.read(CHUNK, 1)
            rig.objects.contents[key] = whole
            await disk.read(CHUNK, 1)
            assert services.findings.all() == []
            await services.disks.release(disk)


async def test_a_copied_datastore_is_another_one() -> None:
    """The VM identity of a copy that an operator forces upon it does not give it the claim."""
    with two_hosts() as (first, second):
        async with first.running() as services:
            await services.archive("vm", archive=False)
        make_vm(second)
        with second.path_fd("vm") as fd:
            write_vm_id(fd, the_vm(first))
        async with second.running() as there:
            assert the_vm(second) == the_vm(first)
            with pytest.raises(ClaimedElsewhere, match="host1"):
                await there.archive("vm", archive=False)
        assert len([key for key in first.objects.contents if key.startswith(MANIFESTS)]) == 1
        assert any(key.startswith(PACKS) for key in first.objects.contents)


async def test_a_job_of_many_vms_looks_once_and_one_of_another_host_fails_alone() -> None:
    listed: list[str] = []
    jobs: list[JobInfo] = []

    async def back_up_all(datastore: Datastore, services: Services) -> None:
        job_id = await datastore.start_backup([], archive=False, peer=ROOT_PEER)
        while (info := await datastore.job(job_id, wait_s=0)).state == "running":  # noqa: ASYNC110
            await trio.sleep(0.001)
        jobs.append(info)

    with two_hosts() as (first, second):
        first.make_disk("other/disk.img", b"o" * CHUNK)
        async with first.running() as services, second.running() as there:
            for _ in range(2):
                await with_datastore(services, "", back_up_all)
                first.objects.before = lambda call, key: listed.append(key) if call == "list" else None
            assert [key for key in listed if key.startswith(CLAIMS)] == [CLAIMS]
            await there.claims.take(the_vm(first), PointId("e" * 32), force=True)
            await with_datastore(services, "", back_up_all)
        assert [job.state for job in jobs] == ["done", "done", "failed"]
        outcomes = JobReport.model_validate(jobs[-1].result).vms
        assert {each.vm: each.error and each.error.error for each in outcomes} == {
            "vm": "ClaimedElsewhere",
            "other": None,
        }
