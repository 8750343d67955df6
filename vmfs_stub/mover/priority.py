"""What the mover's process has of the processor: what is left, or a small share while somebody waits for it.

A process that is only nice is not interrupted when a guest's request comes: it goes on until its slice of some
milliseconds is over.  One that has asked for long slices is, by whoever asks for shorter ones (Linux 6.12).  It is not
SCHED_IDLE: on a host whose guests use all processors such a process does not even die when it is killed, and keeps the
files that it has open.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress
from pathlib import Path

NICEST = 19
"""A guest's vCPU has 68 times as much of a processor that both want."""
NICE = 5
"""Three times as much."""
_LONGEST_SLICE_NS = 100_000_000
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""struct sched_attr: size, policy, flags, nice, priority, runtime (here the slice), deadline, period."""
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(os.uname().machine)
_libc = ctypes.CDLL(None, use_errno=True)


def yield_processor(pid: int) -> None:
    """Let all threads of a process give way to all others."""
    _set(pid, nice=NICEST, slice_ns=_LONGEST_SLICE_NS)


def share_processor(pid: int) -> None:
    """Let all threads of a process have a share, as whoever waits for them needs."""
    _set(pid, nice=NICE, slice_ns=0)


def _set(pid: int, *, nice: int, slice_ns: int) -> None:
    with suppress(OSError):  # it has gone, or this one may not; then it stays as it is
        _set_thread(pid, nice=nice, slice_ns=slice_ns)  # first: the threads that it starts from then on are like it
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                _set_thread(int(thread.name), nice=nice, slice_ns=slice_ns)


def _set_thread(number: int, *, nice: int, slice_ns: int) -> None:
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
    if _SYS_SCHED_SETATTR is None or _libc.syscall(_SYS_SCHED_SETATTR, number, attributes, 0) != 0:
        os.setpriority(os.PRIO_PROCESS, number, nice)
