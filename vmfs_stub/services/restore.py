"""Restore: writes a restore point out as ordinary files.

Purpose: the way back that needs nothing but the store: no daemon, no configuration, no primary.  Blocking code with a
few threads; the caller runs it in a thread of its own or in a process.

Invariants:
- Nothing is overwritten, and nothing appears under its final name before all of it is whole and on the medium: files
  are built in a fresh folder of our own beside their place and moved in at the end; a failure removes that folder.
- Paths come from the store and are hostile until proven otherwise: every file is made relative to a descriptor of its
  folder, with O_EXCL and O_NOFOLLOW, so neither ``..`` nor a symlink in the restore point leads anywhere else.
- Every byte was verified by the store; zeros stay holes.

This module must not know placeholders or the backing directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import AlreadyExists, NoSpace, PrimaryIOError
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.primary.files import write_fully
from vmfs_stub.store.chunk_table import ChunkTable, RestorePoint
from vmfs_stub.store.manifest import FileKind, StoredFile, by_folder
from vmfs_stub.store.store import Store

WORKERS: Final = 2
RUN_BYTES: Final = 4 * 1024 * 1024
"""Raw bytes per task: large reads of the store, little memory (each worker holds one run)."""
LOCATE_CHUNKS: Final = 4096
XATTRS: Final = ("user.", "system.posix_acl_")
"""Attributes that are restored.  A backup holds others too (labels, capabilities): they mean something on the host that
gave them, and a store is not believed about what gives rights."""
STAGING: Final = ".vmfs-stub-restore-"

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What was written; ``warnings`` name attributes that this system or user could not set."""

    file_count: int
    size_bytes: int
    written_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring chunks of a file that lie one after another in one pack; ``offset`` in the file, bytes."""

    offset: int
    refs: list[FrameRef]


def restore_point(
    store: Store,
    point: RestorePoint,
    to: Path,
    *,
    files: FileCalls = PLAIN,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> RestoreReport:
    """Write all files of ``point`` into the directory ``to`` (made when absent; its parent must exist).

    ``progress`` is called with the number of logical bytes just done, from several threads, one call at a time.
    Raises: AlreadyExists when a name is taken; CorruptManifest and the other integrity errors; ObjectMissing;
    StoreUnavailable; NoSpace; PrimaryIOError.
    """
    with _translated(to):
        files.call("restore.folder", to.mkdir, mode=0o700, exist_ok=True)
        names = sorted({stored.path.split("/", 1)[0] for stored in point.manifest.files})
        _refuse_taken(files, to, names)
        staging = to / f"{STAGING}{secrets.token_hex(8)}"
        try:
            files.call("restore.folder", staging.mkdir, mode=0o700)
            restorer = _Restorer(store, point, staging, files=files, workers=workers, progress=progress)
            report = restorer.run()
            _move_in(files, staging, to, names)
        finally:
            with contextlib.suppress(OSError):
                files.call("restore.clean", shutil.rmtree, staging, ignore_errors=True)
    return report


class _Restorer:
    """One restore into a staging folder."""

    def __init__(
        self,
        store: Store,
        point: RestorePoint,
        staging: Path,
        *,
        files: FileCalls,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self._files = files
        self._store = store
        self._point = point
        self._staging = staging
        self._workers = workers
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._written = 0
        self._warnings: list[str] = []
        self._not_restored: dict[str, list[str]] = {}
        """Attribute → the paths that have it; such an attribute is often on every file."""

    def run(self) -> RestoreReport:
        files = self._point.manifest.files
        order = sorted(range(len(files)), key=lambda index: files[index].path.encode("utf-8", "surrogateescape"))
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        root = self._files.call("restore.folder", os.open, self._staging, flags)
        try:
            with ThreadPoolExecutor(self._workers, thread_name_prefix="restore") as executor:
                for index in order:
                    self._make(root, index, executor)
            for folder_path in _implied_folders(files):
                with self._folder_of(root, f"{folder_path}/.") as (folder, _):
                    self._files.call("restore.sync", os.fsync, folder)
            for index in reversed(order):  # a folder's times are set when nothing more is made in it
                if files[index].kind is FileKind.DIRECTORY:
                    with self._folder_of(root, f"{files[index].path}/.") as (folder, _):
                        self._finish(folder, files[index])
        finally:
            os.close(root)
        warnings = (*self._warnings, *_not_restored_warnings(self._not_restored))
        return RestoreReport(len(files), self._point.manifest.size, self._written, warnings)

    def _make(self, root: int, index: int, executor: ThreadPoolExecutor) -> None:
        stored = self._point.manifest.files[index]
        with self._folder_of(root, stored.path) as (folder, name):
            if stored.kind is FileKind.DIRECTORY:
                with contextlib.suppress(FileExistsError):  # made already for a file in it
                    self._files.call("restore.folder", os.mkdir, name, 0o700, dir_fd=folder)
            elif stored.kind is FileKind.SYMLINK:
                assert stored.target is not None
                self._files.call("restore.symlink", os.symlink, stored.target, name, dir_fd=folder)
                self._set_owner_and_times_of_symlink(folder, name, stored)
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = self._files.call("restore.create", os.open, name, flags, 0o600, dir_fd=folder)
                try:
                    self._fill(fd, stored, self._point.chunks(index), executor)
                    self._finish(fd, stored)
                finally:
                    os.close(fd)

    def _fill(self, fd: int, stored: StoredFile, table: ChunkTable, executor: ThreadPoolExecutor) -> None:
        self._files.call("restore.size", os.ftruncate, fd, stored.size)
        running: set[Future[None]] = set()
        try:
            for run in self._runs(table):
                running.add(executor.submit(self._write_run, fd, run))
                if len(running) >= 2 * self._workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    _raise_first(done)
            done, running = wait(running)
            _raise_first(done)
        finally:
            for future in running:
                future.cancel()
            wait(running)  # nobody may write to a descriptor that is about to be closed

    def _runs(self, table: ChunkTable) -> Iterator[_Run]:
        """Neighbouring stored chunks of one pack, up to RUN_BYTES; zeros are counted as progress and left out."""
        run: _Run | None = None
        limit = max(1, RUN_BYTES // table.chunk_size)
        for first in range(0, table.chunk_count, LOCATE_CHUNKS):
            end = min(first + LOCATE_CHUNKS, table.chunk_count)
            zeros = 0
            for index, ref in enumerate(table.locate(first, end), first):
                if ref is None:
                    zeros += min(table.chunk_size, table.size - index * table.chunk_size)
                elif run is not None and _continues(run, ref, index, table.chunk_size, limit):
                    run.refs.append(ref)
                    continue
                if run is not None:
                    yield run
                run = None if ref is None else _Run(index * table.chunk_size, [ref])
            self._advance(zeros)
        if run is not None:
            yield run

    def _write_run(self, fd: int, run: _Run) -> None:
        chunks = self._store.fetch(run.refs)
        total = sum(map(len, chunks))
        self._files.call("restore.write", _write_all, fd, chunks, run.offset, total)
        self._advance(total, written=total)

    @contextlib.contextmanager
    def _folder_of(self, root: int, path: str) -> Iterator[tuple[int, str]]:
        """The folder of ``path`` below ``root``, made as needed, and the last name; follows no symlink."""
        *parents, name = path.split("/")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.dup(root)
        try:
            for parent in parents:
                with contextlib.suppress(FileExistsError):
                    self._files.call("restore.folder", os.mkdir, parent, 0o700, dir_fd=folder)
                below = self._files.call("restore.folder", os.open, parent, flags, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder, name
        finally:
            os.close(folder)

    def _advance(self, count: int, *, written: int = 0) -> None:
        with self._progress_lock:
            self._written += written
            if self._progress is not None and count:
                self._progress(count)

    def _finish(self, fd: int, stored: StoredFile) -> None:
        """Owner before mode (a change clears setuid), mode after xattrs (it may forbid them), then times, then sync."""
        set_owner = partial(self._files.call, "restore.attributes", os.fchown, fd, stored.uid, stored.gid)
        self._attempt(stored, "owner", set_owner)
        for name, value in stored.xattrs.items():
            if not name.startswith(XATTRS) or ".vmfs-stub." in name:
                self._not_restored.setdefault(name, []).append(stored.path)
                continue
            set_it = partial(self._files.call, "restore.attributes", os.setxattr, fd, name, value)
            self._attempt(stored, f"xattr {name}", set_it)
        self._files.call("restore.attributes", os.fchmod, fd, stored.mode)
        self._files.call("restore.attributes", os.utime, fd, ns=(stored.atime_ns, stored.mtime_ns))
        self._files.call("restore.sync", os.fsync, fd)

    def _set_owner_and_times_of_symlink(self, folder: int, name: str, stored: StoredFile) -> None:
        owner, times = (stored.uid, stored.gid), (stored.atime_ns, stored.mtime_ns)
        set_owner = partial(self._files.call, "restore.attributes", _change_owner, folder, name, *owner)
        self._attempt(stored, "owner", set_owner)
        self._files.call("restore.attributes", os.utime, name, ns=times, dir_fd=folder, follow_symlinks=False)

    def _attempt(self, stored: StoredFile, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as exc:
            if exc.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL):
                raise
            self._warnings.append(f"{stored.path}: {what} could not be set ({exc.strerror})")


def _change_owner(folder: int, name: str, uid: int, gid: int) -> None:
    os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)


def _not_restored_warnings(paths_by_name: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """One for each attribute, however many files have it."""
    for name, paths in paths_by_name.items():
        others = f" and {len(paths) - 1} others" if len(paths) > 1 else ""
        yield f"{paths[0]}{others}: xattr {name!r} is not one that is restored"


def _continues(run: _Run, ref: FrameRef, index: int, chunk_size: int, limit: int) -> bool:
    last = run.refs[-1]
    return (
        len(run.refs) < limit
        and ref.pack_id == last.pack_id
        and ref.offset == last.end
        and run.offset + len(run.refs) * chunk_size == index * chunk_size
    )


def _write_all(fd: int, chunks: Sequence[bytes], offset: int, total: int) -> None:
    written = os.pwritev(fd, chunks, offset)
    if written < total:  # a signal, or the file system is nearly full
        write_fully(fd, memoryview(b"".join(chunks))[written:], offset + written)


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()


def _implied_folders(files: Sequence[StoredFile]) -> Iterator[str]:
    """Folders that are in paths and not entries of their own.

    Those of one path at a time: a path of 4 KiB may have 255 of them, which are 512 KiB together.
    """
    named = {stored.path for stored in files}
    before: list[str] = []
    for path in sorted(named, key=by_folder):
        parents = path.split("/")[:-1]
        pairs = enumerate(zip(before, parents, strict=False))
        known = next((at for at, (one, other) in pairs if one != other), min(len(before), len(parents)))
        for depth in range(known + 1, len(parents) + 1):
            folder = "/".join(parents[:depth])
            if folder not in named:
                yield folder
        before = parents


def _refuse_taken(files: FileCalls, to: Path, names: Sequence[str]) -> None:
    for name in names:
        if files.call("restore.look", os.path.lexists, to / name):
            msg = f"{to / name} exists already; nothing was written; restore to an empty directory"
            raise AlreadyExists(msg)


def _move_in(files: FileCalls, staging: Path, to: Path, names: Sequence[str]) -> None:
    """Give everything its final name, durably, and replace nothing that appeared meanwhile; all of it or none."""
    inodes = {name: files.call("restore.look", os.lstat, staging / name).st_ino for name in names}
    try:
        for name in names:
            _move_one(files, staging / name, to, name)
        files.call("restore.sync", _sync, to)
    except BaseException:
        for name, ino in inodes.items():
            with contextlib.suppress(OSError):
                if files.call("restore.look", os.lstat, to / name).st_ino == ino:
                    files.call("restore.undo", (to / name).rename, staging / f"{STAGING}{ino}")
        raise


def _move_one(files: FileCalls, source: Path, to: Path, name: str) -> None:
    target = to / name
    if stat.S_ISDIR(files.call("restore.look", os.lstat, source).st_mode):
        _refuse_taken(files, to, [name])
        # The kernel refuses a directory that is not empty, and anything else.
        files.call("restore.move", source.rename, target)
        return
    try:
        files.call("restore.move", os.link, source, target, follow_symlinks=False)
    except FileExistsError:
        _refuse_taken(files, to, [name])
        raise
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        _refuse_taken(files, to, [name])  # no hard links here
        files.call("restore.move", source.rename, target)
    else:
        files.call("restore.unlink", source.unlink)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _translated(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            msg = f"restore to {to}: no room left ({exc.strerror}); free space or choose another directory"
            raise NoSpace(msg) from exc
        if exc.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY):
            msg = f"restore to {to}: {exc.strerror}: something else is there; choose another directory"
            raise AlreadyExists(msg) from exc
        msg = f"restore to {to}: {exc.strerror} ({exc.filename or 'a file being written'})"
        raise PrimaryIOError(msg) from exc
