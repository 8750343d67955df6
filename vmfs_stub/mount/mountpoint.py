"""The directory that the mount covers, and what is mounted there.

While nothing is mounted it must be empty and unwritable, so that a VM start fails instead of finding no disk and
making one; the immutable flag keeps even root from writing there, and stays set under the mount.  Nothing here may
touch a mount that this process serves: the kernel's list of mounts is read instead.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import AlreadyExists, ConfigError, InUse, PrimaryIOError
from vmfs_stub.mount import syscalls

_log = logging.getLogger(__name__)

FILESYSTEM_TYPE: Final = "fuse.vmfs-stub"
_DEAD: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.EIO})


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the kernel's list: mount id, the filesystem's type, the source, and the device's minor number."""

    mount_id: int
    kind: str
    source: str
    device_minor: int


def mounts_at(mountpoint: Path) -> list[Mounted]:
    """What is mounted at a path, the visible one last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        mount_id, _parent, device, _root, target = fields.split(b" ")[:5]
        if _unescape(target) == os.fsencode(mountpoint):
            kind, source = rest.split(b" ")[:2]
            found.append(
                Mounted(int(mount_id), kind.decode(), os.fsdecode(_unescape(source)), int(device.split(b":")[1]))
            )
    return found


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
        if not syscalls.set_immutable(fd, immutable=True):
            _log.warning(
                "the mountpoint %s cannot be made immutable: while nothing is mounted there, root can write to it",
                mountpoint,
            )
    finally:
        os.close(fd)


def clear_immutable(mountpoint: Path) -> None:
    """Make a mountpoint that nothing is mounted at an ordinary directory again."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.set_immutable(fd, immutable=False)
    finally:
        os.close(fd)


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
            mountpoint.stat()
        except OSError as exc:
            if exc.errno not in _DEAD or not top.kind.startswith("fuse"):
                raise InUse(f"{mountpoint} has a mount of {top.kind} that answers {exc.strerror}") from exc
            _log.warning("%s has a dead mount of %s (%s): detaching it", mountpoint, top.source, top.kind)
            detach(mountpoint)
        else:
            raise InUse(f"{top.source} ({top.kind}) is already mounted at {mountpoint}: unmount it first")


def _unescape(field: bytes) -> bytes:
    """Undo the octal escapes of mountinfo."""
    head, *rest = field.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
