"""A limit of bytes per second, for work that is to leave room for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Rate:
    """At most so many bytes per second, by all threads together; 0 is no limit.  ``sleep`` gets seconds."""

    def __init__(
        self,
        bytes_per_s_max: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s_max = bytes_per_s_max
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_s = 0.0
        self.bytes = 0

    def take(self, count: int) -> None:
        """Wait until ``count`` more bytes may be read."""
        with self._lock:
            self.bytes += count
            if not self._bytes_per_s_max:
                return
            now = self._clock()
            wait_s = max(0.0, self._free_s - now)
            self._free_s = now + wait_s + count / self._bytes_per_s_max
        if wait_s:
            self._sleep(wait_s)
