"""How the files of a VM are described in a manifest: what restore needs to write them out again.

Symbolic links are stored as they are and never followed; private extended attributes are left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vmfs_stub.core.ids import SegmentId
from vmfs_stub.core.names import XATTR_PREFIX
from vmfs_stub.inventory.vm import Vm
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
    """Directories and symbolic links of a VM, outermost first.  Raises OSError."""
    stored: list[StoredFile] = []
    if not vm.is_directory:
        return stored
    top = backing / vm.path
    for directory, folders, names, fd in os.fwalk(top, follow_symlinks=False):
        for name in (*sorted(folders), *sorted(names)):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            relative = str(Path(directory, name).relative_to(top))
            if stat.S_ISDIR(st.st_mode):
                stored.append(_entry(relative, st, FileKind.DIRECTORY, target=None))
            elif stat.S_ISLNK(st.st_mode):
                stored.append(_entry(relative, st, FileKind.SYMLINK, target=os.readlink(name, dir_fd=fd)))
    return stored


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
