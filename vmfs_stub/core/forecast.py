"""When a filesystem will be full, if it goes on filling as it has: free space in the past in, seconds out.

Pure.  A straight line through all that was seen of the last days, by least squares: a backup that makes room for an
hour, or an ISO image that is copied in, does not turn it round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SPAN_S_MIN: Final = 6 * 3600.0
"""Of a shorter time nothing is foretold: an hour's copying would fill any filesystem within the week."""
COUNT_MIN: Final = 4
FORESEEN_S_MAX: Final = 3650 * 86400.0
"""What is further away counts as never."""


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """So many bytes were free at ``at_s``, in seconds since the epoch."""

    at_s: float
    free_bytes: int


def seconds_until_full(history: Sequence[FreeSpace]) -> float | None:
    """Seconds from the last moment of ``history``, in any order, until nothing is free; None where it is not filling.

    0 when nothing is free already, and what the line says is never negative.
    """
    if not history:
        return None
    last = max(history, key=lambda each: each.at_s)
    if last.free_bytes <= 0:
        return 0.0
    if len(history) < COUNT_MIN or last.at_s - min(each.at_s for each in history) < SPAN_S_MIN:
        return None
    # Times from the last one on and both means taken away: epoch seconds squared would eat up a float's digits.
    times = [each.at_s - last.at_s for each in history]
    mean_s = sum(times) / len(times)
    mean_bytes = sum(each.free_bytes for each in history) / len(history)
    spread = sum((time_s - mean_s) ** 2 for time_s in times)
    together = sum(
        (time_s - mean_s) * (each.free_bytes - mean_bytes) for time_s, each in zip(times, history, strict=True)
    )
    slope = together / spread
    if slope >= 0:
        return None
    # What is free now counts, not what the line says of now: how fast it goes is all that the past is asked for.
    left_s = last.free_bytes / -slope
    return left_s if left_s <= FORESEEN_S_MAX else None
