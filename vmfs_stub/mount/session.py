"""The /dev/fuse descriptor: opening, mounting and handing it to libfuse.

The descriptor and the kernel's INIT request are all that a process needs to serve a mount (`KernelChannel`).
Blocking; runs in a worker thread, before requests are served.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import InUse, PrimaryIOError, Unsupported
from vmfs_stub.mount import handshake, mountpoint, syscalls
from vmfs_stub.mount.settings import MountSettings

_log = logging.getLogger(__name__)

_DEVICE: Final = "/dev/fuse"
_MOUNT_FLAGS: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV


@dataclass(frozen=True, slots=True)
class KernelChannel:
    """A mounted /dev/fuse descriptor, non-blocking, whose INIT request has been answered."""

    fd: int
    init_request: bytes
    mountpoint: Path
    device_minor: int


def mount_channel(target: Path, settings: MountSettings) -> KernelChannel:
    """Mount at ``target``, which `mountpoint.prepare` has made ready, and answer INIT.

    Raises Unsupported where there is no (recent) FUSE, PrimaryIOError where it cannot be mounted.
    """
    raise_descriptor_limit()
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise Unsupported(f"{_DEVICE} cannot be opened: {exc.strerror}; load the fuse module") from exc
    try:
        _mount(fd, target, settings)
        try:
            request = _receive_init(fd, settings.start_timeout_s)
            os.write(fd, handshake.answer_init(handshake.parse_init(request), settings))
            minor = mountpoint.mounts_at(target)[-1].device_minor
            _set_readahead(minor, settings.readahead_bytes)
        except BaseException:
            mountpoint.detach(target, abort=True)
            raise
    except BaseException:
        os.close(fd)
        raise
    return KernelChannel(fd, request, target, minor)


@contextlib.contextmanager
def libfuse_end(channel: KernelChannel) -> Iterator[int]:
    """A descriptor for libfuse on which it reads the INIT request again, to be replaced by ``swap_in``.

    libfuse owns the descriptor once it has been told of it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(channel.init_request)
        yield theirs.detach()


def swap_in(channel: KernelChannel, libfuse_fd: int) -> None:
    """Put the kernel's descriptor in the place of the one that libfuse reads."""
    os.dup2(channel.fd, libfuse_fd, inheritable=False)


def take_away(channel: KernelChannel) -> None:
    """Unmount a channel's mount if it is still there: cleanly when nothing is open, else out of the tree."""
    mounted = mountpoint.mounts_at(channel.mountpoint)
    if not mounted or mounted[-1].device_minor != channel.device_minor:
        return
    try:
        mountpoint.unmount(channel.mountpoint)
    except InUse:
        _log.warning("%s is still in use: files that are open there will fail", channel.mountpoint)
        mountpoint.detach(channel.mountpoint)


def raise_descriptor_limit() -> int:
    """Let the process have as many descriptors as the kernel allows: each file the kernel knows needs one."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            return limit
    return _soft


def have_unused_forgotten(channel: KernelChannel) -> None:
    """Have the kernel forget every name that nobody uses, and tell so of their inodes; what is open stays.

    To mount again what is mounted, without a change, drops the names that are cached.  Requests must be answered
    meanwhile: it writes out dirty pages first.  Raises OSError.
    """
    mounted = mountpoint.mounts_at(channel.mountpoint)
    if mounted and mounted[-1].device_minor == channel.device_minor:
        target = os.fsencode(channel.mountpoint)
        syscalls.mount(b"none", target, b"none", flags=syscalls.MS_REMOUNT | _MOUNT_FLAGS, options=b"")


def descriptors_max() -> int:
    """How many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _mount(fd: int, target: Path, settings: MountSettings) -> None:
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    if settings.allow_other:
        options += ",allow_other"
    try:
        syscalls.mount(
            os.fsencode(settings.name),
            os.fsencode(target),
            os.fsencode(mountpoint.FILESYSTEM_TYPE),
            flags=_MOUNT_FLAGS,
            options=os.fsencode(options),
        )
    except OSError as exc:
        hint = "run as root" if exc.errno == errno.EPERM else "see the kernel's log"
        raise PrimaryIOError(f"{settings.name} cannot be mounted at {target}: {exc.strerror}; {hint}") from exc


def _receive_init(fd: int, timeout_s: float) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        raise Unsupported(f"the kernel sent no FUSE INIT request within {timeout_s:g} s")
    return os.read(fd, handshake.REQUEST_BYTES_MAX)


def _set_readahead(device_minor: int, readahead_bytes: int) -> None:
    """The kernel caps INIT's read-ahead at its default of 128 KiB, which is raised here where sysfs can be written."""
    try:
        Path(f"/sys/class/bdi/0:{device_minor}/read_ahead_kb").write_text(str(readahead_bytes // 1024))
    except OSError as exc:
        _log.info("read-ahead of the mount stays at the kernel's default: %s", exc.strerror)
