"""Whether guests use their disks now: then what they do not wait for leaves them more room."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

RECENT_S = 1.0
"""A guest that has done nothing for so long has no stream of requests that could be slowed."""


class GuestActivity:
    """Told of every request for data of a guest; for all disks of a datastore together."""

    def __init__(self) -> None:
        self._last_s = -math.inf
        self.on_return: Callable[[], None] = lambda: None
        """Called when a guest reads or writes after a while in which none did."""

    def note(self) -> None:
        """A guest reads or writes."""
        was_recent, self._last_s = self.is_recent, trio.current_time()
        if not was_recent:
            self.on_return()

    def left(self) -> None:
        """No guest has a disk open any more."""
        self._last_s = -math.inf

    @property
    def is_recent(self) -> bool:
        """Whether any guest read or wrote just now."""
        return trio.current_time() - self._last_s < RECENT_S
