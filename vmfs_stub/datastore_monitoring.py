"""What is watched of a datastore over time, and when that is not as it should be.

Purpose: how old the newest restore points are, how primary fills up, how much placeholders save, looked at now and then
and after each job, so that whoever asks (`status`, a scrape) never waits for a disk.  It decides what is unhealthy by
the limits in [monitoring].
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import MonitoringConfig
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import Finding
from vmfs_stub.core.forecast import FreeSpace, seconds_until_full
from vmfs_stub.core.names import printable
from vmfs_stub.core.usage import HOUR_S
from vmfs_stub.datastore_listing import Listing, only_warned
from vmfs_stub.services.recall_waits import RecallWaits
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings

BACKUP_KINDS: Final = ("backup", "archive")
"""Jobs that make restore points."""
LOOK_INTERVAL_S: Final = 300.0
"""How often VMs are looked at when nothing is told of: they come and go by themselves."""
SPACE_INTERVAL_S: Final = 3600.0
"""How often free space is noted."""
SPACE_KEPT_S: Final = 7 * 86400.0
"""How much of the past tells when primary will be full."""
OTHERS: Final = "(others)"
"""As which VMs beyond the limit are shown together."""
RECALLS: Final = "recalls"
"""Subject of the finding that they fail."""


@dataclass(frozen=True, slots=True)
class VmAge:
    """A VM that exists; ``last_point_s`` is when its newest restore point was made, None where it has none."""

    name: str
    last_point_s: float | None


@dataclass(frozen=True, slots=True)
class Space:
    """Of the backing filesystem, in bytes."""

    free_bytes: int
    size_bytes: int


class Monitoring:
    """Looks at one datastore; ``backing_fd`` stays the caller's.  ``clock`` gives seconds since the epoch.

    Attributes: ``vms`` and ``saved_bytes`` are as of the last look.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        catalog: Catalog,
        threads: Threads,
        listing: Listing,
        jobs: Jobs,
        waits: RecallWaits,
        backing_fd: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._threads = threads
        self._listing = listing
        self._jobs = jobs
        self._waits = waits
        self._backing_fd = backing_fd
        self._clock = clock
        self._stirred = trio.Event()
        self._history: list[FreeSpace] = []
        self._earlier_backup_s: float | None = None
        self.vms: tuple[VmAge, ...] = ()
        self.saved_bytes = 0
        jobs.on_end = lambda info: self.stir()

    async def run(self) -> None:
        """Look now and then, for ever."""
        with only_warned("what was recorded of earlier days cannot be read"):
            self._history = await self._threads.files(self._catalog.free_space)
            self._earlier_backup_s = await self._threads.files(self._catalog.last_done, BACKUP_KINDS)
        while True:
            self._stirred = trio.Event()
            with only_warned("the datastore could not be looked at"):
                await self.look()
            with trio.move_on_after(LOOK_INTERVAL_S):
                await self._stirred.wait()

    def stir(self) -> None:
        """Something has changed: look soon."""
        self._stirred.set()

    async def look(self) -> None:
        """See how things are.  Raises PrimaryIOError, NoSpace."""
        scan = await self._listing.scan()
        points = await self._threads.files(self._catalog.points_seen)
        self.vms = tuple(VmAge(printable(vm.name), points.get(vm.id)) for vm in scan.vms)
        self.saved_bytes = await self._threads.files(self._listing.saved_bytes, scan.vms)
        await self._note_space()

    async def _note_space(self) -> None:
        now_s = self._clock()
        if self._history and 0 <= now_s - self._history[-1].at_s < SPACE_INTERVAL_S:
            return
        free_bytes, oldest_s = self.space().free_bytes, now_s - SPACE_KEPT_S
        kept = [each for each in self._history if oldest_s <= each.at_s < now_s]
        self._history = [*kept, FreeSpace(now_s, free_bytes)]

        def record() -> None:
            self._catalog.record_free_space(free_bytes, now=now_s, oldest=oldest_s)

        await self._threads.files(record)

    def space(self) -> Space:
        """Of the backing filesystem now; root's reserve counts as not free.  Raises OSError."""
        vfs = os.fstatvfs(self._backing_fd)
        return Space(vfs.f_bavail * vfs.f_frsize, vfs.f_blocks * vfs.f_frsize)

    def full_in_s(self) -> float | None:
        """How long until primary is full, if it goes on filling as it has; None where it does not, or nobody knows."""
        return seconds_until_full([*self._history, FreeSpace(self._clock(), self.space().free_bytes)])

    def last_backup_s(self) -> float | None:
        """When the last backup job was done; where no job is known of, when the newest restore point was made."""
        done = [self._jobs.last_done.get(kind) for kind in BACKUP_KINDS]
        known = [time_s for time_s in (*done, self._earlier_backup_s) if time_s is not None]
        if known:
            return max(known)
        return max((vm.last_point_s for vm in self.vms if vm.last_point_s is not None), default=None)

    def last_backup_age_s(self) -> float | None:
        """How long ago that was."""
        last_s = self.last_backup_s()
        return None if last_s is None else max(0.0, self._clock() - last_s)

    def point_ages_s(self) -> list[tuple[str, float]]:
        """How old the newest restore point of each VM is that has one; of VMs beyond the limit, the oldest of these."""
        now_s, ages = self._clock(), dict[str, float]()
        for vm in sorted(self.vms, key=lambda vm: vm.name):
            if vm.last_point_s is not None:
                name = vm.name if vm.name in ages or len(ages) < self._limits.vms_max else OTHERS
                ages[name] = max(ages.get(name, 0.0), now_s - vm.last_point_s)
        return list(ages.items())

    def oldest_point_age_s(self) -> float | None:
        """The largest of these ages."""
        return max((age_s for _, age_s in self.point_ages_s()), default=None)

    def vms_without_point(self) -> int:
        """How many VMs have never been backed up."""
        return sum(vm.last_point_s is None for vm in self.vms)

    def problems(self) -> Iterator[Finding]:
        """What is beyond its limit in [monitoring]."""
        for subject, message in (*self._backups_too_old(), *self._recalls_fail(), *self._nearly_full()):
            yield Finding(severity="problem", subject=subject, message=message)

    @property
    def _limits(self) -> MonitoringConfig:
        return self._settings.current.monitoring

    def _backups_too_old(self) -> Sequence[tuple[str, str]]:
        hours_max, age_s = self._limits.backup_age_max_hours, self.last_backup_age_s()
        if not hours_max or not self.vms:
            return ()
        limit = f"[monitoring] backup_age_max_hours allows {hours_max:g} h"
        if age_s is None:
            return [("backups", f"no backup job has been done yet, and {limit}; run `vmfs-stub backup`")]
        if age_s > hours_max * HOUR_S:
            told = f"the last backup job that was done ended {age_s / HOUR_S:.1f} h ago, and {limit}"
            return [("backups", f"{told}; see why with `vmfs-stub jobs`")]
        return ()

    def _recalls_fail(self) -> Sequence[tuple[str, str]]:
        hours, ago_s = self._limits.recall_failure_hours, self._waits.failing_for_s()
        if not hours or ago_s is None or ago_s > hours * HOUR_S:
            return ()
        told = f"a guest's read of what was absent failed {ago_s:.0f} s ago, and none has worked since"
        return [(RECALLS, f"{told}; see what is said of the store and of that disk here, and in the log")]

    def _nearly_full(self) -> Sequence[tuple[str, str]]:
        space, percent_min = self.space(), self._limits.free_percent_min
        percent = 100 * space.free_bytes / space.size_bytes if space.size_bytes else 100.0
        if percent >= percent_min:
            return ()
        told = f"{percent:.1f} % of the backing filesystem is free, less than [monitoring] free_percent_min"
        return [("primary", f"{told} ({percent_min:g} %); make room, or archive VMs")]
