"""What is mounted where, and the directory that the mount covers.

While nothing is mounted it must be empty and unwritable, so that a VM start fails instead of finding no disk and
making one; the immutable flag keeps even root from writing there, and stays set under the mount.  Nothing here may
touch a mount that this process serves: the kernel's list of mounts is read instead.  The command line uses this too,
so nothing that serves a mount may be imported.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import AlreadyExists, ConfigError, InUse, PrimaryIOError
from vmfs_stub.mount import syscalls

_log = logging.getLogger(__name__)

FILESYSTEM_TYPE: Final = "fuse.vmfs-stub"
_DEAD: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.EIO})
_NO_FLAG: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ENOSYS})
_ANSWER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the kernel's list: mount id, where, the filesystem's type, the source, the device's minor number."""

    mount_id: int
    mountpoint: Path
    kind: str
    source: str
    device_minor: int


def mounts() -> list[Mounted]:
    """All mounts of this process's namespace, the visible one of a mountpoint last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        mount_id, _parent, device, _root, target = fields.split(b" ")[:5]
        kind, source = (os.fsdecode(_unescape(field)) for field in rest.split(b" ")[:2])
        where = Path(os.fsdecode(_unescape(target)))
        found.append(Mounted(int(mount_id), where, kind, source, int(device.split(b":")[1])))
    return found


def mounts_at(mountpoint: Path) -> list[Mounted]:
    """What is mounted at a path, the visible one last."""
    return [mount for mount in mounts() if mount.mountpoint == mountpoint]


def mount_of(path: Path) -> Mounted:
    """The mount that ``path`` (absolute, no symlinks) lies on; of unknown type in a chroot that is no mount."""
    return max(
        (mount for mount in mounts() if path.is_relative_to(mount.mountpoint)),
        key=lambda mount: len(mount.mountpoint.parts),
        default=Mounted(0, Path("/"), "unknown", "", 0),
    )


def is_mounted(mountpoint: Path) -> bool:
    """Whether a FUSE filesystem is what one sees there."""
    here = mounts_at(mountpoint)
    return bool(here) and here[-1].kind.startswith("fuse")


def is_dead(mountpoint: Path) -> bool:
    """Whether the FUSE mount there has lost its daemon: every call into it fails with ENOTCONN.

    A mount whose daemon lives but does not answer is not dead; asking it is given up after a while.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            os.statvfs(mountpoint)  # never answered from a cache
        except OSError as exc:
            answers.put(exc.errno in (errno.ENOTCONN, errno.ECONNABORTED))
        else:
            answers.put(False)

    threading.Thread(target=ask, name="statvfs of the mount", daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_S)
    except queue.Empty:
        return False


def prepare(mountpoint: Path) -> None:
    """Make a mountpoint ready: dead mounts detached, there, empty, immutable.

    Raises InUse for a live mount, AlreadyExists for files in it, ConfigError for what is not a directory.  May sleep
    for long where a foreign mount does not answer.
    """
    _detach_dead_mounts(mountpoint)
    try:
        mountpoint.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as exc:
        raise ConfigError(f"the mountpoint {mountpoint} is not a directory: {exc.strerror}; make it first") from exc
    except OSError as exc:
        raise PrimaryIOError(f"the mountpoint {mountpoint} cannot be opened: {exc.strerror}") from exc
    try:
        if os.listdir(fd):  # noqa: PTH208 - a Path cannot be a descriptor
            raise AlreadyExists(f"the mountpoint {mountpoint} is not empty: mounting there would hide its files")
        if not _set_if_possible(fd, immutable=True):
            _log.warning(
                "the mountpoint %s cannot be made immutable: while nothing is mounted there, root can write to it",
                mountpoint,
            )
    finally:
        os.close(fd)


def is_immutable(mountpoint: Path) -> bool | None:
    """Whether the flag is set; None where the filesystem has no such flag.  Raises OSError."""
    with _opened(mountpoint) as fd:
        try:
            return syscalls.is_immutable(fd)
        except OSError:
            return None


def make_immutable(mountpoint: Path) -> None:
    """Set the flag; raises OSError where that is not possible."""
    with _opened(mountpoint) as fd:
        syscalls.set_immutable(fd, immutable=True)


def clear_immutable(mountpoint: Path) -> None:
    """Make a mountpoint that nothing is mounted at an ordinary directory again."""
    with _opened(mountpoint) as fd:
        _set_if_possible(fd, immutable=False)


def _set_if_possible(fd: int, *, immutable: bool) -> bool:
    """False where the filesystem has no such flag, or this process may not set it."""
    try:
        syscalls.set_immutable(fd, immutable=immutable)
    except OSError as exc:
        if exc.errno in _NO_FLAG:
            return False
        raise
    return True


def unmount(mountpoint: Path) -> None:
    """Unmount; InUse when somebody has a file or a working directory there."""
    try:
        syscalls.unmount(os.fsencode(mountpoint))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise InUse(f"{mountpoint} is in use: close what is open there, or unmount with --force") from exc
        if exc.errno != errno.EINVAL:
            raise PrimaryIOError(f"{mountpoint} cannot be unmounted: {exc.strerror}") from exc


def detach(mountpoint: Path, *, abort: bool = False) -> None:
    """Take the mount out of the tree at once; ``abort`` also fails every request and every later call on open files.

    Without ``abort``, files that are open stay usable as long as the daemon serves.
    """
    flags = syscalls.MNT_DETACH | (syscalls.MNT_FORCE if abort else 0)
    try:
        syscalls.unmount(os.fsencode(mountpoint), flags=flags)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise PrimaryIOError(f"{mountpoint} cannot be unmounted: {exc.strerror}") from exc


def _detach_dead_mounts(mountpoint: Path) -> None:
    while mounted := mounts_at(mountpoint):
        top = mounted[-1]
        try:
            os.statvfs(mountpoint)  # never answered from a cache
        except OSError as exc:
            if exc.errno not in _DEAD or not top.kind.startswith("fuse"):
                raise InUse(f"{mountpoint} has a mount of {top.kind} that answers {exc.strerror}") from exc
            _log.warning("%s has a dead mount of %s (%s): detaching it", mountpoint, top.source, top.kind)
            detach(mountpoint)
        else:
            raise InUse(f"{top.source} ({top.kind}) is already mounted at {mountpoint}: unmount it first")


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _unescape(field: bytes) -> bytes:
    """Undo the octal escapes of mountinfo."""
    head, *rest = field.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
