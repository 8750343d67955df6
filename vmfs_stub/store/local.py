"""A directory as an object store, durable through power loss.

Invariants: an object appears under its name only when its bytes are on the medium (write, fsync, link or rename,
fsync of the folder and of every folder made for it); nothing is changed in place; files are 0600, folders 0700.
All calls are relative to a descriptor of the root taken at start: when the filesystem is unmounted under us, nothing
lands in (or is declared missing because of) the empty mountpoint beneath.

This module must not know what the objects mean.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import (
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from vmfs_stub.directory_sync import sync_directory
from vmfs_stub.paced_io import read_into, stop_read_ahead, write_buffers
from vmfs_stub.store.keys import STORE_KEY, check_key, check_prefix
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, oversized, truncated

TEMPORARY: Final = ".vmfs-stub-tmp"
TEMPORARY_AGE_S: Final = 3600.0
"""A temporary file of this host older than this was left by a crash: a put takes seconds."""

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_VERB_READ: Final = "read"
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


class LocalObjects:
    """Object store in a local (or network-mounted) directory.

    Attributes: ``root`` is the directory, for messages only; ``_durable`` holds the folders whose own directory
    entries are known to be on the medium; it only grows, by at most the fan-out of the format.
    """

    def __init__(self, root: Path, *, create: bool = True, clock: Callable[[], float] = time.time) -> None:
        """Open ``root``, making it when absent (its parent must exist); without ``create`` it must hold a store.

        Raises: StoreUnavailable, StoreDenied; ObjectMissing where there is no store.
        """
        self.root = root
        self._clock = clock
        self._host = _host_tag()
        self._serial = itertools.count()
        self._session = secrets.token_hex(8)
        self._durable: set[str] = set()
        self._lock = threading.Lock()
        with _translated(str(root), "open"):
            if not create and not (root / STORE_KEY).exists():
                raise ObjectMissing(f"there is no vmfs-stub store in {root}; is what belongs there mounted?")
            if not root.is_dir():
                root.mkdir(mode=0o700)
                sync_directory(root.absolute().parent)
            with contextlib.ExitStack() as opened:
                self._root_fd = os.open(root, _FOLDER)
                opened.callback(os.close, self._root_fd)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(TEMPORARY, 0o700, dir_fd=self._root_fd)
                self._temporary_fd = os.open(TEMPORARY, _FOLDER | os.O_NOFOLLOW, dir_fd=self._root_fd)
                opened.callback(os.close, self._temporary_fd)
                self._sweep()
                opened.pop_all()  # from here on `close` closes them

    def close(self) -> None:
        """Give the descriptors back; no call is allowed afterwards."""
        os.close(self._temporary_fd)
        os.close(self._root_fd)

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object; see ObjectStore."""
        with self._opened(key) as (fd, size):
            if size > size_max:
                raise oversized(key, size=size, size_max=size_max)
            return bytes(_read(fd, key, offset=0, length=size))

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes; see ObjectStore."""
        with self._opened(key) as (fd, size):
            if offset < 0 or length < 0 or offset + length > size:
                raise truncated(key, offset=offset, length=length)
            return _read(fd, key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object durably; see ObjectStore."""
        check_key(key)
        with _translated(key, "write"), self._present():
            folder = os.path.dirname(key)
            self._make_folder(folder)
            temporary = f"{self._host}.{self._session}.{next(self._serial)}"
            try:
                self._write_temporary(temporary, data)
                if if_absent:
                    os.link(temporary, key, src_dir_fd=self._temporary_fd, dst_dir_fd=self._root_fd)
                else:
                    os.rename(temporary, key, src_dir_fd=self._temporary_fd, dst_dir_fd=self._root_fd)
            except FileExistsError as exc:
                # Whoever made it may not have synced its name yet, and the caller may be about to depend on it.
                self._sync_folder(folder)
                msg = f"{key}: exists already in {self.root}"
                raise ObjectExists(msg) from exc
            except FileNotFoundError:
                self._forget_folders()  # somebody removed an empty one: the next attempt makes it again
                raise
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._temporary_fd)
            try:
                self._sync_folder(folder)
            except OSError:
                if if_absent:  # a retry must not take a name that may not be durable for its own success
                    with contextlib.suppress(OSError):
                        os.unlink(key, dir_fd=self._root_fd)
                raise

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder; see ObjectStore."""
        check_prefix(prefix)
        with _translated(prefix or str(self.root), "list"), self._present():
            yield from self._walk(prefix)
            if self._is_removed():
                raise FileNotFoundError

    def delete(self, key: str) -> None:
        """Remove an object; see ObjectStore."""
        check_key(key)
        with _translated(key, "delete"), self._present():
            try:
                os.unlink(key, dir_fd=self._root_fd)
            except (FileNotFoundError, NotADirectoryError):
                if self._is_removed():
                    raise
                return
            self._sync_folder(os.path.dirname(key))

    def size(self, key: str) -> int:
        """Size in bytes; see ObjectStore."""
        with self._opened(key) as (_, size):
            return size

    def drop_cache(self, key: str) -> None:
        """Forget the cached pages of an object, so that the next read proves the medium."""
        with contextlib.suppress(StoreError), self._opened(key) as (fd, _):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def _present(self) -> Iterator[None]:
        """In a directory that was removed nothing is found, whatever has been put in its place: say so instead."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            if self._is_removed():
                raise OSError(errno.ESTALE, "its directory was removed") from None
            raise

    def _is_removed(self) -> bool:
        return os.fstat(self._root_fd).st_nlink == 0

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        check_key(key)
        with _translated(key, _VERB_READ), self._present():
            fd = os.open(key, _READ, dir_fd=self._root_fd)
            try:
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    msg = f"{key}: is not in the store (a folder has that name)"
                    raise ObjectMissing(msg)
                if not stat.S_ISREG(status.st_mode):
                    msg = f"{key}: is not a regular file in {self.root}"
                    raise StoreDenied(msg)
                yield fd, status.st_size
            finally:
                os.close(fd)

    def _write_temporary(self, name: str, data: Buffer) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._temporary_fd)
        try:
            write_buffers(fd, [memoryview(data).cast("B")], 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _make_folder(self, folder: str) -> None:
        """Make a folder and its parents, and their directory entries durable, once per process.

        Also for folders that exist: whoever made one may not have synced its parent yet.
        """
        if not folder or folder in self._durable:
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700, dir_fd=self._root_fd)
        self._sync_folder(parent)
        with self._lock:
            self._durable.add(folder)

    def _forget_folders(self) -> None:
        with self._lock:
            self._durable.clear()

    def _sync_folder(self, folder: str) -> None:
        fd = os.open(folder or ".", _FOLDER, dir_fd=self._root_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        try:
            fd = os.open(prefix or ".", _FOLDER, dir_fd=self._root_fd)
        except FileNotFoundError:
            return
        folders = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            size = entry.stat(follow_symlinks=False).st_size
                            yield ObjectInfo(prefix + entry.name, size)
        finally:
            os.close(fd)
        for folder in folders:
            yield from self._walk(folder)

    def _sweep(self) -> None:
        """Remove this host's temporary files that a crash left behind; others' and recent ones stay."""
        oldest = self._clock() - TEMPORARY_AGE_S
        for name in os.listdir(self._temporary_fd):  # noqa: PTH208 - of a descriptor
            if not name.startswith(f"{self._host}."):
                continue
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=self._temporary_fd, follow_symlinks=False).st_mtime < oldest:
                    os.unlink(name, dir_fd=self._temporary_fd)


def _read(fd: int, key: str, *, offset: int, length: int) -> bytearray:
    stop_read_ahead(fd)
    data = bytearray(length)
    if read_into(fd, data, offset) < length:
        raise truncated(key, offset=offset, length=length)
    return data


def _host_tag() -> str:
    """A name for this host in temporary file names: stable over reboots, unlike between hosts."""
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in os.uname().nodename)[:64] or "host"


@contextlib.contextmanager
def _translated(what: str, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _store_error(exc, what, verb) from exc


def _store_error(exc: OSError, what: str, verb: str) -> StoreError:
    reason = exc.strerror or str(exc)
    if verb == _VERB_READ and exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return ObjectMissing(f"{what}: is not in the store ({reason})")
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{what}: cannot {verb}: no room left in the store ({reason})")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP):
        return StoreDenied(f"{what}: cannot {verb}: {reason}; check the permissions of the store's directory")
    return StoreUnavailable(f"{what}: cannot {verb}: {reason}; check the store's disk")
