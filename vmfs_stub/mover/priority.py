"""What the mover's process has of the processor: what is left, or its share while somebody waits for it.

A process that is only nice goes on for milliseconds when a guest's request comes; SCHED_IDLE gives way at once.  On a
host whose guests use all processors it may not run for long, and that must not be what a guest waits for.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def yield_processor(pid: int) -> None:
    """Let all threads of a process run only when no other wants the processor."""
    _set_policy(pid, os.SCHED_IDLE)


def share_processor(pid: int) -> None:
    """Let all threads of a process run as others do, as nice as they are."""
    _set_policy(pid, os.SCHED_OTHER)


def _set_policy(pid: int, policy: int) -> None:
    with suppress(OSError):  # it has gone, or this one may not; then it stays as it is
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
