"""For how long a VM has not been used, as its samples say: the part of a policy that looks at history.

What is not known is use: time of which there is no sample, or of which a sample does not know what the VM did.  A small
share of such time is allowed, since every restart of a daemon leaves some; used time and unknown time are weighed
alike, so that to lose a sample never makes a VM look less used.

A window holds when *each* span of time that ends now, from a day up to the whole window, holds: what a VM did lately
is not made up for by weeks in which it rested, and a longer window never asks for less than a shorter one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from vmfs_stub.core.usage import Sample

SPAN_S_MIN: Final = 86400.0
"""The shortest span that is looked at: windows that are shorter count as this long.

Shares of shorter ones say nothing, for the newest sample is always some time ago.
"""

GAP_SHARE_MAX: Final = 0.01
"""Of each span: a quarter of an hour in a day, some three hours in two weeks."""

_ROUNDING_S: Final = 0.001
_off_s: Callable[[Sample], float] = attrgetter("off_s")
_running_s: Callable[[Sample], float] = attrgetter("running_s")
_start_s: Callable[[Sample], float] = attrgetter("start_s")
_cpu_percent: Callable[[Sample], float] = attrgetter("cpu_percent_max")
_disk_bytes_per_s: Callable[[Sample], float] = attrgetter("disk_bytes_per_s_max")
_network_bytes_per_s: Callable[[Sample], float] = attrgetter("network_bytes_per_s_max")
"""Sums and maxima of these are many times faster than a look at each sample, and enough where a VM did nothing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a VM that runs may do and still rest; None of a sample is above every limit."""

    cpu_percent_max: float
    disk_bytes_per_s_max: float
    network_bytes_per_s_max: float


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a window, in seconds: ``used_s`` (the unknown included) of the last ``span_s``.

    It is the span that does not hold, or the whole window.
    """

    holds: bool
    span_s: float
    used_s: float
    allowed_s: float


def find_off(samples: Sequence[Sample], *, now_s: float, window_s: float) -> Found:
    """Whether the VM was off; time in which it ran is allowed no more than time of which nothing is known."""
    window_s = max(window_s, SPAN_S_MIN)
    inside = _inside(samples, now_s, window_s)
    plain = _plain(inside, sum(map(_off_s, inside)), window_s, GAP_SHARE_MAX)
    return plain or _look(samples, _not_off_s, now_s=now_s, window_s=window_s, share=GAP_SHARE_MAX)


def find_known(samples: Sequence[Sample], *, now_s: float, window_s: float) -> Found:
    """Whether it is known what the VM did; ``used_s`` is what is not known."""
    window_s = max(window_s, SPAN_S_MIN)
    return _look(samples, _unknown_s, now_s=now_s, window_s=window_s, share=GAP_SHARE_MAX)


def find_idle(
    samples: Sequence[Sample], limits: Limits, *, now_s: float, window_s: float, used_share_max: float
) -> Found:
    """Whether the VM was off, or ran below all ``limits``, but for a share of the time (0 to 1)."""
    window_s = max(window_s, SPAN_S_MIN)
    inside = _inside(samples, now_s, window_s)
    if _are_quiet(inside, limits):
        plain = _plain(inside, sum(map(_off_s, inside)) + sum(map(_running_s, inside)), window_s, used_share_max)
        if plain is not None:
            return plain

    def used_s(sample: Sample) -> float:
        is_quiet = sample.running_s <= 0 or (
            (cpu := sample.cpu_percent_max) is not None
            and cpu <= limits.cpu_percent_max
            and (disk := sample.disk_bytes_per_s_max) is not None
            and disk <= limits.disk_bytes_per_s_max
            and (network := sample.network_bytes_per_s_max) is not None
            and network <= limits.network_bytes_per_s_max
        )
        return _unknown_s(sample) if is_quiet else _not_off_s(sample)

    found = _look(samples, used_s, now_s=now_s, window_s=window_s, share=used_share_max)
    if not found.holds:
        return found
    known = find_known(samples, now_s=now_s, window_s=window_s)
    return found if known.holds else known


def last_start_s(samples: Sequence[Sample]) -> float | None:
    """When the VM was last seen to run after it had been off: the beginning of that sample; None when it never was."""
    runs_later: Sample | None = None
    for sample in reversed(samples):
        if sample.running_s > 0:
            if sample.off_s > 0:
                return sample.start_s
            runs_later = sample
        elif runs_later is not None and sample.off_s > 0:
            return runs_later.start_s
    return None


def _not_off_s(sample: Sample) -> float:
    return sample.end_s - sample.start_s - sample.off_s


def _unknown_s(sample: Sample) -> float:
    return sample.end_s - sample.start_s - sample.off_s - sample.running_s


def _inside(samples: Sequence[Sample], now_s: float, window_s: float) -> Sequence[Sample]:
    """The samples that lie in the window; none when they are not as they should be."""
    first = bisect_left(samples, now_s - window_s, key=_start_s)
    if first == len(samples) or samples[-1].end_s > now_s:
        return ()
    return samples[first:] if first else samples


def _plain(inside: Sequence[Sample], rested_s: float, window_s: float, share: float) -> Found | None:
    """That the window holds, when in all of it no more was used than the shortest span may have."""
    used_s = window_s - rested_s
    if not inside or rested_s > inside[-1].end_s - inside[0].start_s + _ROUNDING_S:  # they overlap
        return None
    return Found(True, window_s, used_s, window_s * share) if used_s <= SPAN_S_MIN * min(share, GAP_SHARE_MAX) else None


def _are_quiet(samples: Sequence[Sample], limits: Limits) -> bool:
    """Whether all that is known of these samples is below the limits."""
    try:
        return (
            max(map(_cpu_percent, samples)) <= limits.cpu_percent_max
            and max(map(_disk_bytes_per_s, samples)) <= limits.disk_bytes_per_s_max
            and max(map(_network_bytes_per_s, samples)) <= limits.network_bytes_per_s_max
        )
    except (TypeError, ValueError):  # None, or no samples
        return False


def _look(
    samples: Sequence[Sample],
    used_s_of: Callable[[Sample], float],
    *,
    now_s: float,
    window_s: float,
    share: float,
) -> Found:
    """Go back in time from now until a span has more used time than its ``share``, or the window ends.

    What of a sample was used, nobody knows more of than how long: it is taken for its last part, which is the worst.
    So the used time of the last so many seconds grows or stands still, and is worst where it begins to stand still.
    """
    used_s, back_s = 0.0, 0.0
    """Used time of the last ``back_s``."""
    for sample in reversed(samples):
        end_back_s = now_s - sample.end_s
        if end_back_s < back_s - _ROUNDING_S:  # of the future, or overlaps a later one: it says nothing
            continue
        in_sample_s = max(0.0, used_s_of(sample))
        used_s += end_back_s - back_s + in_sample_s
        worst_s = end_back_s + in_sample_s
        if worst_s >= window_s:
            used_s -= worst_s - window_s
            return Found(used_s <= share * window_s + _ROUNDING_S, window_s, used_s, share * window_s)
        back_s = now_s - sample.start_s
        if back_s >= SPAN_S_MIN:
            span_s = worst_s if worst_s > SPAN_S_MIN else SPAN_S_MIN
            if used_s > share * span_s + _ROUNDING_S:
                return Found(False, span_s, used_s, share * span_s)
        if back_s >= window_s:
            return Found(True, window_s, used_s, share * window_s)
    used_s += window_s - back_s
    return Found(used_s <= share * window_s + _ROUNDING_S, window_s, used_s, share * window_s)
