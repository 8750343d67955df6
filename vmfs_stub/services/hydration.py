"""Hydration: bringing back the rest of a placeholder in the background, until it is an ordinary file again.

It starts when a guest's read had to recall something, or when an operator asks; it is noted in the durable map, so
that it goes on after a restart.  It stays below demand: before each step it waits while a guest waits for a recall.  It
stops where less than a floor of free space would stay on primary, which is kept for what guests write.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vmfs_stub.core.errors import InUse, NoSpace, PrimaryIOError, RecallsHeld, VmfsStubError
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_name import DiskName
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.single_error import single_error

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""How much one step brings back: one range read where the frames lie together."""
STEPS_AT_ONCE = 3
STEPS_AT_ONCE_FAR = 12
"""From a store across a network, of which each answer takes long, however much it can give at a time."""
STEPS_BESIDE_GUESTS = 1
"""So many while guests use their disks."""
RETRY_INTERVAL_S = 30.0
"""After an error, a hold or too little space, how long until the next try."""

PACE_LOOK_S = 1.0
"""How soon a limit of speed that was changed is seen by who waits for it."""


@dataclass(slots=True)
class Course:
    """One placeholder that is coming back as a whole; ``commanded`` by an operator, or in the background."""

    disk: Disk
    commanded: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Pace:
    """A limit of bytes per second that may change meanwhile; ``bytes_per_s_max`` of 0 is none."""

    def __init__(self, bytes_per_s_max: Callable[[], int]) -> None:
        self._bytes_per_s_max = bytes_per_s_max
        self._limit = bytes_per_s_max()
        self._began_s = trio.current_time()
        self._done = 0

    async def keep(self, count: int) -> None:
        """Wait until ``count`` more bytes are within the limit; a new limit counts from when it is first seen."""
        self._done += count
        while True:
            if self._limit != (limit := self._bytes_per_s_max()):
                self._limit, self._began_s, self._done = limit, trio.current_time(), 0
            left_s = self._began_s + self._done / limit - trio.current_time() if limit else 0.0
            if left_s <= 0:
                return
            await trio.sleep(min(left_s, PACE_LOOK_S))


