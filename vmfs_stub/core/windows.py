"""Times of day in which backups may be faster, or have to be slower, than at others.

Pure: who asks says what the clock on the wall shows.  That is all that is looked at, so an hour that a change to summer
time leaves out, or repeats, is as long as it is on that day.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MINUTES_PER_DAY = 24 * 60
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Window:
    """From minute ``start`` of a day to minute ``end``, half-open; one that ends before it starts goes past midnight.

    One that ends when it starts is the whole day.  ``bytes_per_s_max`` of 0 is no limit.
    """

    start: int
    end: int
    bytes_per_s_max: int

    def holds(self, minute: int) -> bool:
        """Whether it is open at that minute of a day."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows, of which the first that is open counts; ``outside`` is the limit when none is (0: none)."""

    windows: Sequence[Window] = ()
    outside: int = 0

    def limit(self, minute: int) -> int:
        """Bytes per second at that minute of a day; 0 is no limit."""
        return next((window.bytes_per_s_max for window in self.windows if window.holds(minute)), self.outside)

    @property
    def are_unlimited(self) -> bool:
        """Whether there is never a limit."""
        return not self.outside and not any(window.bytes_per_s_max for window in self.windows)


def minute_of(text: str) -> int:
    """The minute of the day of ``22:30``; 24:00 is the end of a day.  Raises ValueError."""
    found = _TIME.fullmatch(text.strip())
    minute = int(found[1]) * 60 + int(found[2]) if found is not None and int(found[2]) < 60 else -1
    if not 0 <= minute <= MINUTES_PER_DAY:
        raise ValueError('not a time of day: write hours and minutes, as in "22:30"')
    return minute % MINUTES_PER_DAY
