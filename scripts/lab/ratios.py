"""The statistics of a measurement: how much one thing costs against a named baseline, and how sure that is.

A row is the ratio of two medians.  The two are measured alternately in one run, so that whatever slows this machine
down for a while slows both; a median, so that one bad sample says nothing; and the interval comes from resampling the
*pairs*, so that drift which both share does not widen it.  Pure: measures nothing, prints nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Literal

RESAMPLES = 2000
CONFIDENCE = 0.95


class Verdict(Enum):
    """What a row says about its target."""

    MET = "met"
    LIKELY_MET = "met, within the noise"
    SHORT = "FALLS SHORT"


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio should be: ``at most`` for costs (seconds, bytes), ``at least`` for yields (operations a second)."""

    sense: Literal["at most", "at least"]
    limit: float

    def allows(self, ratio: float) -> bool:
        """Whether this ratio is as it should be."""
        return ratio <= self.limit if self.sense == "at most" else ratio >= self.limit

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples of ours and of the baseline, taken alternately, in one unit.

    ``ratio`` is the ratio of the medians; ``low`` and ``high`` bound it with 95 % confidence.
    """

    ours: tuple[float, ...]
    baseline: tuple[float, ...]
    ratio: float
    low: float
    high: float

    def verdict(self, target: Target) -> Verdict:
        """Judged by the ratio; where the interval crosses the target, the row says so."""
        if not target.allows(self.ratio):
            return Verdict.SHORT
        sure = target.allows(self.low) and target.allows(self.high)
        return Verdict.MET if sure else Verdict.LIKELY_MET


def alternate(
    ours: Callable[[], float], baseline: Callable[[], float], *, pairs: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure A B A B …: ours, then the baseline, ``pairs`` times."""
    samples = [(ours(), baseline()) for _ in range(pairs)]
    return tuple(pair[0] for pair in samples), tuple(pair[1] for pair in samples)


def compare(ours: Sequence[float], baseline: Sequence[float], *, seed: int = 0) -> Comparison:
    """The ratio of the medians and its bootstrap interval; sample i of both was taken in the same pair.

    Raises ValueError when the samples do not pair up or one is not positive: a measurement of nothing has no ratio.
    """
    if not ours or len(ours) != len(baseline):
        raise ValueError(f"{len(ours)} samples of ours and {len(baseline)} of the baseline are not pairs")
    if min(*ours, *baseline) <= 0:
        raise ValueError("a sample that is not positive was not a measurement")
    pairs = list(zip(ours, baseline, strict=True))
    chance = random.Random(seed)
    resampled = sorted(_ratio(chance.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    low, high = resampled[int(tail * RESAMPLES)], resampled[int((1 - tail) * RESAMPLES) - 1]
    return Comparison(tuple(ours), tuple(baseline), _ratio(pairs), low, high)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return median(pair[0] for pair in pairs) / median(pair[1] for pair in pairs)
