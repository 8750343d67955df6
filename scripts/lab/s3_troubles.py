"""The troubles of an S3 server that a seed decides: which requests meet what, and that all of it was met."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Collection
from typing import Final

from scripts.lab.failure import LabError
from scripts.lab.s3_proxy import NOTHING, Trouble

SHARE: Final = 0.15
"""Of the requests; enough for each operation to meet some, and rarely more tries in a row than a client makes."""
_FORGETS: Final = Trouble(forgets=True)
SLOW_SHARE: Final = 0.01
"""Of the requests: those that are kept until the client gives up take their time."""

MET: Final = (
    "answered 503",
    "answered 500",
    "lost",
    "forgotten PUT",
    "forgotten POST",
    "cut",
    "given up",
)
"""What clients must have met, in the words of the proxy (to delete is a POST); beside it "listed late", where
listings may lag."""


class SeededTroubles:
    """A plan for a proxy.  ``patience_s`` is the client's: requests are kept longer than that."""

    def __init__(self, seed: int, *, patience_s: float, slow_share: float = SLOW_SHARE) -> None:
        self._chance = random.Random(f"troubles {seed}")
        self._lock = threading.Lock()
        self._slow_share = slow_share
        held_s = 1.5 * patience_s
        self._quick = [
            Trouble(status=503),
            Trouble(status=500),
            Trouble(loses=True),
            _FORGETS,
            Trouble(cuts=True),
        ]
        self._slow = [Trouble(delay_s=held_s, loses=True), Trouble(holds_s=held_s, forgets=True)]

    def __call__(self, method: str, path: str) -> Trouble:
        """What this request meets."""
        with self._lock:
            if "list-type=2" in path and self._chance.random() < 0.3:
                return Trouble(lists_late=True)
            number = self._chance.random()
            if number < self._slow_share:
                return self._chance.choice(self._slow)
            if number < SHARE:
                return self._chance.choice(self._quick)
            # Once more of what is told from a put of somebody else by its content alone.
            return _FORGETS if method == "PUT" and number < 2 * SHARE else NOTHING


def expect_met(happened: Counter[str], wanted: Collection[str] = MET) -> None:
    """Raises LabError where some of it was never met, so that nothing is shown of it."""
    if missing := [kind for kind in wanted if not happened[kind]]:
        raise LabError(f"never met: {', '.join(missing)}; met: {dict(happened)}")
