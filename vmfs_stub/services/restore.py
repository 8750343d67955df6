"""Restore: writes a restore point out as ordinary files.

Purpose: the way back that needs nothing but the store: no daemon, no configuration, no primary.  Blocking code with a
few threads; the caller runs it in a thread of its own or in a process.

Invariants:
- Nothing is overwritten, and nothing appears under its final name before all of it is whole and on the medium: files
  are built in a fresh folder of our own beside their place and moved in at the end; a failure removes that folder.
- What is written is the work of `point_writer` and `whole_files`, with their own.

This module must not know placeholders or the backing directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import AlreadyExists, NoSpace, PrimaryIOError
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.primary.files import sync_directory
from vmfs_stub.services.point_writer import Fill, PointWriter
from vmfs_stub.services.whole_files import Progress, WholeFiles
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.store import Store

WORKERS: Final = 2
STAGING: Final = ".vmfs-stub-restore-"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What was written; ``warnings`` name attributes that this system or user could not set."""

    file_count: int
    size_bytes: int
    written_bytes: int
    warnings: tuple[str, ...]


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
            with closing(WholeFiles(store, point, files=files, workers=workers, progress=progress)) as whole:
                warnings = _write(point, staging, files=files, fill=whole.fill)
            _move_in(files, staging, to, names)
        finally:
            with contextlib.suppress(OSError):
                files.call("restore.clean", shutil.rmtree, staging, ignore_errors=True)
    return RestoreReport(len(point.manifest.files), point.manifest.size, whole.written_bytes, warnings)


def _write(point: RestorePoint, staging: Path, *, files: FileCalls, fill: Fill) -> tuple[str, ...]:
    with closing(PointWriter(point.manifest.files, staging, files=files, fill=fill)) as writer:
        for index in writer.order:
            writer.make(index)
        writer.finish()
        return writer.warnings


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
        files.call("restore.sync", sync_directory, to)
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
