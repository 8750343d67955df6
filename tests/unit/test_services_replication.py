"""What a daemon does for the replica: after each backup and after the start, again when it comes back, and told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing
from store_fakes import FakeObjects
from store_points import new_id, put_point

from vmfs_stub.core.errors import CorruptPack, StoreUnavailable
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.services.mover import Mover
from vmfs_stub.services.replication import FAILED_INTERVAL_S, RETRY_INTERVAL_S, ReplicaService
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.fallback import Fallback, ReplicatedStore
from vmfs_stub.store.keys import manifest_key
from vmfs_stub.store.replica import make_replica
from vmfs_stub.store.store import Store


class InlineThreads(Threads):
    async def background(self, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        await trio.lowlevel.checkpoint()
        return function(*args, **kwargs)

    replica = background


class CopyingMover:
    """Copies manifests; fails as it is told."""

    def __init__(self, here: FakeObjects, there: FakeObjects) -> None:
        self._here, self._there = here, there
        self.failing: dict[str, BaseException] = {}
        self.asked: list[tuple[VmId, list[PointId]]] = []

    async def replicate(self, vm_id: VmId, points: Sequence[PointId], progress: Callable[[int], None]) -> None:
        self.asked.append((vm_id, list(points)))
        await trio.sleep(1)
        if vm_id in self.failing:
            raise self.failing[vm_id]
        for point_id in points:
            key = manifest_key(vm_id, point_id)
            self._there.contents[key] = self._here.contents[key]


class Bench:
    def __init__(self) -> None:
        self.here, self.there = FakeObjects(), FakeObjects()
        self.store = Store.create(self.here)
        make_replica(self.store, self.there)
        self.mover = CopyingMover(self.here, self.there)
        self.vms = [VmId(f"{number:032x}") for number in range(1, 4)]
        self.now = 0.0
        self.service = ReplicaService(
            threads=InlineThreads(files_max=1, store_max=1, compute_max=1, store_timeout_s=9, transfer_timeout_s=9),
            store=ReplicatedStore(
                self.store,
                Store(self.there, self.store.description),
                Fallback(patience_s=1, clock=lambda: self.now),
            ),
            mover=cast("Mover", self.mover),
        )

    def add(self, vm_id: VmId) -> PointId:
        return put_point(self.store, vm_id=vm_id, point_id=new_id(), created_s=float(len(self.here.contents)))

    @property
    def messages(self) -> list[tuple[bool, str]]:
        return list(self.service.problems())


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    async with _running(made):
        yield made


@asynccontextmanager
async def _running(bench: Bench) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.service.run)
        yield
        nursery.cancel_scope.cancel()


async def test_what_is_due_is_brought_over_the_newest_first(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    first, _, third = bench.vms
    points = [bench.add(first), bench.add(first)]
    other = bench.add(third)
    bench.service.due(bench.vms)
    await trio.sleep(0.5)
    assert bench.service.lag == {first: 2}
    await trio.sleep(10)
    assert bench.mover.asked == [(first, points[::-1]), (third, [other])]
    assert (bench.service.lag, bench.messages) == ({}, [])
    bench.service.due([first])
    await trio.sleep(10)
    assert len(bench.mover.asked) == 2  # there is nothing to do


async def test_a_replica_that_is_away_is_told_and_asked_again(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    vm_id = bench.vms[0]
    bench.add(vm_id)

    def refuse(call: str, key: str) -> None:
        raise StoreUnavailable("away")

    bench.there.before = refuse
    bench.service.due([vm_id])
    await trio.sleep(10)
    assert bench.mover.asked == []
    ((must_act, message),) = bench.messages
    assert must_act
    assert "away" in message
    bench.there.before = lambda call, key: None
    await trio.sleep(RETRY_INTERVAL_S + 10)
    assert (bench.service.lag, bench.messages, len(bench.mover.asked)) == ({}, [], 1)


async def test_a_copy_that_fails_for_now_is_tried_again(bench: Bench, autojump_clock: trio.testing.MockClock) -> None:
    vm_id = bench.vms[0]
    bench.add(vm_id)
    bench.mover.failing[vm_id] = StoreUnavailable("full of people")
    bench.service.due([vm_id])
    await trio.sleep(10)
    ((must_act, message),) = bench.messages
    assert not must_act
    assert "1 restore points" in message
    await trio.sleep(3 * RETRY_INTERVAL_S)
    assert len(bench.mover.asked) > 2
    bench.mover.failing.clear()
    await trio.sleep(RETRY_INTERVAL_S + 10)
    assert (bench.service.lag, bench.messages) == ({}, [])


@pytest.mark.parametrize("error", [CorruptPack("run scrub"), RuntimeError("a bug")])
async def test_a_vm_that_cannot_be_copied_holds_up_no_other(
    bench: Bench, error: BaseException, autojump_clock: trio.testing.MockClock
) -> None:
    bad, good = bench.vms[:2]
    bench.add(bad)
    bench.add(good)
    bench.mover.failing[bad] = error
    bench.service.due([bad, good])
    await trio.sleep(10)
    assert [vm_id for vm_id, _ in bench.mover.asked] == [bad, good]
    ((must_act, message),) = bench.messages
    assert must_act
    assert bad in message
    bench.mover.failing.clear()
    await trio.sleep(FAILED_INTERVAL_S + 10)
    assert bench.messages == []


async def test_what_becomes_due_while_it_is_copied_is_copied(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    vm_id = bench.vms[0]
    first = bench.add(vm_id)
    bench.service.due([vm_id])
    await trio.sleep(0.5)
    second = bench.add(vm_id)
    bench.service.due([vm_id])
    await trio.sleep(10)
    assert bench.mover.asked == [(vm_id, [first]), (vm_id, [second])]


async def test_reads_for_which_the_store_is_damaged_are_told_for_a_while(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    fallback = bench.service._store.fallback

    def damaged() -> str:
        raise CorruptPack("pack 7 is damaged")

    assert fallback.read(damaged, lambda: "replica") == "replica"
    ((must_act, message),) = bench.messages
    assert must_act
    assert "pack 7" in message
    assert "scrub" in message
    bench.now += 4000
    assert bench.messages == []
    assert bench.service.reads == 1
