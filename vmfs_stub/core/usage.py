"""How a VM was used: readings of counters, and samples, each of a span of time.

A *reading* is what the hypervisor and the mount say at one moment: counters that only grow, and begin anew when a guest
starts.  A *sample* is what two readings say of the time between them.  Samples of the same VM never overlap; where
there is none, nobody looked: that is a gap, and a gap is never taken for idleness.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class GuestState(Enum):
    """What a VM does, as far as anybody knows; `UNKNOWN` is never taken for `OFF`."""

    OFF = "off"
    SAVED = "saved"
    """Off, with its memory in a file of the hypervisor (managed save)."""
    RUNNING = "running"
    PAUSED = "paused"
    """It has its disks open, and does not run."""
    CRASHED = "crashed"
    UNKNOWN = "unknown"

    @property
    def is_off(self) -> bool:
        """Whether no process of a hypervisor has the VM's disks."""
        return self in (GuestState.OFF, GuestState.SAVED)


@dataclass(frozen=True, slots=True)
class Counters:
    """What a VM has used since it was started, or, of what the mount counts, since the daemon was.

    Bytes and requests are those of all its disks together.  None: nobody can tell.
    """

    cpu_s: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    requests: int | None = None
    network_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at ``at_s`` (seconds since the epoch); ``state_since_s`` is None when nobody knows."""

    at_s: float
    state: GuestState
    counters: Counters
    state_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """How a VM was used from ``start_s`` to ``end_s``; times in seconds since the epoch.

    ``off_s`` is for how long of it the VM is known to have been off, ``running_s`` for how long it ran or was paused;
    what is left is unknown.  The ``*_max`` are the highest mean of any reading's interval within: a sample that was
    made of shorter ones still knows of a busy one among them.  CPU in percent of one processor.  None: nobody could
    tell, which counts as use.
    """

    start_s: float
    end_s: float
    off_s: float
    running_s: float
    cpu_percent_max: float | None
    disk_bytes_per_s_max: float | None
    network_bytes_per_s_max: float | None
    cpu_s: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    requests: int = 0
    network_bytes: int = 0