class HydrationService:
    """Runs one course per placeholder.

    Attributes: ``enabled`` counts for what begins after it was changed, ``bytes_per_s_max`` and ``free_floor_percent``
    from the next step on, also of what is under way.
    """

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        files: FileCalls,
        disks: Disks,
        recall: RecallService,
        backing: Path,
        enabled: bool,
        bytes_per_s_max: int,
        free_floor_percent: float,
        steps_at_once: int,
    ) -> None:
        self._nursery = nursery
        self._files = files
        self._disks = disks
        self._recall = recall
        self._backing = backing
        self.enabled = enabled
        self.bytes_per_s_max = bytes_per_s_max
        self.free_floor_percent = free_floor_percent
        self._steps_at_once = steps_at_once
        self._courses: dict[int, Course] = {}

    def after_use(self, disk: Disk) -> None:
        """A guest's read of this disk had to recall something, or nothing of it is absent any more.

        Bring the rest back, too, if that is wanted; without a rest it becomes an ordinary file.
        """
        if self.enabled and disk.ino not in self._courses:
            self._start(disk)

    async def resume(self, path_fd: int) -> None:
        """Go on with a placeholder that was coming back when the daemon ended.  Raises as `Disks.keep`."""
        disk = await self._disks.keep(path_fd)
        try:
            if disk.placeholder is not None and disk.ino not in self._courses:
                self._start(disk)
        finally:
            await self._disks.let_go(disk)

    async def bring_back(self, path_fd: int, *, progress: Callable[[int], None]) -> None:
        """Make a placeholder an ordinary file, at full speed; ``progress`` gets bytes as they arrive.

        Raises NoSpace at once when it does not fit, RecallsHeld, StoreError, IntegrityError, PrimaryError.
        """
        with _translated(self._disks.name(path_fd)):
            await self._bring_back(path_fd, progress)

    async def _bring_back(self, path_fd: int, progress: Callable[[int], None]) -> None:
        disk = await self._disks.keep(path_fd)
        try:
            placeholder = disk.placeholder
            if placeholder is None:
                return
            if self._recall.held:
                raise RecallsHeld(f"{disk.label}: recalls are held for this datastore; `vmfs-stub unhold` allows them")
            self._check_space(disk, placeholder.absent_bytes())
            while (other := self._courses.get(disk.ino)) is not None:
                if not other.commanded:
                    other.scope.cancel()
                await other.ended.wait()
            course = self._courses[disk.ino] = Course(disk, commanded=True)
            try:
                await placeholder.set_hydrate()
                await self._hydrate(course, progress, Pace(lambda: 0))
            finally:
                self._courses.pop(disk.ino, None)
                course.ended.set()
        finally:
            await self._disks.let_go(disk)

    async def stop(self, ino: int) -> None:
        """End the background course of this inode, if there is one, and wait until it has let go.

        Raises InUse while an operator's recall of it runs.
        """
        course = self._courses.get(ino)
        if course is not None and course.commanded:
            raise InUse(f"{course.disk.label} is being recalled; try again when that is done")
        if course is not None:
            course.scope.cancel()
            await course.ended.wait()

    def is_hydrating(self, ino: int) -> bool:
        return ino in self._courses

    def _start(self, disk: Disk) -> None:
        course = self._courses[disk.ino] = Course(disk)
        disk.kept += 1
        self._nursery.start_soon(self._run, course)

    async def _run(self, course: Course) -> None:
        disk = course.disk
        try:
            with course.scope:
                if disk.placeholder is not None:
                    await disk.placeholder.set_hydrate()
                while not await self._try(course):  # noqa: ASYNC110 - nothing tells when space or the store is back
                    await trio.sleep(RETRY_INTERVAL_S)
        except Exception:
            log.exception("%s: hydration met a programming error", disk.label)
        finally:
            self._courses.pop(disk.ino, None)
            await self._disks.let_go(disk)
            course.ended.set()

    async def _try(self, course: Course) -> bool:
        """Whether the course is over; false when it should be tried again later."""
        try:
            await self._hydrate(course, lambda count: None, Pace(lambda: self.bytes_per_s_max))
        except (VmfsStubError, OSError) as exc:
            log.warning("%s: hydration pauses: %s", course.disk.label, exc)
            return False
        return True

    async def _hydrate(self, course: Course, progress: Callable[[int], None], pace: Pace) -> None:
        placeholder = course.disk.placeholder
        if placeholder is None:
            return
        self._recall.claims.use(placeholder.maps.record.vm_id)
        chunk = 0
        step = max(1, STEP_BYTES // placeholder.chunk_size)
        slots = trio.CapacityLimiter(self._steps_at_once)
        with single_error():
            async with trio.open_nursery() as nursery:
                while (found := placeholder.next_absent(chunk)) is not None and course.disk.has_name:
                    await self._recall.wait_quiet()
                    self._check_space(course.disk, STEP_BYTES)
                    chunk = found + step
                    size = step * placeholder.chunk_size
                    token = object()
                    beside_guests = self._recall.guests.is_recent
                    slots.total_tokens = STEPS_BESIDE_GUESTS if beside_guests else self._steps_at_once
                    await slots.acquire_on_behalf_of(token)
                    nursery.start_soon(self._step, placeholder, found * placeholder.chunk_size, size, slots, token)
                    progress(size)
                    await pace.keep(size)
        if placeholder.next_absent(0) is None and course.disk.has_name:
            await self._disks.graduate(course.disk)

    async def _step(
        self, placeholder: Placeholder, offset: int, size: int, slots: trio.CapacityLimiter, token: object
    ) -> None:
        try:
            while chunks := placeholder.absent_chunks(offset, size):
                if self._recall.held:
                    raise RecallsHeld(
                        f"{placeholder.label}: recalls are held for this datastore; `vmfs-stub unhold` allows them"
                    )
                await self._recall.recall_chunks(placeholder, chunks, demand=False)
        finally:
            slots.release_on_behalf_of(token)

    def _check_space(self, disk: Disk, needed_bytes: int) -> None:
        # statvfs of a mounted local filesystem does not wait for the disk.
        vfs = self._files.call("hydrate.space", os.statvfs, self._backing)
        floor = vfs.f_blocks * vfs.f_frsize * self.free_floor_percent / 100
        free = vfs.f_bavail * vfs.f_frsize
        if free - needed_bytes < floor:
            raise NoSpace(
                f"{disk.label}: {needed_bytes >> 20} MiB more would leave less than {self.free_floor_percent:g} % of "
                f"the backing filesystem free ({free >> 20} MiB are); make room, or lower [primary] free_floor_percent"
            )


@contextmanager
def _translated(name: DiskName) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{name}: it cannot be brought back: the backing filesystem is full") from exc
        raise PrimaryIOError(f"{name}: it cannot be brought back: {exc.strerror}") from exc
