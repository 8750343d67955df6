"""Making the files, folders and symlinks of a restore point in a folder of our own: all but what regular files hold.

Paths come from the store and are hostile until proven otherwise: every file is made relative to a descriptor of its
folder, with O_EXCL and O_NOFOLLOW, so neither ``..`` nor a symlink in the restore point leads anywhere else.  Blocking.
This module must not know what the files are for, nor who fills them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from vmfs_stub.core.sites import FileCalls
from vmfs_stub.store.manifest import FileKind, StoredFile, by_folder

XATTRS: Final = ("user.", "system.posix_acl_")
"""Attributes that are restored.  A backup holds others too (labels, capabilities): they mean something on the host that
gave them, and a store is not believed about what gives rights."""

Fill = Callable[[int, int], None]
"""Gives the new file of a descriptor, open for reading and writing, the size and bytes of the file of that number."""


class PointWriter:
    """Writes ``entries``, in their manifest's order, below ``folder``, which is empty.

    Each of ``order`` is to be made, in that order, then `finish` is called; then all of it is on the medium.
    """

    def __init__(self, entries: Sequence[StoredFile], folder: Path, *, files: FileCalls, fill: Fill) -> None:
        """Raises OSError."""
        self._entries = entries
        self._files = files
        self._fill = fill
        self.order = sorted(
            range(len(entries)), key=lambda index: entries[index].path.encode("utf-8", "surrogateescape")
        )
        self._warnings: list[str] = []
        self._not_restored: dict[str, list[str]] = {}
        """Attribute → the paths that have it; such an attribute is often on every file."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._root = files.call("restore.folder", os.open, folder, flags)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._root)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Attributes that this system or user could not set."""
        return (*self._warnings, *_not_restored_warnings(self._not_restored))

    def make(self, index: int) -> None:
        """Make entry number ``index``.  Raises OSError, and what filling raises."""
        stored = self._entries[index]
        with self._folder_of(stored.path) as (folder, name):
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
                    self._fill(fd, index)
                    self._finish(fd, stored)
                finally:
                    os.close(fd)

    def finish(self) -> None:
        """Everything was made: folders get what they are to have, and are synced.  Raises OSError."""
        for folder_path in _implied_folders(self._entries):
            with self._folder_of(f"{folder_path}/.") as (folder, _):
                self._files.call("restore.sync", os.fsync, folder)
        for index in reversed(self.order):  # a folder's times are set when nothing more is made in it
            if self._entries[index].kind is FileKind.DIRECTORY:
                with self._folder_of(f"{self._entries[index].path}/.") as (folder, _):
                    self._finish(folder, self._entries[index])

    @contextlib.contextmanager
    def _folder_of(self, path: str) -> Iterator[tuple[int, str]]:
        """The folder of ``path``, made as needed, and the last name; follows no symlink."""
        *parents, name = path.split("/")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.dup(self._root)
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
