"""How the files of a VM are described in a manifest: what restore needs to write them out again.

Symbolic links are stored as they are and never followed; private extended attributes are left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.ids import SegmentId
from vmfs_stub.core.names import XATTR_PREFIX, printable
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.tree import Entry, OnError, open_beneath, walk
from vmfs_stub.store.manifest import FileKind, StoredFile


def public_xattrs(fd: int) -> dict[str, bytes]:
    """Extended attributes of an open file, without our own.  Raises OSError."""
    return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if not name.startswith(XATTR_PREFIX)}


def stored_file(
    path: str,
    st: os.stat_result,
    *,
    mtime_ns: int,
    xattrs: Mapping[str, bytes],
    segments: tuple[SegmentId | None, ...],
) -> StoredFile:
    """A regular file; ``path`` is relative to the VM, ``mtime_ns`` what stat reports of it."""
    return StoredFile(
        path=path,
        kind=FileKind.FILE,
        size=st.st_size,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        mtime_ns=mtime_ns,
        atime_ns=st.st_atime_ns,
        xattrs=xattrs,
        segments=segments,
    )


def other_entries(backing: Path, vm: Vm) -> list[StoredFile]:
    """Directories and symbolic links of a VM, outermost first; what vanishes meanwhile is left out.

    Raises PrimaryIOError.
    """
    if not vm.is_directory:
        return []
    failed: list[tuple[str, OSError]] = []
    try:
        stored = _walked(backing, vm, lambda path, exc: failed.append((path, exc)))
    except OSError as exc:
        raise PrimaryIOError(f"VM {vm.name}: cannot read its directory: {exc.strerror}") from exc
    for path, error in failed:
        # A user who renames directories meanwhile may have any state of them backed up.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise PrimaryIOError(f"VM {vm.name}: cannot read {printable(path)}: {error.strerror}") from error
    return stored


def _walked(backing: Path, vm: Vm, on_error: OnError) -> list[StoredFile]:
    backing_fd = os.open(backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        top_fd = open_beneath(backing_fd, vm.path)
    finally:
        os.close(backing_fd)
    try:
        return [found for entry in walk(top_fd, on_error) if (found := _of_entry(entry)) is not None]
    finally:
        os.close(top_fd)


def _of_entry(entry: Entry) -> StoredFile | None:
    if stat.S_ISDIR(entry.st.st_mode):
        return _entry(entry.path, entry.st, FileKind.DIRECTORY, target=None)
    if stat.S_ISLNK(entry.st.st_mode):
        return _entry(entry.path, entry.st, FileKind.SYMLINK, target=os.readlink("", dir_fd=entry.path_fd))
    return None


def _entry(path: str, st: os.stat_result, kind: FileKind, *, target: str | None) -> StoredFile:
    return StoredFile(
        path=path,
        kind=kind,
        size=0,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        mtime_ns=st.st_mtime_ns,
        atime_ns=st.st_atime_ns,
        target=target,
    )
