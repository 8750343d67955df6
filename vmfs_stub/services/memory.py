"""Memory of the daemon: how the C library is told to give back what a job used.

Buffers of megabytes are taken and given back by many threads.  Left alone, glibc keeps an arena per thread and the
high-water mark of each.
"""

from __future__ import annotations

import ctypes
import logging

_M_ARENA_MAX = -8
_ARENAS_MAX = 2
"""As many as cores that hash and compress at once; more only keep memory."""

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Bound the number of arenas; before threads are started.  Elsewhere than on glibc this does nothing."""
    if hasattr(_libc, "mallopt") and _libc.mallopt(_M_ARENA_MAX, _ARENAS_MAX) != 1:
        log.warning("the number of malloc arenas could not be bounded")


def give_back() -> None:
    """Return free memory to the system; after a job.  Takes milliseconds."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
