"""How long guests wait is counted by class, and whether recalls fail lately."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from vmfs_stub.core.errors import ClaimedElsewhere, RecallsHeld, StoreUnavailable
from vmfs_stub.services.hydration import Pace
from vmfs_stub.services.recall_waits import WAIT_BOUNDS_S, RecallWaits


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def wait(waits: RecallWaits, clock: Clock, seconds: float, error: BaseException | None = None) -> None:
    with waits.measured():
        clock.now_s += seconds
        if error is not None:
            raise error


def test_waits_by_class() -> None:
    clock = Clock()
    waits = RecallWaits(clock=clock)
    for seconds in (0.0, 0.005, 0.03, 20.0, 1000.0):
        wait(waits, clock, seconds)
    found = waits.all()
    assert len(found.counts) == len(WAIT_BOUNDS_S) + 1
    by_bound = dict(zip((*WAIT_BOUNDS_S, None), found.counts, strict=True))
    assert {bound: count for bound, count in by_bound.items() if count} == {0.005: 2, 0.05: 1, 25.0: 1, None: 1}
    assert found.sum_s == pytest.approx(1020.035)
    assert waits.failed == 0


def test_failing_until_one_works() -> None:
    clock = Clock()
    waits = RecallWaits(clock=clock)
    assert waits.failing_for_s() is None
    wait(waits, clock, 1)
    with pytest.raises(StoreUnavailable):
        wait(waits, clock, 1, StoreUnavailable("away"))
    clock.now_s += 5
    assert (waits.failed, waits.failing_for_s()) == (1, 5.0)
    with pytest.raises(KeyboardInterrupt):  # who gives up has waited for nothing that failed
        wait(waits, clock, 1, KeyboardInterrupt())
    assert sum(waits.all().counts) == 2
    wait(waits, clock, 1)
    assert waits.failing_for_s() is None
    for refusal in (ClaimedElsewhere("in use on host b"), RecallsHeld("held")):
        with pytest.raises(type(refusal)):
            wait(waits, clock, 1, refusal)
    assert (waits.failed, waits.failing_for_s()) == (1, None)


async def test_a_pace_is_kept_and_follows_its_limit(autojump_clock: MockClock) -> None:
    limit = 100
    pace = Pace(lambda: limit)
    for _ in range(5):
        await pace.keep(100)
    assert trio.current_time() == pytest.approx(5)
    limit = 1000
    await pace.keep(100)
    assert trio.current_time() == pytest.approx(5), "a new limit counts from when it is seen"
    for _ in range(10):
        await pace.keep(100)
    assert trio.current_time() == pytest.approx(6)
    limit = 0
    await pace.keep(1 << 40)
    assert trio.current_time() == pytest.approx(6)


async def test_who_waits_sees_that_the_limit_is_gone(autojump_clock: MockClock) -> None:
    limit = 1
    pace = Pace(lambda: limit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pace.keep, 10**9)
        await trio.sleep(3.5)
        limit = 0
    assert trio.current_time() < 5
