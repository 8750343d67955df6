"""How long guests waited for recalls, and how often in vain.  In memory, of this daemon; must not know who asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from vmfs_stub.core.errors import Refused

WAIT_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Upper bounds of the classes in which waits are counted; longer ones have a class of their own."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Waits by class: ``counts`` has one more than there are ``bounds_s``; ``sum_s`` is of all of them together."""

    bounds_s: Sequence[float]
    counts: Sequence[int]
    sum_s: float


class RecallWaits:
    """The waits of one datastore's guests; ``clock`` gives seconds that only grow.

    Attributes: ``failed`` counts waits that ended with an error; ``last_failed_s`` and ``last_served_s`` are when one
    last ended with and without, or something last arrived, by the clock.  What is refused was not tried, and counts for
    neither.
    """

    def __init__(self, *, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._counts = [0] * (len(WAIT_BOUNDS_S) + 1)
        self._sum_s = 0.0
        self.failed = 0
        self.last_failed_s: float | None = None
        self.last_served_s: float | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """A guest waits within the block; one that gives up before the end counts for nothing."""
        began_s = self._clock()
        try:
            yield
        except Refused:  # held, or elsewhere: others tell of that
            raise
        except Exception:
            self.failed += 1
            self.last_failed_s = self._add(began_s)
            raise
        self.last_served_s = self._add(began_s)

    def arrived(self) -> None:
        """Something came back from the store, whoever waited for it: recalls work."""
        self.last_served_s = self._clock()

    def failing_for_s(self) -> float | None:
        """How long ago a guest's wait last failed, if nothing has been recalled since; else None."""
        if self.last_failed_s is None or (self.last_served_s is not None and self.last_served_s >= self.last_failed_s):
            return None
        return self._clock() - self.last_failed_s

    def all(self) -> Waits:
        """All so far."""
        return Waits(WAIT_BOUNDS_S, tuple(self._counts), self._sum_s)

    def _add(self, began_s: float) -> float:
        now_s = self._clock()
        self._counts[bisect_left(WAIT_BOUNDS_S, now_s - began_s)] += 1
        self._sum_s += now_s - began_s
        return now_s
