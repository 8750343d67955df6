"""What hypervisors do with the disks, as the mount sees it.

Who is a hypervisor is decided when a disk is opened, by the executable that opens it: indexers, backup tools and `cp`
read disks, too, and that is no use of a VM.  Of an opener whose executable cannot be told (one of another pid
namespace) it is not known what it is: while it has the disk open, it is not known whether the VM runs.

Counting costs a request two additions.  Everything is done on the event loop; what `look` returns may go anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import Counters, GuestState, Reading
from vmfs_stub.services.disk import Caller

_DELETED: Final = " (deleted)"
"""What the kernel appends to the name of an executable that was replaced, as by an upgrade, while it runs."""


@dataclass(slots=True, eq=False)
class IoCount:
    """What was done with one or more handles."""

    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DiskLook:
    """What the mount has seen of a disk until now; counters since the daemon started, times since the epoch.

    ``state`` is RUNNING while a hypervisor has it open, UNKNOWN while somebody has it of whom it is not known;
    ``since_s`` is when that last changed, None when it has not since the daemon started.
    """

    state: GuestState
    since_s: float | None
    requests: int
    read_bytes: int
    written_bytes: int
    last_open_s: float | None
    last_io_s: float | None


@dataclass(slots=True, eq=False)
class _DiskUse:
    counted: IoCount = field(default_factory=IoCount)
    """Of hypervisors' handles, all together."""
    unknown: IoCount = field(default_factory=IoCount)
    open_count: int = 0
    unknown_count: int = 0
    since_s: float | None = None
    last_open_s: float | None = None
    last_io_s: float | None = None
    requests_seen: int = 0

    @property
    def state(self) -> GuestState:
        if self.open_count:
            return GuestState.RUNNING
        return GuestState.UNKNOWN if self.unknown_count else GuestState.OFF

    def see_io(self, now_s: float) -> None:
        if self.counted.requests != self.requests_seen:
            self.requests_seen = self.counted.requests
            self.last_io_s = now_s


class MountUsage:
    """Told by the mount of opens and closes, by inode; ``hypervisors`` are patterns of names of executables."""

    def __init__(self, hypervisors: Sequence[str], *, clock: Callable[[], float] = time.time) -> None:
        self._patterns = tuple(hypervisors)
        self._clock = clock
        self._disks: dict[int, _DiskUse] = {}
        self._ignored = IoCount()

    def is_hypervisor(self, executable: str) -> bool:
        """Whether who runs the executable of this path runs VMs."""
        name = executable.removesuffix(_DELETED).rpartition("/")[2]
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def opened(self, ino: int, caller: Caller) -> IoCount:
        """Somebody opened a disk: where to count what is done with that handle, and what `closed` wants back."""
        if caller.executable is not None and not self.is_hypervisor(caller.executable):
            return self._ignored
        disk, now_s = self._disks.setdefault(ino, _DiskUse()), self._clock()
        before = disk.state
        if caller.executable is None:
            disk.unknown_count += 1
        else:
            disk.open_count += 1
            disk.last_open_s = now_s
        if disk.state is not before:
            disk.since_s = now_s
        return disk.unknown if caller.executable is None else disk.counted

    def closed(self, ino: int, use: IoCount) -> None:
        """A handle was closed that `opened` had given ``use`` for."""
        disk = self._disks.get(ino)
        if disk is None or use not in (disk.counted, disk.unknown):
            return
        before, now_s = disk.state, self._clock()
        if use is disk.counted:
            disk.open_count -= 1
            disk.see_io(now_s)
        else:
            disk.unknown_count -= 1
        if disk.state is not before:
            disk.since_s = now_s

    def look(self) -> dict[int, DiskLook]:
        """What is known of every disk that was open since the daemon started, by inode.

        The last use of a disk that is open is known as exactly as this is called often.
        """
        found, now_s = {}, self._clock()
        for ino, disk in self._disks.items():
            disk.see_io(now_s)
            count = disk.counted
            found[ino] = DiskLook(
                state=disk.state,
                since_s=disk.since_s,
                requests=count.requests,
                read_bytes=count.read_bytes,
                written_bytes=count.written_bytes,
                last_open_s=disk.last_open_s,
                last_io_s=disk.last_io_s,
            )
        return found

    def forget(self, inos: Iterable[int]) -> None:
        """Disks that are no VM's any more; those that are open stay."""
        for ino in inos:
            disk = self._disks.get(ino)
            if disk is not None and disk.state is GuestState.OFF:
                del self._disks[ino]


def mount_reading(disks: Sequence[DiskLook], *, at_s: float) -> Reading:
    """What the mount says of a VM whose disks these are, of which nobody need have opened any."""
    states = {disk.state for disk in disks}
    known = [state for state in (GuestState.RUNNING, GuestState.UNKNOWN) if state in states]
    state = known[0] if known else GuestState.OFF
    since = [disk.since_s for disk in disks if disk.state is state and disk.since_s is not None]
    since_s = (min if state is GuestState.RUNNING else max)(since, default=None)
    counters = Counters(
        read_bytes=sum(disk.read_bytes for disk in disks),
        written_bytes=sum(disk.written_bytes for disk in disks),
        requests=sum(disk.requests for disk in disks),
    )
    return Reading(at_s, state, counters, since_s)


def latest(times: Iterable[float | None]) -> float | None:
    """The latest of those that are known."""
    return max((each for each in times if each is not None), default=None)


def looks_by_vm(looks: Mapping[int, DiskLook], owners: Mapping[int, VmId]) -> dict[VmId, list[DiskLook]]:
    """The looks at each VM's disks; ``owners`` says whose an inode is."""
    found: dict[VmId, list[DiskLook]] = {}
    for ino, look in looks.items():
        owner = owners.get(ino)
        if owner is not None:
            found.setdefault(owner, []).append(look)
    return found
