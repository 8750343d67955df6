"""One placeholder on primary: its record and its two residency maps, taken up and laid down together.

Invariants:
* a record without its map, a map without its record, or either for another inode is an error: never an ordinary
  sparse file (zeros), never an all-clear map (a guest's writes undone);
* the durable header names the boot and mount in which a volatile map exists, before any bit is set in that map.
Blocking; the owner makes one call at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vmfs_stub.core.errors import CorruptMap, IdentityMismatch, MapFrozen, MapMissing, UnknownFormat
from vmfs_stub.core.ids import DatastoreId, PlaceholderId
from vmfs_stub.core.names import (
    ADOPTING_DIR,
    CHANGES_DIR,
    CLAIMS_DIR,
    FROZEN_DIR,
    MAPS_DIR,
    ORPHANS_DIR,
    PRIVATE_DIR,
    RESERVE_FILE,
    STOPPED_DIR,
    THAWS_DIR,
)
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.primary.claim_notes import ClaimNotes
from vmfs_stub.primary.datastore_id import load_or_make_datastore_id
from vmfs_stub.primary.durable_map import MAP_SUFFIX, PAGE_BITS_SIZE, DurableMap, MapHeader, MapState
from vmfs_stub.primary.files import FileCalls, sync_directory
from vmfs_stub.primary.guest_notes import GuestNotes
from vmfs_stub.primary.identity import BootIdentity, boot_identity, inode_identity
from vmfs_stub.primary.orphans import Orphans
from vmfs_stub.primary.record import PlaceholderRecord, check_identity, read_record
from vmfs_stub.primary.reserve import Reserve
from vmfs_stub.primary.volatile_map import VolatileMap


@dataclass(frozen=True, slots=True)
class PrivateState:
    """Where the private state of one datastore lies, which one it is, the boot and mount it is used in, and what it
    keeps back.
    """

    datastore_id: DatastoreId
    maps: Path
    volatile_maps: Path
    changes: Path
    volatile_changes: Path
    boot: BootIdentity
    claims: ClaimNotes
    reserve: Reserve
    orphans: Orphans
    adopting: Path
    stopped: GuestNotes
    thaws: GuestNotes
    frozen: Path

    @classmethod
    def at(cls, backing: Path, runtime_dir: Path, *, files: FileCalls = PLAIN) -> PrivateState:
        """Make the directories, and the datastore's id, where they are missing.

        Raises CorruptRecord, UnknownFormat (of the id), OSError.
        """
        maps, volatile = backing / PRIVATE_DIR / MAPS_DIR, runtime_dir / MAPS_DIR
        orphans, claims = backing / PRIVATE_DIR / ORPHANS_DIR, backing / PRIVATE_DIR / CLAIMS_DIR
        adopting, stopped = backing / PRIVATE_DIR / ADOPTING_DIR, backing / PRIVATE_DIR / STOPPED_DIR
        frozen, thaws = backing / PRIVATE_DIR / FROZEN_DIR, backing / PRIVATE_DIR / THAWS_DIR
        changes, volatile_changes = backing / PRIVATE_DIR / CHANGES_DIR, runtime_dir / CHANGES_DIR
        private = (backing / PRIVATE_DIR, maps, orphans, claims, adopting, changes, stopped, thaws, frozen)
        for directory in (*private, runtime_dir, volatile, volatile_changes):
            files.call("start.private", directory.mkdir, mode=0o700, parents=True, exist_ok=True)
        files.call("start.private_sync", sync_directory, backing / PRIVATE_DIR)
        fd = files.call("start.backing", os.open, backing, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            files.call("start.private_sync", os.fsync, fd)
            reserve = Reserve(backing / PRIVATE_DIR / RESERVE_FILE)
            datastore_id = reserve.lend(files, partial(load_or_make_datastore_id, files, backing / PRIVATE_DIR))
            return cls(
                datastore_id=datastore_id,
                maps=maps,
                volatile_maps=volatile,
                changes=changes,
                volatile_changes=volatile_changes,
                boot=boot_identity(fd),
                claims=ClaimNotes(files, claims, datastore_id),
                reserve=reserve,
                orphans=Orphans(orphans),
                adopting=adopting,
                stopped=GuestNotes(files, stopped, datastore_id),
                thaws=GuestNotes(files, thaws, datastore_id),
                frozen=frozen,
            )
        finally:
            os.close(fd)

    def durable_path(self, placeholder_id: PlaceholderId) -> Path:
        return self.maps / f"{placeholder_id}{MAP_SUFFIX}"

    def volatile_path(self, placeholder_id: PlaceholderId) -> Path:
        return self.volatile_maps / f"{placeholder_id}.bits"

    def changed_record_path(self, ino: int) -> Path:
        return self.changes / str(ino)

    def changed_map_path(self, ino: int) -> Path:
        return self.volatile_changes / str(ino)


@dataclass(slots=True)
class PlaceholderMaps:
    """An open placeholder: ``record`` never changes; ``durable`` follows ``live`` at every sync."""

    record: PlaceholderRecord
    durable: DurableMap
    live: VolatileMap

    def sync(self, files: FileCalls, fd: int, pages: dict[int, bytes], header: MapHeader) -> None:
        """Make the file's data durable, then bits (``pages``, taken before) and limits that speak of it.

        Raises OSError: the caller freezes the map.
        """
        files.call("sync.data", os.fdatasync, fd)
        if pages or header != self.durable.header:
            self.durable.update(pages, header)

    def current_header(self) -> MapHeader:
        """The durable header as it should be now."""
        return replace(
            self.durable.header,
            archived_limit=self.live.archived_limit,
            guest_mtime_ns=self.live.guest_mtime_ns,
        )

    def lay_down(self, files: FileCalls, fd: int) -> None:
        """Sync and give up the volatile map, so that a later opening starts from the durable one.  Raises OSError.

        A frozen map stays, also one that freezes here: only a reboot makes certain again what is on the disk.
        """
        clean = False
        try:
            if not self.live.frozen:
                pages = self.live.take_dirty()
                self.sync(files, fd, pages, replace(self.current_header(), live=None))
                clean = True
        except OSError:
            self.live.freeze()
            raise
        finally:
            self.live.close(discard=clean)
            self.durable.close()


def take_up(files: FileCalls, fd: int, private: PrivateState, *, label: str) -> PlaceholderMaps | None:
    """Open the placeholder in ``fd`` (readable and writable); None when it is an ordinary file.

    Raises IntegrityError kinds, UnknownFormat, MapFrozen, OSError.
    """
    record = read_record(files, "placeholder.record", fd, label=label)
    if record is None:
        return None
    check_identity(record, inode_identity(fd), label=label)
    _end_replaced(files, fd, private, record, label=label)
    durable = open_durable(files, private, record, label=label)
    try:
        live = _open_volatile(files, fd, private, record, durable, label)
        if live.frozen:
            live.close(discard=False)
            raise MapFrozen(
                f"{label}: an earlier sync of this disk failed, so that it is not certain what is on it; check the "
                "backing filesystem, then reboot: the disk falls back to what was last synced"
            )
    except BaseException:
        durable.close()
        raise
    return PlaceholderMaps(record, durable, live)


def _end_replaced(files: FileCalls, fd: int, private: PrivateState, record: PlaceholderRecord, *, label: str) -> None:
    """If the map of the placeholder that this one replaced is still there, note that it is over.

    Without that, once this one's record goes, the old map would tell of a record that is lost.
    """
    replaced = open_replaced(files, private, record, label=label)
    if replaced is None:
        return
    try:
        files.call("replaced.sync", os.fsync, fd)
        if replaced.header.state != MapState.SUPERSEDED:
            replaced.set_state(MapState.SUPERSEDED)
    finally:
        replaced.close()


def open_durable(files: FileCalls, private: PrivateState, record: PlaceholderRecord, *, label: str) -> DurableMap:
    """The durable map that belongs to ``record``.  Raises MapMissing, CorruptMap, IdentityMismatch, UnknownFormat."""
    path = private.durable_path(record.placeholder_id)
    try:
        durable = DurableMap.open(files, path, label=label)
    except FileNotFoundError as exc:
        raise MapMissing(
            f"{label}: the residency map {path} is missing; without it what the guest wrote cannot be told from what "
            "is archived. Restore the map from a copy, or the VM's restore point elsewhere (`vmfs-stub restore`)"
        ) from exc
    header = durable.header
    if header.placeholder_id != record.placeholder_id or header.size != record.size:
        durable.close()
        raise CorruptMap(
            f"{label}: the residency map {path} belongs to another placeholder; restore the map from a copy, or "
            "write the restore point out elsewhere with `vmfs-stub restore`"
        )
    if header.identity != record.identity:
        durable.close()
        raise IdentityMismatch(
            f"{label}: the residency map {path} was made for another inode; restore the map from a copy, or "
            "write the restore point out elsewhere with `vmfs-stub restore`"
        )
    return durable


def _open_volatile(
    files: FileCalls, fd: int, private: PrivateState, record: PlaceholderRecord, durable: DurableMap, label: str
) -> VolatileMap:
    path = private.volatile_path(record.placeholder_id)
    size = os.fstat(fd).st_size
    expected = durable.header.live == private.boot
    _refuse_unsynced_mount(files, path, private, record, durable, label)
    try:
        live = VolatileMap.open(
            files, path, placeholder_id=record.placeholder_id, boot=private.boot, size=record.size, label=label
        )
    except (MapMissing, CorruptMap):
        if expected:
            raise
        header = durable.header
        live = VolatileMap.create(
            files,
            path,
            placeholder_id=record.placeholder_id,
            boot=private.boot,
            size=record.size,
            pages=durable.load_pages(label=label),
            archived_limit=header.archived_limit,
            guest_mtime_ns=header.guest_mtime_ns,
        )
    try:
        if not expected:
            durable.update({}, replace(durable.header, live=private.boot))
    except BaseException:
        # It stays: the update may have got far enough that the next opening asks for it.
        live.close(discard=False)
        raise
    # A truncate that was cut short between the file and the limit: the file is the witness.
    live.lower_archived_limit(size)
    return live


def _refuse_unsynced_mount(
    files: FileCalls, path: Path, private: PrivateState, record: PlaceholderRecord, durable: DurableMap, label: str
) -> None:
    """Refuse a disk whose backing filesystem was mounted anew in this boot while writes to it were not synced.

    Whether what was written has reached the new mount cannot be told: a clean unmount writes it out, a device that went
    away loses it.  With nothing unsynced, the durable map says it all.
    """
    live = durable.header.live
    if live is None or live.boot_id != private.boot.boot_id or live.mount_id == private.boot.mount_id:
        return
    opened = partial(VolatileMap.open, files, path, placeholder_id=record.placeholder_id, size=record.size, label=label)
    try:
        opened(boot=private.boot).close(discard=False)
    except (MapMissing, CorruptMap):
        left = opened(boot=live)
    else:
        return  # an earlier opening in this mount has looked already
    pages = left.take_dirty()
    limits, frozen = (left.archived_limit, left.guest_mtime_ns), left.frozen
    left.close(discard=False)
    header = durable.header
    is_same = all(
        pages.get(number, b"").ljust(PAGE_BITS_SIZE, b"\0") == kept
        for number, kept in enumerate(durable.load_pages(label=label))
    )
    if frozen or not is_same or limits != (header.archived_limit, header.guest_mtime_ns):
        raise MapFrozen(
            f"{label}: its backing filesystem was mounted anew in this boot, after the daemon had died with writes "
            "that were not synced; it is not certain that they are on it. A reboot falls back to what was last synced"
        )


def live_guest_mtime_ns(
    files: FileCalls, private: PrivateState, record: PlaceholderRecord, header: MapHeader, *, label: str
) -> int:
    """When a guest last wrote, 0 if never; of a volatile map that a killed daemon left, if there should be one.

    Raises MapMissing, CorruptMap, OSError.
    """
    if header.live != private.boot:
        return header.guest_mtime_ns
    path = private.volatile_path(record.placeholder_id)
    live = VolatileMap.open(
        files, path, placeholder_id=record.placeholder_id, boot=private.boot, size=record.size, label=label
    )
    live.close(discard=False)
    return live.guest_mtime_ns


def discard_maps(files: FileCalls, private: PrivateState, placeholder_id: PlaceholderId) -> None:
    """Remove both maps of a placeholder that is no more; durable on return.  Raises OSError."""
    files.call("volatile.remove", private.volatile_path(placeholder_id).unlink, missing_ok=True)
    path = private.durable_path(placeholder_id)
    if files.call("map.look", path.exists):
        files.call("map.remove", path.unlink)
        files.call("map.remove", sync_directory, private.maps)


KEPT_WHEN_REMOVED = frozenset({MapState.PREPARED, MapState.GRADUATING})


def mark_removed(files: FileCalls, private: PrivateState, record: PlaceholderRecord, *, label: str) -> MapState:
    """Note durably that the file's last link is about to go; returns the state before.  Raises IntegrityError kinds.

    One of KEPT_WHEN_REMOVED stays as it is: whether its record is durable is not known, and the next start finds out.
    What it replaced, if that is still there, goes too, whichever of the two records is durable.
    """
    replaced = open_replaced(files, private, record, label=label)
    if replaced is not None:
        try:
            if replaced.header.state != MapState.SUPERSEDED:
                replaced.set_state(MapState.REMOVED)
        finally:
            replaced.close()
    durable = open_durable(files, private, record, label=label)
    try:
        before = durable.header.state
        if before not in KEPT_WHEN_REMOVED:
            durable.set_state(MapState.REMOVED)
    finally:
        durable.close()
    return before


def open_replaced(
    files: FileCalls, private: PrivateState, record: PlaceholderRecord, *, label: str
) -> DurableMap | None:
    """The map of the placeholder that this one replaced, if it is there and can be read.  Raises OSError."""
    if record.replaces is None:
        return None
    path = private.durable_path(record.replaces)
    if not files.call("replaced.look", path.exists):
        return None
    try:
        return DurableMap.open(files, path, label=label)
    except (CorruptMap, UnknownFormat, FileNotFoundError):
        return None
