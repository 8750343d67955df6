"""How the files of a VM are described in a manifest: what restore needs to write them out again.

Symbolic links are stored as they are and never followed; private extended attributes are left out.  FIFOs, sockets and
devices have no bytes to back up: they are left out too, and the job says so.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.names import XATTR_PREFIX, printable
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.tree import Entry, OnError, open_beneath, reopen, walk
from vmfs_stub.store.manifest import FileKind, StoredFile


def public_xattrs(fd: int, *, files: FileCalls) -> dict[str, bytes]:
    """Extended attributes of an open file or directory, without our own.  Raises OSError."""
    names = files.call("archive.xattrs", os.listxattr, fd)
    public = [name for name in names if not name.startswith(XATTR_PREFIX)]
    return {name: files.call("archive.xattrs", os.getxattr, fd, name) for name in public}


def stored_file(
    path: str,
    st: os.stat_result,
    *,
    mtime_ns: int,
    xattrs: Mapping[str, bytes],
) -> StoredFile:
    """A regular file, without its segments; ``path`` is relative to the VM, ``mtime_ns`` what stat reports of it."""
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
    )


@dataclass(frozen=True, slots=True)
class OtherEntries:
    """What a VM has besides regular files; ``left_out`` are the paths of what no backup holds.

    ``top`` is the directory that all is in, with its name as path; None for a VM that is one file.  ``seen`` is all
    that was found in it, regular files too, by paths from there.
    """

    stored: list[StoredFile]
    left_out: list[str]
    top: StoredFile | None
    seen: dict[str, os.stat_result] = field(default_factory=dict)

    def has_same_names(self, other: OtherEntries) -> bool:
        """Whether the same names stood for the same entries when ``other`` was found."""
        return {path: st.st_ino for path, st in self.seen.items()} == {
            path: st.st_ino for path, st in other.seen.items()
        }

    def has_files(self, vm: Vm) -> bool:
        """Whether the regular files in the VM's directory are those that ``vm`` says; true of a VM without one."""
        if self.top is None:
            return True
        own = {file.relative: file.ino for file in vm.files if is_inside(vm, file)}
        return own == {path: st.st_ino for path, st in self.seen.items() if stat.S_ISREG(st.st_mode)}


def is_inside(vm: Vm, file: VmFile) -> bool:
    """Whether a file of a VM that is a directory lies in it; its guest's memory may lie elsewhere."""
    return file.path == f"{vm.path}/{file.relative}"


def with_files_of(vm: Vm, found: OtherEntries) -> Vm:
    """The VM with the files that its directory had when ``found`` was."""
    if found.top is None or found.has_files(vm):
        return vm
    inside = [
        VmFile(f"{vm.path}/{path}", path, st.st_size, st.st_ino)
        for path, st in found.seen.items()
        if stat.S_ISREG(st.st_mode)
    ]
    elsewhere = [file for file in vm.files if not is_inside(vm, file)]
    return replace(vm, files=(*sorted(inside, key=lambda file: file.relative), *elsewhere))


def other_entries(backing: Path, vm: Vm, *, files: FileCalls = PLAIN) -> OtherEntries:
    """Directories and symbolic links of a VM, outermost first; what vanishes meanwhile is not among them.

    Raises PrimaryIOError.
    """
    if not vm.is_directory:
        return OtherEntries([], [], None)
    failed: list[tuple[str, OSError]] = []
    try:
        found = _walked(files, backing, vm, lambda path, exc: failed.append((path, exc)))
    except OSError as exc:
        raise PrimaryIOError(f"VM {vm.name}: cannot read its directory: {exc.strerror}") from exc
    for path, error in failed:
        # A user who renames directories meanwhile may have any state of them backed up.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise PrimaryIOError(f"VM {vm.name}: cannot read {printable(path)}: {error.strerror}") from error
    return found


def _walked(files: FileCalls, backing: Path, vm: Vm, on_error: OnError) -> OtherEntries:
    backing_fd = files.call("archive.backing", os.open, backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        top_fd = files.call("archive.look", open_beneath, backing_fd, vm.path)
    finally:
        os.close(backing_fd)
    try:
        top = Entry(vm.path, top_fd, os.fstat(top_fd))
        stored_top = _entry(top, FileKind.DIRECTORY, xattrs=_directory_xattrs(files, top))
        found = OtherEntries([], [], stored_top)
        with closing(walk(top_fd, on_error, files=files, site="archive.walk")) as entries:
            for entry in entries:
                mode = entry.st.st_mode
                found.seen[entry.path] = entry.st
                if stat.S_ISDIR(mode):
                    found.stored.append(_entry(entry, FileKind.DIRECTORY, xattrs=_directory_xattrs(files, entry)))
                elif stat.S_ISLNK(mode):
                    target = files.call("archive.readlink", os.readlink, "", dir_fd=entry.path_fd)
                    found.stored.append(_entry(entry, FileKind.SYMLINK, target=target))
                elif not stat.S_ISREG(mode):
                    found.left_out.append(entry.path)
        return found
    finally:
        os.close(top_fd)


def _directory_xattrs(files: FileCalls, entry: Entry) -> dict[str, bytes]:
    fd = files.call("archive.xattrs", reopen, entry.path_fd, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return public_xattrs(fd, files=files)
    finally:
        os.close(fd)


def _entry(
    entry: Entry, kind: FileKind, *, target: str | None = None, xattrs: Mapping[str, bytes] | None = None
) -> StoredFile:
    st = entry.st
    return StoredFile(
        path=entry.path,
        kind=kind,
        size=0,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        mtime_ns=st.st_mtime_ns,
        atime_ns=st.st_atime_ns,
        xattrs={} if xattrs is None else xattrs,
        target=target,
    )
