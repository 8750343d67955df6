"""Claims, adoption and the replica, each of which was made without the others: what they do to one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from tests.fault.scenarios import DISK, SECOND, first_contents, make_vm
from tests.fault.site_faults import short_waits
from vmfs_stub.core.errors import ClaimedElsewhere, StoreUnavailable
from vmfs_stub.services.adopt import AdoptReport
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.store.claims import Claim, ClaimState, newest_claim
from vmfs_stub.store.keys import CLAIMS


@contextmanager
def two_hosts(*, with_replica: bool = False) -> Iterator[tuple[Rig, Rig]]:
    """Datastores of two hosts with one store; the VM is in the first."""
    with ExitStack() as stack:
        stack.enter_context(short_waits())
        first = stack.enter_context(temporary_rig(head=BLOCK))
        make_vm(first)
        if with_replica:
            first.add_replica()
        second = stack.enter_context(temporary_rig(head=BLOCK))
        second.objects, second.store, second.replica_objects = first.objects, first.store, first.replica_objects
        second.settings = replace(first.settings, host="host2")
        yield first, second


def newest(rig: Rig) -> Claim:
    (vm,) = rig.store.vms()
    found = newest_claim(rig.objects, vm.vm_id)
    assert found is not None
    return found


def lose_claims(rig: Rig) -> None:
    """What a replica does not have that becomes the store."""
    for key in [key for key in rig.objects.contents if key.startswith(CLAIMS)]:
        del rig.objects.contents[key]


async def archive(rig: Rig) -> None:
    async with rig.running() as services:
        assert (await services.archive("vm")).warning == ""


async def adopt(services: Services, *, told: Told | None = None) -> AdoptReport:
    (wanted,), _ = await services.adopter.find(["vm"], everything=False)
    return await services.adopter.run(wanted, told=told or Told(), progress=lambda count: None)


async def read_absent(services: Services, path: str = DISK) -> None:
    disk = await services.open(path)
    try:
        assert bytes(await disk.read(CHUNK, 10)) == first_contents()[path][CHUNK : CHUNK + 10]
    finally:
        await services.disks.release(disk)


async def test_a_vm_in_use_stays_claimed_when_the_replica_becomes_the_store() -> None:
    with two_hosts() as (first, second):
        await archive(first)
        async with first.running() as services:
            for path in (DISK, SECOND):
                await services.bring_back(path)
        lose_claims(first)
        async with first.running() as services:
            await services.claims.run()
            assert newest(first).state is ClaimState.HELD
            async with second.running() as there:
                with pytest.raises(ClaimedElsewhere, match="host1"):
                    await adopt(there)


async def test_who_adopted_what_was_held_all_the_time_does_not_use_it() -> None:
    with two_hosts() as (first, second):
        await archive(first)
        async with first.running() as services:
            await read_absent(services)
        lose_claims(first)
        async with second.running() as there:
            await adopt(there)  # before the first host has looked
            async with first.running() as services:
                await services.claims.run()
                assert newest(first).host == "host1"
                with pytest.raises(ClaimedElsewhere, match="host1"):
                    await read_absent(there, SECOND)
                await read_absent(services, SECOND)


async def test_what_was_archived_while_others_were_adopted_is_adopted_as_it_is_then() -> None:
    with two_hosts() as (first, second):
        await archive(first)
        async with second.running() as there:
            (wanted,), _ = await there.adopter.find(["vm"], everything=False)
            await archive(first)
            report = await there.adopter.run(wanted, told=Told(), progress=lambda count: None)
            assert newest(first).point_id == report.point_id
            await read_absent(there)


async def test_a_vm_that_was_used_and_deleted_here_is_free_when_it_was_adopted_again() -> None:
    with two_hosts() as (first, second):
        await archive(first)
        async with second.running() as there:
            await adopt(there)
            await read_absent(there)
        second.lose_host()
        async with first.running() as services:
            with pytest.raises(ClaimedElsewhere, match="host2"):
                await read_absent(services)
        # The host that has it loses its files, and nothing else.
        async with second.running() as there:
            await adopt(there, told=Told(force=True, accept_loss=True))
            await read_absent(there)
            assert newest(second).state is ClaimState.HELD
            (second.backing / "vm").rename(second.base / "deleted")
            report = await adopt(there)
            assert (newest(second).state, newest(second).point_id) == (ClaimState.FREE, report.point_id)


async def test_an_adopted_vm_can_be_used_after_its_former_host_was_backed_up() -> None:
    with two_hosts() as (first, second):
        await archive(first)
        async with second.running() as there:
            await adopt(there)
            async with first.running() as services:
                report = await services.archive("vm", archive=False)  # in which nothing has changed
                assert newest(first).point_id == report.point_id
            await read_absent(there)
            assert newest(first).datastore_id == there.private.datastore_id


def changed_mode(first: Rig) -> None:
    (first.backing / DISK).chmod(0o604)


def one_more(first: Rig) -> None:
    (first.backing / "vm/more").mkdir()


def changed_bytes(first: Rig) -> None:
    """A file that is no placeholder may change without a claim."""
    times = (first.backing / SECOND).stat()
    (first.backing / SECOND).write_bytes(b"x" * times.st_size)
    os.utime(first.backing / SECOND, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [changed_mode, one_more, changed_bytes])
async def test_an_adopted_vm_is_not_used_when_its_former_host_has_something_newer(
    change: Callable[[Rig], None],
) -> None:
    with two_hosts() as (first, second):
        first.settings = replace(first.settings, placeholder_bytes_min=(first.backing / SECOND).stat().st_size + 1)
        await archive(first)
        async with second.running() as there:
            await adopt(there)
            change(first)
            async with first.running() as services:
                await services.archive("vm", archive=False)
            with pytest.raises(ClaimedElsewhere):
                await read_absent(there)


async def test_only_a_vm_in_use_goes_on_from_the_replica_without_the_store() -> None:
    with two_hosts(with_replica=True) as (first, _):
        await archive(first)

        def away(call: str, key: str) -> None:
            raise StoreUnavailable("away")

        async with first.running() as services:
            first.objects.before = away
            with pytest.raises(StoreUnavailable):
                await services.bring_back(DISK)
            first.objects.before = lambda call, key: None
            await read_absent(services)
            first.objects.before = away
            await services.bring_back(DISK)
        assert (first.backing / DISK).read_bytes() == first_contents()[DISK]


async def test_a_replica_that_became_the_store_brings_all_back() -> None:
    with two_hosts(with_replica=True) as (first, _):
        await archive(first)
        assert first.replica_objects is not None
        first.objects, first.replica_objects = first.replica_objects, None
        del first.objects.contents["vmfs-replica"]
        async with first.running() as services:
            for path in (DISK, SECOND):
                await services.bring_back(path)
                assert (first.backing / path).read_bytes() == first_contents()[path]


async def test_what_the_store_lost_is_adopted_from_the_replica() -> None:
    with two_hosts(with_replica=True) as (first, second):
        second.settings = replace(second.settings, placeholder_bytes_min=1 << 30)  # all comes with its bytes
        await archive(first)
        for key in [key for key in first.objects.contents if key.startswith(("packs/", "segments/"))]:
            del first.objects.contents[key]
        async with second.running() as there:
            await adopt(there)
        assert (second.backing / DISK).read_bytes() == first_contents()[DISK]


async def test_no_claim_is_made_where_the_store_is_not() -> None:
    with two_hosts(with_replica=True) as (first, _):
        await archive(first)
        kept = dict(first.objects.contents)
        first.objects.contents.clear()  # the url leads to an empty bucket, say, and the replica has all bytes
        async with first.running() as services:
            with pytest.raises(StoreUnavailable):
                await services.bring_back(DISK)
            assert first.objects.contents == {}
            first.objects.contents.update(kept)
            await services.bring_back(DISK)
        first.objects.contents.clear()
        async with first.running() as services:
            with pytest.raises(StoreUnavailable):
                await services.claims.survey()
            assert first.objects.contents == {}
