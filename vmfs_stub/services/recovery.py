"""Start-up: look at every placeholder and every map, finish or undo what a crash left, and say what was found.

| record on the file | durable map        | what it means                   | what is done                    |
|--------------------|--------------------|---------------------------------|---------------------------------|
| names the map      | prepared           | crash after the commit point    | committed; punch                |
| names the map      | committed          | crash while punching            | punch                           |
| names the map      | punched            | a placeholder                   | nothing (hydrate if it was)     |
| names the map      | graduating         | crash before the record went    | graduates                       |
| names the map      | removed            | the unlink did not happen       | committed; punch                |
| names no map       |                    | the map is lost or damaged      | finding; the file gives errors  |
| another inode's    |                    | a copy of a placeholder         | finding; the file gives errors  |
| none               | prepared           | crash before the commit point   | map and pin removed             |
| none               | graduating         | crash after the record went     | map and pin removed             |
| none               | removed, no inode  | the unlink happened             | map and pin removed             |
| none               | superseded         | archived again, then graduated  | map and pin removed             |
| names another map  | any                | archived again, cut short       | old map and pin removed         |
| cannot be read     | any                | not known                       | finding; the file gives errors  |
| none, file there   | any other          | the record is lost              | finding; the file gives errors  |
| no such file       | committed, punched | removed behind the mount        | finding; map, pin, point stay   |
| perhaps not seen   | any                | a directory could not be read   | finding for it; map, pin stay   |

What an adoption has left in its folder is removed, and is never looked at: its maps are of a crash before the commit
point.
Nothing here reads the store.  Blocking; runs before the first open is answered.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError, RecordMissing, VmfsStubError
from vmfs_stub.core.ids import PlaceholderId
from vmfs_stub.core.names import PRIVATE_DIR
from vmfs_stub.primary.durable_map import MAP_SUFFIX, NEW_SUFFIX, DurableMap, MapHeader, MapState
from vmfs_stub.primary.files import FileCalls, read_ahead, sync_filesystem
from vmfs_stub.primary.identity import inode_generation, inode_identity
from vmfs_stub.primary.placeholder import PrivateState, live_guest_mtime_ns, open_durable
from vmfs_stub.primary.record import PlaceholderRecord, check_identity, read_record
from vmfs_stub.primary.tree import Entry, open_beneath, proc_path, reopen, walk
from vmfs_stub.services.changes_left import ChangesLeft
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.placeholder_ender import Ended
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovered:
    """What start-up found: paths (relative to the backing directory) to go on with, and placeholders that ended.

    ``changes`` is what is known of what changed since the last backups.
    """

    changes: ChangesLeft
    punch: list[str] = field(default_factory=list)
    graduate: list[str] = field(default_factory=list)
    hydrate: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    findings: list[tuple[str, VmfsStubError]] = field(default_factory=list)


class Recovery:
    """One pass over a datastore; fills ``placeholders``."""

    def __init__(
        self, *, files: FileCalls, backing: Path, private: PrivateState, placeholders: PlaceholderIndex
    ) -> None:
        self._files = files
        self._backing = backing
        self._private = private
        self._placeholders = placeholders
        self._changes = ChangesLeft(files, private)
        self._result = Recovered(self._changes)
        self._matched: set[PlaceholderId] = set()
        self._settled: set[int] = set()
        """Inodes whose record and map fit; any other map of theirs is of an archive before, or of one that failed."""
        self._unclear: set[int] = set()
        """Inodes of which it is not known what they are; no map of theirs is removed."""
        self._inodes: dict[int, str] = {}
        """Every regular file found, by inode number."""
        self._synced = False
        self._saw_all = True
        """False when something could not be looked into: what was not found may be there."""

    def run(self) -> Recovered:
        """Look at everything once.  Raises OSError when the backing directory itself cannot be read."""
        self._sweep_orphans()
        self._sweep_adopting()
        self._sweep_frozen()
        self._remove_unfinished()
        for directory in (self._private.changes, self._private.maps):
            self._read_ahead(directory)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        backing_fd = self._files.call("recovery.open", os.open, self._backing, flags)
        try:
            entries = walk(backing_fd, self._not_seen, files=self._files, site="recovery.walk", skipped=PRIVATE_DIR)
            with closing(entries):
                for entry in entries:
                    if stat.S_ISREG(entry.st.st_mode):
                        self._inodes[entry.st.st_ino] = entry.path
                        self._changes.look_at(entry.st)
                        self._look_at_file(entry)
            self._changes.finish()
            for name in self._names(self._private.maps, MAP_SUFFIX):
                placeholder_id = PlaceholderId(name.removesuffix(MAP_SUFFIX))
                if placeholder_id not in self._matched:
                    try:
                        self._look_at_lone_map(placeholder_id, backing_fd)
                    except (VmfsStubError, OSError) as exc:
                        self._result.findings.append((f"map {placeholder_id}", _as_ours(name, exc)))
        finally:
            os.close(backing_fd)
        return self._result

    def _remove_unfinished(self) -> None:
        """Maps that never got their name mean nothing; one that cannot be removed is in nobody's way."""
        for directory in (self._private.maps, self._private.volatile_maps):
            for name in self._names(directory, NEW_SUFFIX):
                try:
                    self._files.call("recovery.clean", (directory / name).unlink)
                except OSError as exc:
                    log.warning("%s, left by a crash, could not be removed: %s", directory / name, exc.strerror)

    def _read_ahead(self, directory: Path) -> None:
        """Have the disk read these many small files while they are looked at, not one after the other."""
        for name in self._names(directory):
            with suppress(OSError):
                self._files.call("recovery.read_ahead", read_ahead, directory / name)

    def _names(self, directory: Path, suffix: str = "") -> list[str]:
        names = self._files.call("recovery.list", os.listdir, directory)
        return sorted(name for name in names if name.endswith(suffix))

    def _sweep_orphans(self) -> None:
        """Nobody has a file open when a mount begins: those without a name go for good."""
        try:
            if count := self._private.orphans.sweep(self._files):
                log.info("%d files that had lost their last name while open are gone now", count)
        except OSError as exc:
            log.warning("files without a name could not be removed, and keep their space: %s", exc)

    def _sweep_adopting(self) -> None:
        """What was moved out of there to its place stays: the start has synced the backing directory by now."""
        for name in self._names(self._private.adopting):
            try:
                self._files.call("recovery.clean_adopting", shutil.rmtree, self._private.adopting / name)
            except OSError as exc:
                log.warning("what an adoption left in %s could not be removed: %s", self._private.adopting, exc)

    def _sweep_frozen(self) -> None:
        """A backup that was cut short, of a VM that was in use, may have left an empty file without a use."""
        for name in self._names(self._private.frozen):
            try:
                self._files.call("recovery.clean_frozen", (self._private.frozen / name).unlink)
            except OSError as exc:
                log.warning("what a backup left in %s could not be removed: %s", self._private.frozen, exc.strerror)

    def _not_seen(self, path: str, exc: OSError) -> None:
        self._saw_all = False
        label = disk_label(path)
        error = PrimaryIOError(
            f"{label}: could not be looked at, nor what may lie below it ({exc.strerror}); its placeholders are served "
            "all the same, but what a crash left of them is not finished: mend or move it, then start again"
        )
        log.error("%s", error)
        self._result.findings.append((label, error))

    def _look_at_file(self, entry: Entry) -> None:
        path, st, label = entry.path, entry.st, disk_label(entry.path)
        record: PlaceholderRecord | None = None
        try:
            record = read_record(self._files, "recovery.record", proc_path(entry.path_fd), label=label)
            if record is None:
                return
            fd = self._files.call("recovery.open", reopen, entry.path_fd, os.O_RDONLY | os.O_NONBLOCK)
            try:
                check_identity(record, inode_identity(fd), label=label)
                guest_mtime_ns = self._take_up_map(path, fd, record, label)
            finally:
                os.close(fd)
        except (VmfsStubError, OSError) as exc:
            self._unclear.add(st.st_ino)
            self._problem(path, st.st_ino, record, _as_ours(label, exc))
            return
        self._settled.add(st.st_ino)
        self._placeholders.add(st.st_ino, KnownPlaceholder(record, label, guest_mtime_ns or record.mtime_ns))

    def _take_up_map(self, path: str, fd: int, record: PlaceholderRecord, label: str) -> int:
        """Bring the map into a known state; returns when a guest last wrote (0: never)."""
        self._matched.add(record.placeholder_id)
        durable = open_durable(self._files, self._private, record, label=label)
        try:
            state = durable.header.state
            if state in (MapState.PREPARED, MapState.REMOVED):
                log.warning("%s: a crash left it %s; it is a placeholder", label, state.name.lower())
                # The record may be in memory only; without it, no space and no earlier placeholder is given up.
                self._files.call("recovery.sync", os.fsync, fd)
                durable.set_state(MapState.COMMITTED)
            if durable.header.state == MapState.COMMITTED:
                log.info("%s: releasing its space was cut short; going on", label)
                self._result.punch.append(path)
            elif state == MapState.GRADUATING:
                self._result.graduate.append(path)
            if durable.header.hydrate:
                self._result.hydrate.append(path)
            return live_guest_mtime_ns(self._files, self._private, record, durable.header, label=label)
        finally:
            durable.close()

    def _look_at_lone_map(self, placeholder_id: PlaceholderId, backing_fd: int) -> None:
        map_path, label = self._private.durable_path(placeholder_id), f"map {placeholder_id}"
        durable = DurableMap.open(self._files, map_path, label=label)
        header = durable.header
        durable.close()
        path = self._inodes.get(header.identity.ino)
        present = path is not None and self._is_same_inode(backing_fd, path, header)
        if present and header.identity.ino in self._unclear:
            return
        if not present and not self._saw_all:
            log.warning("placeholder %s: its file was not found, but not everything could be looked at", placeholder_id)
            return
        over = header.state in (MapState.PREPARED, MapState.GRADUATING, MapState.SUPERSEDED)
        over = over or (present and header.identity.ino in self._settled)
        if over or (header.state == MapState.REMOVED and not present):
            if not present:
                self._sync_removals()
            log.info(
                "placeholder %s ended (%s); removing what is left of it", placeholder_id, header.state.name.lower()
            )
            was_made = header.state != MapState.PREPARED
            self._result.ended.append(Ended(placeholder_id, header.vm_id, header.point_id, was_made))
        elif present and path is not None:
            self._problem(path, header.identity.ino, None, _record_missing(path))
        else:
            log.warning(
                "placeholder %s: its file is not in the backing directory; its restore point stays", placeholder_id
            )
            self._result.findings.append((label, _file_gone(placeholder_id, header, map_path)))

    def _sync_removals(self) -> None:
        """A killed daemon's unlink may be in memory only, and the file come back without what it depends on."""
        if not self._synced:
            self._files.call("recovery.sync_removals", sync_filesystem, self._backing)
            self._synced = True

    def _is_same_inode(self, backing_fd: int, path: str, header: MapHeader) -> bool:
        """Whether that file is the map's; then what was last done to its record is durable, too."""
        path_fd = self._files.call("recovery.open", open_beneath, backing_fd, path)
        try:
            fd = self._files.call("recovery.open", reopen, path_fd, os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.close(path_fd)
        try:
            if inode_generation(fd) != header.identity.generation:
                return False
            self._files.call("recovery.sync", os.fsync, fd)
            return True
        finally:
            os.close(fd)

    def _problem(self, path: str, ino: int, record: PlaceholderRecord | None, error: VmfsStubError) -> None:
        log.error("%s", error)
        self._placeholders.add(ino, KnownPlaceholder(record, disk_label(path), 0, problem=error))
        self._result.findings.append((disk_label(path), error))


def _as_ours(label: str, exc: VmfsStubError | OSError) -> VmfsStubError:
    if isinstance(exc, VmfsStubError):
        return exc
    return PrimaryIOError(f"{label}: could not be looked at ({exc}); check the backing filesystem, then start again")


def _file_gone(placeholder_id: PlaceholderId, header: MapHeader, map_path: Path) -> RecordMissing:
    return RecordMissing(
        f"the file of placeholder {placeholder_id} (VM {header.vm_id}, restore point {header.point_id}) is gone from "
        f"the backing directory; if that was meant, unmount and delete {map_path}"
    )


def _record_missing(path: str) -> RecordMissing:
    return RecordMissing(
        f"{disk_label(path)}: its placeholder record is gone, so that its absent blocks would read as zeros; it gives "
        "errors. The restore point is untouched: write it out elsewhere with `vmfs-stub restore`"
    )
