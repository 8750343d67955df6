"""Start-up: what earlier daemons left of what changed since the last backups, and whether it is still to be believed.

It is, when the file is as it was seen: nobody wrote to it behind the mount while no daemon ran.  Size and modification
time must be the same, and the change time, too, which nobody can set; only what an earlier daemon saw of changes of
owner or names (up to its clean end, of which `STOPPED` has the time) is no doubt.  A map without a time is one of a
file that was open when the daemon was killed: of that, no one can tell.  What is not believed is removed, durably.
Blocking; runs before the first open is answered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from vmfs_stub.core.sites import FileCalls
from vmfs_stub.primary.changed_map import ChangedMap
from vmfs_stub.primary.changed_record import load_changed
from vmfs_stub.primary.files import read_fully, sync_directory
from vmfs_stub.primary.placeholder import PrivateState

log = logging.getLogger(__name__)

STOPPED = "stopped"
"""File beside the records, made at every clean end: what happened to a file before was done through the mount.

It says when that was, in nanoseconds since the epoch by the filesystem's clock.  Its own times do not: a change of
owner, or a copy of the directory, moves them.
"""
_STOPPED_SIZE = 21
"""Bytes: 20 digits and a line feed."""
DOUBT_SUFFIX = ".doubt"
_BOOT_ID_SIZE = 32


def encode_stopped(time_ns: int) -> bytes:
    """The content of `STOPPED`."""
    return b"%020d\n" % time_ns


def _decode_stopped(text: bytes) -> int:
    # A power loss may have cut it short, or left none of its bytes: then no time is known.
    is_whole = len(text) == _STOPPED_SIZE and text[:-1].isdigit() and text.endswith(b"\n")
    return int(text) if is_whole else 0


class ChangesLeft:
    """Looks at what is left; after `finish`, ``known`` and ``doubtful`` are the inode numbers that have something."""

    def __init__(self, files: FileCalls, private: PrivateState) -> None:
        """Raises OSError."""
        self._files = files
        self._private = private
        self._records: set[int] = set()
        self._maps: set[int] = set()
        """Inodes that have one of these, and were not looked at yet."""
        self.known: set[int] = set()
        self.doubtful: set[int] = set()
        self._stopped_ns = self._time_of_clean_end()
        for directory, unseen in ((private.changes, self._records), (private.volatile_changes, self._maps)):
            for name in files.call("changes.list", os.listdir, directory):
                if name.isdecimal():
                    unseen.add(int(name))
                else:
                    self._sort(directory / name)

    def _time_of_clean_end(self) -> int:
        try:
            text = self._read_small(self._private.changes / STOPPED, _STOPPED_SIZE + 1)
        except FileNotFoundError:
            return 0
        except OSError as exc:
            log.warning("when the last daemon ended cannot be read: %s", exc.strerror)
            return 0
        return _decode_stopped(text)

    def _sort(self, path: Path) -> None:
        if path.suffix == DOUBT_SUFFIX and path.stem.isdecimal() and self._is_of_this_boot(path):
            self.doubtful.add(int(path.stem))
        elif path.name != STOPPED:
            self._files.call("changes.clean", path.unlink)

    def _is_of_this_boot(self, path: Path) -> bool:
        found = self._read_small(path, _BOOT_ID_SIZE)
        # One that was cut short may be of this boot: only another whole id is certain not to be.
        return len(found) < _BOOT_ID_SIZE or found == self._private.boot.boot_id.encode()

    def _read_small(self, path: Path, size: int) -> bytes:
        fd = self._files.call("changes.open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return read_fully(self._files, "changes.read", fd, size, 0)
        finally:
            os.close(fd)

    def look_at(self, st: os.stat_result) -> None:
        """This file is there.  Raises OSError when what is not to be believed cannot be removed."""
        ino, private = st.st_ino, self._private
        if ino in self._records:
            self._records.discard(ino)
            self._look_into(private.changed_record_path(ino), st, self._is_record_true)
        if ino in self._maps:
            self._maps.discard(ino)
            self._look_into(private.changed_map_path(ino), st, self._is_map_true)

    def _look_into(self, path: Path, st: os.stat_result, is_true: Callable[[Path, os.stat_result], bool]) -> None:
        try:
            is_believed = is_true(path, st)
        except OSError as exc:
            log.warning("%s cannot be read: %s; the next backup of its file reads all of it", path, exc.strerror)
            is_believed = False
        if is_believed:
            self.known.add(st.st_ino)
        else:
            self._remove(path)

    def _is_record_true(self, path: Path, st: os.stat_result) -> bool:
        record = load_changed(self._files, path)
        return record is not None and record.seen.is_left_as(st, until_ns=self._stopped_ns)

    def _is_map_true(self, path: Path, st: os.stat_result) -> bool:
        found = ChangedMap.open(self._files, path, boot=self._private.boot)
        if found is None:
            return False
        seen = found.seen
        found.close()
        return seen is None or seen.is_all_of(st)

    def _remove(self, path: Path) -> None:
        self._files.call("changes.clean", path.unlink, missing_ok=True)

    def finish(self) -> None:
        """All files were looked at: what belongs to none goes.  Raises OSError."""
        for ino in sorted(self._records):
            self._remove(self._private.changed_record_path(ino))
        for ino in sorted(self._maps):
            self._remove(self._private.changed_map_path(ino))
        # Also what an earlier daemon removed, which may have been killed before it could see to that.
        self._files.call("changes.clean_sync", sync_directory, self._private.changes)
