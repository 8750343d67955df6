"""One VM that is being made from a restore point, in a folder of the private directory, up to its move into place.

Everything is made there as it is to be: folders, links and small files with their bytes, the others as sparse files of
full size with a map that is *prepared*.  Nothing that lies there means anything: a start removes it, and with it maps
and pins.  With the one rename of `move_in` all of it is there.  Blocking; one call at a time.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import Refused
from vmfs_stub.core.ids import PlaceholderId, StoreId
from vmfs_stub.core.names import PLACEHOLDER_XATTR, printable
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.inventory.identity import write_vm_id
from vmfs_stub.primary.durable_map import DurableMap, map_bytes
from vmfs_stub.primary.files import rename_new
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.record import PlaceholderRecord, encode_record
from vmfs_stub.primary.tree import open_beneath, reopen
from vmfs_stub.services.managed_save import IMAGE_SUFFIX
from vmfs_stub.services.placeholder_maker import prepared_header
from vmfs_stub.services.point_writer import PointWriter
from vmfs_stub.services.sources import is_worth_placeholder
from vmfs_stub.services.whole_files import Ask, WholeFiles
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.manifest import FileKind, Manifest, StoredFile
from vmfs_stub.store.store import Store

WORKERS: Final = 2
"""Threads that fetch and write what small files hold."""
_NAMES_MAX: Final = 8
"""Files that a message names."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A file that is to be a placeholder; ``path`` is that below the backing directory, ``record`` what it gets."""

    path: str
    record: PlaceholderRecord


