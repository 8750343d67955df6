"""Which chunks of a file changed since its last restore point, so that a backup reads no others.

A file that nobody has written to since has a *record* (primary/changed_record.py), one that was written to has a *map*
(primary/changed_map.py), and most files have neither: all of them is read.  Invariants:
* before the first write the record is durably gone, so that after a power loss nobody believes it; a bit is set before
  the write that it speaks of is begun;
* what cannot be noted is forgotten, durably, before it is done; a write fails only if even that is impossible;
* a new restore point takes the place of the last only when it is committed: until then, and if the backup fails, what
  is known refers to the one before.  Nothing is ever merged.  While a file that may be open is backed up there are two
  maps, and every change goes into both: that since the last point goes on, that since the new one begins before the
  moment that is copied;
* what is found of a file that was changed by anybody else, or of which a sync failed, is not believed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from vmfs_stub.core.changed import BITS_SIZE_MAX, Changed, bits_size
from vmfs_stub.core.origin import Origin
from vmfs_stub.primary.changed_map import ChangedMap, ChangedState
from vmfs_stub.primary.changed_record import ChangedRecord, Seen, load_changed, save_changed
from vmfs_stub.primary.durable_map import NEW_SUFFIX
from vmfs_stub.primary.files import FileCalls, sync_directory, write_fully
from vmfs_stub.primary.identity import inode_identity
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.changes_left import DOUBT_SUFFIX, STOPPED, ChangesLeft, encode_stopped
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

TO_THE_END = 1 << 63
NEXT_SUFFIX = ".next"
"""Of a map that is of a restore point which is not committed: nothing to a start."""


class Changes:
    """What is known of the files of one datastore; ``left`` is what the start found.  Calls block."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        private: PrivateState,
        left: ChangesLeft,
        tracked_bytes_min: int,
    ) -> None:
        self.files = files
        self.threads = threads
        self.boot = private.boot
        self.tracked_bytes_min = tracked_bytes_min
        self.private = private
        self.known = left.known
        """Inode numbers of which something is known, or may be: all others need no look."""
        self.doubtful = left.doubtful
        """Of files of which a sync failed in this boot: what the page cache says of them may yet be taken back."""

    def open(self, fd: int, *, label: str) -> DiskChanges:
        """What is known of an open file, which messages call ``label``; what cannot be found out is not known."""
        ino = os.fstat(fd).st_ino
        found = DiskChanges(self, fd, ino, label)
        if ino in self.known:
            found.take_up()
        return found

    def has(self, ino: int) -> bool:
        """Whether something is, or may be, known of this file.  Does not block."""
        return ino in self.known or ino in self.doubtful

    def forget(self, ino: int) -> None:
        """Know nothing of this file any more, durably.  Raises OSError."""
        map_path = self.private.changed_map_path(ino)
        for path in (map_path, map_path.with_name(f"{ino}{NEW_SUFFIX}"), self.private.changed_record_path(ino)):
            self.files.call("changes.forget", path.unlink, missing_ok=True)
        self.sync()
        self.known.discard(ino)

    def sync(self) -> None:
        """Make durable which records are there.  Raises OSError."""
        self.files.call("changes.sync", sync_directory, self.private.changes)

    def removed(self, ino: int) -> None:
        """The file is gone; what is left of it would only take space, or be taken for another's of that number."""
        self.doubtful.discard(ino)
        if ino not in self.known:
            return
        try:
            for path in (self.private.changed_map_path(ino), self.private.changed_record_path(ino)):
                self.files.call("changes.removed", path.unlink, missing_ok=True)
            self.known.discard(ino)
        except OSError as exc:
            log.warning("what was known of a file that is gone stays until the next start: %s", exc)

    def doubt(self, ino: int) -> None:
        """A sync of this file failed: nothing that is read of it in this boot is a base for what comes later."""
        self.doubtful.add(ino)
        try:
            path = self.private.changed_map_path(ino).with_suffix(DOUBT_SUFFIX)
            with self._made("changes.doubt", path) as fd:
                self.files.call("changes.doubt", write_fully, fd, self.boot.boot_id.encode(), 0)
        except OSError as exc:
            log.warning("that a sync failed is known to this daemon only, and not to the next one: %s", exc.strerror)

    def stop(self) -> None:
        """At a clean end, when no file is open: what the maps say becomes records, and the time is noted."""
        for ino in sorted(self.known):
            try:
                self._lay_down(ino)
            except OSError as exc:
                log.warning("what changed in inode %d is known until the next reboot only: %s", ino, exc)
        try:
            with self._made("changes.stop", self.private.changes / STOPPED) as fd:
                self.files.call("changes.stop", os.utime, fd)  # now, by the clock that files have their times of
                self.files.call("changes.stop", write_fully, fd, encode_stopped(os.fstat(fd).st_ctime_ns), 0)
        except OSError as exc:
            log.warning("the time of this end could not be noted: %s", exc.strerror)

    @contextmanager
    def _made(self, site: str, path: Path) -> Iterator[int]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self.files.call(site, os.open, path, flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _lay_down(self, ino: int) -> None:
        live = ChangedMap.open(self.files, self.private.changed_map_path(ino), boot=self.boot)
        if live is None:
            return
        try:
            seen = live.seen
            if seen is None:
                return
            record = ChangedRecord(live.identity, seen, live.changed())
            save_changed(self.files, self.private.changed_record_path(ino), record)
        finally:
            live.close()
        self.files.call("changes.stop", self.private.changed_map_path(ino).unlink)


class DiskChanges:
    """What is known of one open file.  ``changing`` and ``begin`` come before every change of its bytes."""

    def __init__(self, changes: Changes, fd: int, ino: int, label: str) -> None:
        self._changes = changes
        self._fd = fd
        self._ino = ino
        self._record_path = changes.private.changed_record_path(ino)
        self._map_path = changes.private.changed_map_path(ino)
        self._label = label
        self._record: ChangedRecord | None = None
        self._live: ChangedMap | None = None
        self._next: ChangedMap | None = None
        """What changes since a moment of which there is no restore point yet."""
        self._is_wrong = False
        """Something is there that is not to be believed, and has to go before the file is written to."""
        self._is_exact = False
        """Nobody has even changed its owner or names since it was seen."""
        self._beginning = trio.Lock()
        self.moves_times = False
        """The daemon itself changes the file's times, as it does those of a placeholder; set by who knows."""

    def take_up(self) -> None:
        """Look at what is there."""
        try:
            self._look()
        except OSError as exc:
            log.warning("%s: what changed since its last backup cannot be read: %s", self._label, exc.strerror)
            self._is_wrong = True

    def _look(self) -> None:
        changes, st = self._changes, os.fstat(self._fd)
        record = load_changed(changes.files, self._record_path)
        live = None
        if record is None:
            live = ChangedMap.open(changes.files, self._map_path, boot=changes.boot)
        try:
            found = record or live
            seen = record.seen if record is not None else live.seen if live is not None else None
            is_counted = record is not None or (live is not None and live.state >= ChangedState.MARKED)
            self._is_wrong = (
                found is None
                or not is_counted
                or found.identity != inode_identity(self._fd)
                or (seen is not None and not seen.is_content_of(st))
            )
            self._is_exact = seen is not None and seen.is_all_of(st)
            if not self._is_wrong:
                self._record, self._live, live = record, live, None
        finally:
            if live is not None:
                live.close()

    # Before a change

    def changing(self, offset: int, length: int) -> bool:
        """Note that these bytes are about to change; false when that takes `begin`.  Does not block."""
        if self._next is not None:
            try:
                self._next.set_changed(offset, length)
            except OSError as exc:
                log.warning(
                    "%s: changes cannot be noted: %s; its next backup reads more than it must", self._label, exc
                )
                self.unfollow()
        live = self._live
        if live is None:
            return self._record is None and not self._is_wrong
        try:
            if live.state is not ChangedState.MARKED:
                live.mark()
            live.set_changed(offset, length)
        except OSError as exc:
            log.warning("%s: changes cannot be noted: %s; its next backup reads all of it", self._label, exc)
            self._drop_live()
            return False
        return True

    def changing_from(self, offset: int) -> bool:
        """The same, of all from ``offset`` on."""
        return self.changing(offset, TO_THE_END)

    async def begin(self) -> None:
        """The first change since the last backup: see that no record is left to tell of the file as it was.

        Raises OSError when not even that is possible: then nothing may be changed.
        """
        async with self._beginning:
            await self._changes.threads.files(self._begin)

    def _begin(self) -> None:
        changes, record = self._changes, self._record
        if record is not None and not self._is_wrong:
            live = self._made_live(record)
            if live is not None:
                try:
                    changes.files.call("changes.forget", self._record_path.unlink, missing_ok=True)
                    changes.sync()
                except BaseException:
                    live.close()
                    raise
                live.mark()
                self._live, self._record = live, None
                return
        if self._record is not None or self._is_wrong:
            self._is_wrong = True
            changes.forget(self._ino)
            self._record, self._is_wrong = None, False

    def _made_live(self, record: ChangedRecord) -> ChangedMap | None:
        changes = self._changes
        try:
            return ChangedMap.create(
                changes.files,
                self._map_path,
                identity=record.identity,
                boot=changes.boot,
                changed=record.changed,
            )
        except OSError as exc:
            log.warning("%s: changes cannot be noted: %s; its next backup reads all of it", self._label, exc)
            return None

    def _drop_live(self) -> None:
        if self._live is not None:
            self._live.make_void()
            self._live.close()
            self._live, self._is_wrong = None, True

    # For a backup, while guests may have the file open

    async def follow(self, origin: Origin) -> None:
        """From now on note also what changes since a restore point that is to be; `replace` or `unfollow` ends it.

        The moment that is copied comes after this.  Raises OSError when the record cannot be removed.
        """
        async with self._beginning:
            if self._record is not None or self._is_wrong:
                await self._changes.threads.files(self._begin)
            await self._changes.threads.files(self._follow, origin)

    def _follow(self, origin: Origin) -> None:
        self.unfollow()
        if not self._is_worth_it(origin):
            return
        changes = self._changes
        try:
            self._next = ChangedMap.create(
                changes.files,
                self._next_path,
                identity=inode_identity(self._fd),
                boot=changes.boot,
                changed=Changed.nothing(origin),
            )
        except OSError as exc:
            log.warning("%s: changes cannot be noted: %s; its next backup reads more than it must", self._label, exc)

    @property
    def _next_path(self) -> Path:
        return self._map_path.with_name(f"{self._ino}{NEXT_SUFFIX}")

    def unfollow(self) -> None:
        """There will be no such restore point.  Does not block for long: the map is in memory."""
        coming, self._next = self._next, None
        if coming is None:
            return
        try:
            # First in the map itself, whatever it is called by now.
            self._changes.files.call("changes.unfollow", coming.make_void)
            self._changes.files.call("changes.unfollow", self._next_path.unlink, missing_ok=True)
        except OSError as exc:
            log.warning("%s: a map of changes that nobody needs stays until the next start: %s", self._label, exc)
        finally:
            coming.close()

    async def replace(self) -> None:
        """The restore point that was followed is committed.  What fails is logged, and what was known stays."""
        async with self._beginning:
            coming = self._next
            if coming is None or self.is_doubtful:
                self.unfollow()
                return
            self._changes.known.add(self._ino)
            coming.mark()
            try:
                await self._changes.threads.files(
                    self._changes.files.call, "changes.replace", os.rename, self._next_path, self._map_path
                )
            except OSError as exc:
                log.warning("%s: its next backup reads more than it must: %s", self._label, exc)
                self.unfollow()
                return
            if self._next is not coming:
                # A change could not be noted in it meanwhile: it is void, and has taken the place of the other.
                self._drop_live()
                self._is_wrong = True
                return
            # Until here every change was noted in both.
            before, self._live, self._next = self._live, coming, None
            self._is_wrong = self._is_exact = False
            if before is not None:
                before.close()

    # For a backup, while nobody has the file open

    @property
    def is_doubtful(self) -> bool:
        """Whether a sync of the file failed in this boot: what is read of it need not be on the disk, ever."""
        return self._ino in self._changes.doubtful

    def since_last_point(self, *, exact: bool) -> Changed | None:
        """What may have changed, and since which restore point; None when that is not known.

        ``exact`` is for those who delete what they copied: nobody may have touched the file but the daemon, as far as
        can be told.  Blocking.  Raises OSError.
        """
        if self.is_doubtful or (exact and not self._is_exact):
            return None
        if self._record is not None:
            return self._record.changed
        return None if self._live is None else self._live.changed()

    def rebase(self, origin: Origin, st: os.stat_result) -> None:
        """All of the file as ``st`` says it was when it was copied is in this restore point, which is committed.

        Blocking.  What fails is logged: then the next backup reads everything.
        """
        changes = self._changes
        try:
            if not self._is_worth_it(origin) or self.is_doubtful:
                self.forget()
                return
            record = ChangedRecord(inode_identity(self._fd), Seen.of(st), Changed.nothing(origin))
            changes.known.add(self._ino)
            save_changed(changes.files, self._record_path, record)
            self._drop_live()
            self._record, self._is_wrong, self._is_exact = record, False, True
            changes.files.call("changes.rebase", self._map_path.unlink, missing_ok=True)
        except OSError as exc:
            log.warning("%s: its next backup reads more than it must: %s", self._label, exc)
            # The record may be there all the same: nobody writes to the file before it is gone.
            self._drop_live()
            self._record, self._is_wrong = None, True

    def _is_worth_it(self, origin: Origin) -> bool:
        is_large = max(1, self._changes.tracked_bytes_min) <= origin.size
        return is_large and bits_size(origin) <= BITS_SIZE_MAX

    def forget(self) -> None:
        """Know nothing any more, durably.  Blocking.  Raises OSError: then nothing may be changed until it works."""
        if self._ino not in self._changes.known:
            return
        self._drop_live()
        self._record, self._is_wrong = None, True
        self._changes.forget(self._ino)
        self._is_wrong = False

    async def forget_in_turn(self) -> None:
        """As `forget`, off the event loop, and not while somebody begins to write.  Raises OSError."""
        async with self._beginning:
            if self._ino in self._changes.known:
                self._drop_live()
                self._record, self._is_wrong = None, True
                await self._changes.threads.files(self._changes.forget, self._ino)
                self._is_wrong = False

    async def doubt(self) -> None:
        """A sync of the file failed; what cannot be noted of that is logged."""
        with trio.CancelScope(shield=True):
            async with self._beginning:
                self._drop_live()
                self._is_wrong = self._ino in self._changes.known
                await self._changes.threads.files(self._doubt)

    def _doubt(self) -> None:
        self._changes.doubt(self._ino)
        try:
            self._begin()
        except OSError as exc:
            log.warning("%s: what was known of it cannot be removed yet: %s", self._label, exc)

    # At the end

    def has_to_close(self, *, is_gone: bool) -> bool:
        """Whether `close` has anything to do.  Does not block."""
        has_moved = self.moves_times and self._record is not None
        return self._live is not None or has_moved or (is_gone and self._changes.has(self._ino))

    def close(self, *, is_gone: bool) -> None:
        """The file is about to be closed; ``is_gone`` when it has no name any more.  Blocking; never raises."""
        changes, live = self._changes, self._live
        self.unfollow()
        self._live = None
        try:
            if live is not None:
                if live.state is ChangedState.MARKED or (live.state is ChangedState.LEFT and self.moves_times):
                    live.leave(Seen.of(os.fstat(self._fd)))
                live.close()
            if is_gone:
                changes.removed(self._ino)
            elif self.moves_times and self._record is not None:
                self._see_again(self._record)
        except OSError as exc:
            log.warning("%s: its next backup reads more than it must: %s", self._label, exc)

    def _see_again(self, record: ChangedRecord) -> None:
        seen = Seen.of(os.fstat(self._fd))
        if seen != record.seen:
            again = ChangedRecord(record.identity, seen, record.changed)
            save_changed(self._changes.files, self._record_path, again)

    def drop(self) -> None:
        """The daemon was killed: what the kernel does."""
        for each in (self._live, self._next):
            if each is not None:
                each.close()
        self._live = self._next = None
