"""The bench's statistics: differences that were planted are found, ones that were not are not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from scripts.lab.ratios import Target, Verdict, alternate, compare

PAIRS = 15


def noisy(seed: int, level: float, *, spread: float = 0.05) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: level * chance.lognormvariate(0, spread)


@pytest.mark.parametrize("planted", [0.5, 0.8, 1.25, 3.0])
def test_a_planted_difference_is_found(planted: float) -> None:
    found = compare(*alternate(noisy(1, planted), noisy(2, 1.0), pairs=PAIRS))
    assert found.ratio == pytest.approx(planted, rel=0.06)
    assert found.low <= found.ratio <= found.high
    assert not found.low <= 1 <= found.high


def test_no_difference_is_claimed_where_there_is_none() -> None:
    covered = 0
    for seed in range(40):
        found = compare(*alternate(noisy(seed, 1.0), noisy(1000 + seed, 1.0), pairs=PAIRS))
        covered += found.low <= 1 <= found.high
    assert covered >= 35


def test_drift_that_both_share_is_no_difference() -> None:
    drift = [1.0 + 0.2 * index for index in range(PAIRS)]
    ours, baseline = ([level * 1.1 for level in drift], drift)
    found = compare(ours, baseline)
    assert (found.low, found.ratio, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_one_bad_sample_says_nothing() -> None:
    steady = [1.0] * 9
    assert compare([*steady[:-1], 50.0], steady).ratio == 1


def test_measuring_alternates() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return 1.0

    alternate(lambda: measure("ours"), lambda: measure("baseline"), pairs=3)
    assert order == ["ours", "baseline"] * 3


@pytest.mark.parametrize(
    ("sense", "limit", "verdict"),
    [
        ("at most", 2.5, Verdict.MET),
        ("at most", 2.0, Verdict.LIKELY_MET),
        ("at most", 1.9, Verdict.SHORT),
        ("at least", 1.5, Verdict.MET),
        ("at least", 2.0, Verdict.LIKELY_MET),
        ("at least", 2.1, Verdict.SHORT),
    ],
)
def test_a_target_is_judged_by_the_ratio_and_its_interval(sense: str, limit: float, verdict: Verdict) -> None:
    ours = [1.8, 1.9, 1.95, 2.0, 2.0, 2.05, 2.1, 2.2, 2.0]
    target = Target("at most" if sense == "at most" else "at least", limit)
    assert compare(ours, [1.0] * len(ours)).verdict(target) is verdict


@pytest.mark.parametrize(("ours", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0])])
def test_what_is_not_a_measurement_has_no_ratio(ours: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match=r"not pairs|not positive"):
        compare(ours, baseline)


def test_the_same_samples_give_the_same_interval() -> None:
    samples = list(itertools.islice(iter(noisy(7, 1.0), 0.0), PAIRS))
    assert compare(samples, [1.0] * PAIRS) == compare(samples, [1.0] * PAIRS)
