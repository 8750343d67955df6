"""Memory of the daemon: how the C library and the interpreter are told what comes back and what stays.

Buffers of megabytes are taken and given back by many threads.  Left alone, glibc keeps an arena per thread and the
high-water mark of each.
"""

from __future__ import annotations

import ctypes
import gc
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


def settle() -> None:
    """What is there now stays, and is not looked at again for what nobody needs: that took tens of milliseconds.

    After everything is connected; nothing else runs meanwhile.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Return free memory to the system; after a job.  Takes milliseconds."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