class Adoption:
    """The files of one VM while they are made; ``absent`` are those of which a map was prepared, or may have been.

    ``is_moved`` says that they have their place, or may have.
    """

    def __init__(
        self,
        store: Store,
        point: RestorePoint,
        top: StoredFile,
        *,
        files: FileCalls,
        private: PrivateState,
        backing: Path,
        placeholder_bytes_min: int,
        progress: Callable[[int], None],
        ask: Ask,
    ) -> None:
        """``top`` is the file or directory that the VM is.  Makes the folder.  Raises OSError."""
        self._files = files
        self._private = private
        self._backing = backing
        self._store_id: StoreId = store.id
        self._manifest = point.manifest
        self._bytes_min = placeholder_bytes_min
        self._progress = progress
        self._top = top
        self._entries, self._first = entries_below(top, point.manifest)
        self.absent: list[Absent] = []
        self.is_moved = False
        self._folder = private.adopting / secrets.token_hex(8)
        files.call("adopt.folder", self._folder.mkdir, mode=0o700)
        self._whole = WholeFiles(store, point, files=files, workers=WORKERS, progress=progress, ask=ask)
        try:
            self._writer = PointWriter(self._entries, self._folder, files=files, fill=self._fill)
        except BaseException:
            self._whole.close()
            self._remove()
            raise

    @property
    def order(self) -> Sequence[int]:
        """What `make` is to be called with, in this order."""
        return self._writer.order

    @property
    def warnings(self) -> tuple[str, ...]:
        """Attributes that could not be set."""
        return self._writer.warnings

    def make(self, index: int) -> None:
        """Make one entry.  Raises OSError, StoreError, IntegrityError."""
        self._writer.make(index)

    def _fill(self, fd: int, index: int) -> None:
        stored, number = self._entries[index], index - self._first
        if not is_made_absent(stored, self._manifest.chunk_size, bytes_min=self._bytes_min):
            self._whole.fill(fd, number)
            return
        self._files.call("adopt.size", os.ftruncate, fd, stored.size)
        placeholder_id = PlaceholderId(secrets.token_hex(16))
        header = prepared_header(
            fd,
            placeholder_id=placeholder_id,
            vm_id=self._manifest.vm_id,
            point_id=self._manifest.point_id,
            chunk_size=self._manifest.chunk_size,
        )
        identity = header.identity
        record = PlaceholderRecord(
            placeholder_id=placeholder_id,
            store_id=self._store_id,
            vm_id=self._manifest.vm_id,
            point_id=self._manifest.point_id,
            file_index=number,
            size=stored.size,
            mtime_ns=stored.mtime_ns,
            archived_ns=time.time_ns(),
            filesystem=identity.filesystem,
            ino=identity.ino,
            generation=identity.generation,
        )
        self.absent.append(Absent(stored.path, record))
        DurableMap.create(self._files, self._private.durable_path(placeholder_id), header).close()
        self._progress(stored.size)

    def seal(self) -> None:
        """All entries were made, and all pins: what is still missing is set, and everything is durable on return.

        Raises OSError, PrimaryError.
        """
        self._writer.finish()
        root = self._files.call("adopt.open", os.open, self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for absent in self.absent:
                fd = self._open(root, absent.path)
                try:
                    raw = encode_record(absent.record)
                    self._files.call("adopt.record", os.setxattr, fd, PLACEHOLDER_XATTR, raw)
                    self._files.call("adopt.sync", os.fsync, fd)
                finally:
                    os.close(fd)
            fd = self._open(root, self._top.path)
            try:
                write_vm_id(fd, self._manifest.vm_id, files=self._files)
                self._files.call("adopt.sync", os.fsync, fd)
            finally:
                os.close(fd)
            self._files.call("adopt.sync", os.fsync, root)
        finally:
            os.close(root)

    def _open(self, root: int, path: str) -> int:
        path_fd = self._files.call("adopt.open", open_beneath, root, path)
        try:
            return self._files.call("adopt.open", reopen, path_fd, os.O_RDONLY)
        finally:
            os.close(path_fd)

    def move_in(self) -> None:
        """Give the VM its place, and replace nothing.  Raises OSError: FileExistsError when something is there.

        Where ``is_moved`` is set all the same, it may be there, and may be gone after a power loss.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        backing = self._files.call("adopt.open", os.open, self._backing, flags)
        try:
            root = self._files.call("adopt.open", os.open, self._folder, flags)
            try:
                self._rename(root, backing)
            finally:
                os.close(root)
            self._files.call("adopt.sync", os.fsync, backing)
        finally:
            os.close(backing)

    def _rename(self, root: int, backing: int) -> None:
        name = self._top.path
        # From here on it may be there, whatever the call says.
        self.is_moved = True
        try:
            self._files.call("adopt.rename", rename_new, root, name, backing, name)
        except OSError:
            try:
                self._files.call("adopt.look", os.lstat, self._folder / name)
            except FileNotFoundError:
                return
            self.is_moved = False
            raise

    def close(self) -> None:
        """Remove what has not got its place, and the folder; what cannot be removed goes at the next start."""
        self._writer.close()
        self._whole.close()
        self._remove()

    def _remove(self) -> None:
        with suppress(OSError):
            self._files.call("adopt.clean", shutil.rmtree, self._folder)


def top_of(manifest: Manifest) -> StoredFile:
    """The file or directory that a VM was.  Raises Refused: a restore point of an older version does not say."""
    if manifest.top is not None:
        return manifest.top
    if len(manifest.files) == 1 and not manifest.metadata.get("path", "/").endswith("/"):
        (only,) = manifest.files
        if only.kind is FileKind.FILE and "/" not in only.path:
            return only
    restore = f"`vmfs-stub restore {manifest.vm_id}@{manifest.point_id} --to DIR` writes all of it to DIR"
    if len(manifest.files) > 1 and not manifest.metadata.get("path", "/").endswith("/"):
        raise Refused(
            f"VM {printable(manifest.vm_name)} was several files at the top of its datastore ({_listed(manifest)}), "
            f"which cannot be adopted together yet; {restore}, a new directory below the mount: move these from there "
            f"to the top, where its domain has them, but what ends in {IMAGE_SUFFIX}, the memory of its guest, to "
            "libvirt's save directory"
        )
    raise Refused(
        f"restore point {manifest.point_id} of VM {printable(manifest.vm_name)} does not say what its directory was; "
        f"{restore}, which, below the mount, is a VM of that name then"
    )


def _listed(manifest: Manifest) -> str:
    """The files of a restore point, or the first of many."""
    names = [printable(stored.path) for stored in manifest.files]
    more = len(names) - _NAMES_MAX
    return ", ".join(names[:_NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def entries_below(top: StoredFile, manifest: Manifest) -> tuple[list[StoredFile], int]:
    """What is made where a VM lies: ``top``, and what is in it; and which of them is file number 0 of the manifest."""
    if top.kind is not FileKind.DIRECTORY:
        return [top], 0
    return [top, *(replace(stored, path=f"{top.path}/{stored.path}") for stored in manifest.files)], 1


def is_made_absent(stored: StoredFile, chunk_size: int, *, bytes_min: int) -> bool:
    """Whether a stored file becomes a placeholder, rather than a file with all its bytes."""
    if stored.kind is not FileKind.FILE:
        return False
    return is_worth_placeholder(stored.size, occupied_bytes(stored, chunk_size), bytes_min=bytes_min)


def occupied_bytes(stored: StoredFile, chunk_size: int) -> int:
    """How many bytes a stored file takes with all that it holds, at most."""
    held = sum(segment is not None for segment in stored.segments)
    return min(stored.size, held * SEGMENT_CHUNKS * chunk_size)


def needed_bytes(manifest: Manifest, *, bytes_min: int) -> int:
    """How much room the files of a restore point take on primary when they are adopted, at most."""
    chunk_size = manifest.chunk_size
    return sum(
        map_bytes(stored.size)
        if is_made_absent(stored, chunk_size, bytes_min=bytes_min)
        else occupied_bytes(stored, chunk_size)
        for stored in manifest.files
    )
