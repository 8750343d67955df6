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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import AlreadyExists, IntegrityError, NoSpace, PrimaryIOError
from vmfs_stub.core.names import printable
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.primary.files import sync_directory, write_fully
from vmfs_stub.services.point_writer import Fill, PointWriter
from vmfs_stub.services.whole_files import Progress, WholeFiles
from vmfs_stub.store.associated_files import ASSOCIATED, DOMAIN_XML, decode_associated
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.keys import manifest_key
from vmfs_stub.store.manifest import NAME_LENGTH_MAX, Manifest, StoredFile
from vmfs_stub.store.store import Store

WORKERS: Final = 2
STAGING: Final = ".vmfs-stub-restore-"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What was written; ``warnings`` name attributes that this system or user could not set.

    ``beside`` are the names of what was written beside the VM's files, by kind: the domain's definition, NVRAM, TPM.
    """

    file_count: int
    size_bytes: int
    written_bytes: int
    warnings: tuple[str, ...]
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)


def restore_point(
    store: Store,
    point: RestorePoint,
    to: Path,
    *,
    files: FileCalls = PLAIN,
    workers: int = WORKERS,
    progress: Progress | None = None,
    only_beside: bool = False,
) -> RestoreReport:
    """Write all files of ``point`` into the directory ``to`` (made when absent; its parent must exist).

    With ``only_beside`` none of the VM's own, but what belongs to it: the domain's definition, NVRAM and TPM state.

    ``progress`` is called with the number of logical bytes just done, from several threads, one call at a time.
    Raises: AlreadyExists when a name is taken; CorruptManifest and the other integrity errors; ObjectMissing;
    StoreUnavailable; NoSpace; PrimaryIOError.
    """
    with _translated(to):
        files.call("restore.folder", to.mkdir, mode=0o700, exist_ok=True)
        own = () if only_beside else point.manifest.files
        beside, left_out = _beside(point.manifest, {stored.path.split("/", 1)[0] for stored in own})
        names = sorted(
            {stored.path.split("/", 1)[0] for stored in own} | {each.name.split("/", 1)[0] for each in beside}
        )
        _refuse_taken(files, to, names)
        staging = to / f"{STAGING}{secrets.token_hex(8)}"
        try:
            files.call("restore.folder", staging.mkdir, mode=0o700)
            with closing(WholeFiles(store, point, files=files, workers=workers, progress=progress)) as whole:
                warnings = _write(own, staging, files=files, fill=whole.fill)
            for each in beside:
                _write_beside(staging, each, files=files)
            _move_in(files, staging, to, names)
        finally:
            with contextlib.suppress(OSError):
                files.call("restore.clean", shutil.rmtree, staging, ignore_errors=True)
    told: dict[str, list[str]] = {}
    for each in beside:
        told.setdefault(each.kind, []).append(each.name)
    return RestoreReport(
        len(own), sum(stored.size for stored in own), whole.written_bytes, (*warnings, *left_out), told
    )


@dataclass(frozen=True, slots=True)
class _Beside:
    """A small file that is written beside the VM's own; ``name`` is at most a directory's and a file's."""

    kind: str
    name: str
    data: bytes


def _beside(manifest: Manifest, taken: Collection[str]) -> tuple[list[_Beside], list[str]]:
    """What belongs to a VM and is none of its files, under names that are not ``taken``; and what is wrong with it."""
    warnings: list[str] = []
    try:
        text = manifest.metadata.get(ASSOCIATED, "[]")
        associated = decode_associated(text, manifest_key(manifest.vm_id, manifest.point_id))
    except IntegrityError as exc:
        associated = ()
        warnings.append(f"NVRAM and TPM state are left out: {exc}")
    wanted = [
        _Beside("domain", _xml_name(key.removeprefix(DOMAIN_XML)), text.encode("utf-8", "replace"))
        for key, text in sorted(manifest.metadata.items())
        if key == DOMAIN_XML or key.startswith(f"{DOMAIN_XML}:")
    ]
    wanted += [_Beside(each.kind, each.name, each.data) for each in associated]
    found, taken = [], set(taken)
    for each in sorted(wanted, key=lambda each: "/" in each.name):  # what shares a directory comes last
        name = each.name
        while name.split("/", 1)[0] in taken:
            name = f"vm-{name}"
        found.append(replace(each, name=name))
        taken.update({name} if "/" not in name else ())
    return found, warnings


def _xml_name(of: str) -> str:
    """The name of a file for the definition of a domain; ``of`` is "", or a colon and its name, as anybody wrote it."""
    told = printable(of).replace("/", "_").replace(":", "-", 1).encode("utf-8", "replace")
    return f"domain{told[: NAME_LENGTH_MAX // 2].decode('utf-8', 'ignore')}.xml"


def _write_beside(staging: Path, beside: _Beside, *, files: FileCalls) -> None:
    """Nothing else can be in a fresh folder of ours; state of a TPM is a secret, so nobody else may read it."""
    path = staging / beside.name
    files.call("restore.folder", path.parent.mkdir, mode=0o700, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = files.call("restore.create", os.open, path, flags, 0o600)
    try:
        files.call("restore.write", write_fully, fd, beside.data, 0)
        files.call("restore.sync", os.fsync, fd)
    finally:
        os.close(fd)
    files.call("restore.sync", sync_directory, path.parent)


def _write(own: Sequence[StoredFile], staging: Path, *, files: FileCalls, fill: Fill) -> tuple[str, ...]:
    with closing(PointWriter(own, staging, files=files, fill=fill)) as writer:
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
