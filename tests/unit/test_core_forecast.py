"""When primary will be full is told from how it has filled, and only where it has."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.forecast import FORESEEN_S_MAX, FreeSpace, seconds_until_full

HOUR_S, DAY_S = 3600.0, 86400.0
NOW_S = 1_790_000_000.0
GIB = 1 << 30


def line(*, free: int, per_day: int, hours: int = 168, noise: int = 0, seed: int = 1) -> list[FreeSpace]:
    """Hourly, ending now with so much free."""
    rng = random.Random(seed)
    return [
        FreeSpace(
            NOW_S - back * HOUR_S, round(free + per_day * back / 24) + (rng.randint(-noise, noise) if back else 0)
        )
        for back in range(hours, -1, -1)
    ]


def test_a_steady_fill() -> None:
    assert seconds_until_full(line(free=100 * GIB, per_day=10 * GIB)) == pytest.approx(10 * DAY_S, rel=1e-6)


def test_noise_does_not_matter_much() -> None:
    found = seconds_until_full(line(free=100 * GIB, per_day=10 * GIB, noise=15 * GIB))
    assert found == pytest.approx(10 * DAY_S, rel=0.15)


def test_a_day_that_made_room_does_not_turn_it_round() -> None:
    history = [
        FreeSpace(each.at_s, each.free_bytes + (5 * GIB if 70 < number < 80 else 0))
        for number, each in enumerate(line(free=100 * GIB, per_day=10 * GIB))
    ]
    assert seconds_until_full(history) == pytest.approx(10 * DAY_S, rel=0.1)


@pytest.mark.parametrize("per_day", [0, -GIB])
def test_what_does_not_fill_is_never_full(per_day: int) -> None:
    assert seconds_until_full(line(free=100 * GIB, per_day=per_day)) is None


def test_too_little_is_known() -> None:
    assert seconds_until_full([]) is None
    assert seconds_until_full([FreeSpace(NOW_S, GIB)]) is None
    assert seconds_until_full(line(free=GIB, per_day=GIB, hours=5)) is None
    assert seconds_until_full([FreeSpace(NOW_S - 9 * HOUR_S, 2 * GIB), FreeSpace(NOW_S, GIB)]) is None


def test_full_is_full_and_what_is_far_away_is_never() -> None:
    assert seconds_until_full(line(free=0, per_day=GIB)) == 0
    assert seconds_until_full([FreeSpace(NOW_S, 0)]) == 0
    assert seconds_until_full(line(free=1 << 60, per_day=GIB)) is None


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 1 << 50)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_any_history_gives_a_time_that_can_be(points: list[tuple[int, int]], rng: random.Random) -> None:
    history = [FreeSpace(NOW_S + at_s, free) for at_s, free in points]
    found = seconds_until_full(history)
    assert found is None or 0 <= found <= FORESEEN_S_MAX
    shuffled = sorted(history, key=lambda each: (each.at_s, rng.random()))
    if len({each.at_s for each in history}) == len(history):
        again = seconds_until_full(shuffled[::-1])
        assert again == (None if found is None else pytest.approx(found, rel=1e-6))


@given(st.integers(1, 1 << 44), st.integers(GIB // 64, 1 << 42))
def test_faster_is_sooner(free: int, per_day: int) -> None:
    slow, fast = (seconds_until_full(line(free=free, per_day=rate, hours=24)) for rate in (per_day, 2 * per_day))
    assert fast is not None or slow is None
    assert slow is None or fast is None or fast <= slow
