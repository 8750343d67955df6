"""`init --in-place`: an image directory becomes a datastore where it is; `leave` is the way back.

The directory is renamed, and the mount shows it at its old path, so that no definition of a VM has to change.  Nothing
is moved while anybody has a file in it open: whoever opened it before would write past the daemon.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmfs_stub.core.errors import AlreadyExists, ConfigError, InUse, PrimaryIOError, Refused
from vmfs_stub.core.names import TOP_MODE_XATTR
from vmfs_stub.directory_sync import sync_directory
from vmfs_stub.mount.mountpoint import clear_immutable, mounts

if TYPE_CHECKING:
    from vmfs_stub.config import LibvirtConfig

_SUFFIX = ".vmfs-stub"


def backing_for(directory: Path) -> Path:
    """Where the files of ``directory`` go: beside it, on the same filesystem."""
    return directory.with_name(directory.name + _SUFFIX)


def check_directory(directory: Path, backing: Path) -> None:
    """Refuse what cannot become a datastore in place; changes nothing.

    Raises ConfigError, AlreadyExists, Refused, InUse, PrimaryIOError.
    """
    if not directory.is_dir():
        raise ConfigError(f"--in-place {directory}: there is no such directory")
    if os.path.lexists(backing):
        raise AlreadyExists(f"{backing}, where the files of {directory} would go, exists already")
    covered = [mount.mountpoint for mount in mounts() if mount.mountpoint.is_relative_to(directory)]
    if covered:
        raise Refused(
            f"{covered[0]} is a mountpoint and cannot be renamed: mount that filesystem elsewhere, and use --backing "
            "with a directory of it, and --mountpoint"
        )
    _refuse_open_files(directory)


def refuse_running_domains(directory: Path, settings: LibvirtConfig) -> None:
    """Refuse while libvirt runs a domain with a disk in ``directory``, or has the memory of one.

    Raises InUse; HypervisorAway where libvirt is there and does not answer.
    """
    from vmfs_stub.cli.libvirt_checks import is_used
    from vmfs_stub.services.libvirt_hypervisor import LibvirtSettings, look_at_domains

    if not is_used(settings):
        return
    for domain in look_at_domains(LibvirtSettings(settings.uri, settings.timeout_s)):
        paths = [Path(os.path.realpath(path)) for path in domain.paths]
        if not any(path.is_relative_to(directory) for path in paths):
            continue
        if domain.state.value == "saved":
            raise InUse(
                f"domain {domain.name} has a managed save, whose guest takes its disks in {directory} for open: start "
                "it and shut it down, or `virsh managedsave-remove` it"
            )
        if domain.state.value != "off":
            raise InUse(f"domain {domain.name} is {domain.state.value}, with files in {directory}; shut it down first")


@contextmanager
def renamed(directory: Path, backing: Path) -> Iterator[None]:
    """The directory is ``backing`` now, with mode 0700, and an empty one is in its place; undone if the body fails.

    Raises InUse when somebody was quicker and has a file open, PrimaryIOError.
    """
    mode = stat.S_IMODE(directory.stat().st_mode)
    try:
        directory.rename(backing)
    except OSError as exc:
        raise PrimaryIOError(f"cannot rename {directory} to {backing}: {exc.strerror}") from exc
    try:
        # Nothing can be opened by the old path any more; what has been is seen now.
        _refuse_open_files(backing)
        os.setxattr(backing, TOP_MODE_XATTR, f"{mode:o}".encode())
        backing.chmod(0o700)
        directory.mkdir(mode=0o755)
        sync_directory(directory.parent)
        yield
    except BaseException:
        _undo(directory, backing, mode)
        raise


def _undo(directory: Path, backing: Path, mode: int) -> None:
    with suppress(FileNotFoundError):
        clear_immutable(directory)
        directory.rmdir()
    backing.chmod(mode)
    with suppress(OSError):
        os.removexattr(backing, TOP_MODE_XATTR)
    backing.rename(directory)
    sync_directory(directory.parent)


def _refuse_open_files(directory: Path) -> None:
    """The kernel grants a write lease only of a file that nobody else has open; it is given up at once."""
    # Whoever opens one meanwhile waits for that moment; the signal that tells of it would end this process.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    for folder, _, names in os.walk(directory, onerror=_fail):
        for name in names:
            path = Path(folder, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as exc:
                if exc.errno == errno.EWOULDBLOCK:
                    raise InUse(f"{path} is in use: close it, or shut its VM down, first") from exc
                raise PrimaryIOError(f"{path} cannot be opened: {exc.strerror}") from exc
            try:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    raise PrimaryIOError(f"whether {path} is open cannot be told: {exc.strerror}") from exc
                raise InUse(f"{path} is open: close it, or shut its VM down, first") from exc
            finally:
                os.close(fd)


def _fail(exc: OSError) -> None:
    raise PrimaryIOError(f"{exc.filename} cannot be looked into: {exc.strerror}") from exc
