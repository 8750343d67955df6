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

Nothing here reads the store.  Blocking; runs before the first open is answered.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError, RecordMissing, VmfsStubError
from vmfs_stub.core.ids import PlaceholderId
from vmfs_stub.core.names import PRIVATE_DIR
from vmfs_stub.primary.durable_map import NEW_SUFFIX, DurableMap, MapHeader, MapState
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import inode_generation, inode_identity
from vmfs_stub.primary.placeholder import PrivateState, live_guest_mtime_ns, open_durable
from vmfs_stub.primary.record import PlaceholderRecord, check_identity, read_record
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex, disk_label
from vmfs_stub.services.retirement import Ended

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovered:
    """What start-up found: paths (relative to the backing directory) to go on with, and placeholders that ended."""

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
        self._result = Recovered()
        self._matched: set[PlaceholderId] = set()
        self._settled: set[int] = set()
        """Inodes whose record and map fit; any other map of theirs is of an archive before, or of one that failed."""
        self._unclear: set[int] = set()
        """Inodes of which it is not known what they are; no map of theirs is removed."""
        self._inodes: dict[int, str] = {}
        """Every regular file found, by inode number."""

    def run(self) -> Recovered:
        """Look at everything once.  Raises OSError when the backing directory itself cannot be read."""
        for unfinished in self._private.maps.glob(f"*{NEW_SUFFIX}"):
            unfinished.unlink()
        for path, st in _regular_files(self._backing):
            self._inodes[st.st_ino] = path
            self._look_at_file(path, st)
        for map_path in sorted(self._private.maps.glob("*.map")):
            placeholder_id = PlaceholderId(map_path.stem)
            if placeholder_id not in self._matched:
                try:
                    self._look_at_lone_map(map_path, placeholder_id)
                except (VmfsStubError, OSError) as exc:
                    self._result.findings.append((f"map {placeholder_id}", _as_ours(map_path.name, exc)))
        return self._result

    def _look_at_file(self, path: str, st: os.stat_result) -> None:
        label, full = disk_label(path), str(self._backing / path)
        record: PlaceholderRecord | None = None
        try:
            record = read_record(self._files, "recovery.record", full, label=label)
            if record is None:
                return
            fd = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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

    def _look_at_lone_map(self, map_path: Path, placeholder_id: PlaceholderId) -> None:
        label = f"map {placeholder_id}"
        durable = DurableMap.open(self._files, map_path, label=label)
        header = durable.header
        durable.close()
        path = self._inodes.get(header.identity.ino)
        present = path is not None and self._is_same_inode(path, header)
        if present and header.identity.ino in self._unclear:
            return
        over = header.state in (MapState.PREPARED, MapState.GRADUATING, MapState.SUPERSEDED)
        over = over or (present and header.identity.ino in self._settled)
        if over or (header.state == MapState.REMOVED and not present):
            log.info(
                "placeholder %s ended (%s); removing what is left of it", placeholder_id, header.state.name.lower()
            )
            self._result.ended.append(Ended(placeholder_id, header.vm_id, header.point_id))
        elif present and path is not None:
            self._problem(path, header.identity.ino, None, _record_missing(path))
        else:
            log.warning(
                "placeholder %s: its file is not in the backing directory; its restore point stays", placeholder_id
            )
            self._result.findings.append((label, _file_gone(placeholder_id, header, map_path)))

    def _is_same_inode(self, path: str, header: MapHeader) -> bool:
        """Whether that file is the map's; then what was last done to its record is durable, too."""
        fd = os.open(self._backing / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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


def _regular_files(backing: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path (relative) and stat of every regular file of the datastore; other filesystems are not entered."""
    device = backing.stat().st_dev
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        with os.scandir(backing / directory) as entries:
            for entry in entries:
                path = f"{directory}/{entry.name}" if directory else entry.name
                st = entry.stat(follow_symlinks=False)
                if path == PRIVATE_DIR or st.st_dev != device:
                    continue
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(path)
                elif stat.S_ISREG(st.st_mode):
                    yield path, st
