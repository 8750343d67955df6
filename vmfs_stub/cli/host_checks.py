"""What `doctor` looks at on this host; each check yields findings with their remedies.

A check changes nothing, but for an object that it puts into the store and deletes again (of a directory as the store,
an empty folder stays), and calls into the mount only with a limit of time.  A check that itself fails is a finding, not
an error.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmfs_stub.cli.context import open_store, replicated
from vmfs_stub.cli.init import probe_xattrs
from vmfs_stub.cli.output import bytes_text
from vmfs_stub.core.errors import DaemonUnreachable, OtherDatastore, StoreKeyError, VmfsStubError
from vmfs_stub.mount.mountpoint import is_dead, is_immutable, is_mounted, mount_of
from vmfs_stub.services.datastore_lock import WATCHED_S, served_elsewhere

if TYPE_CHECKING:
    from vmfs_stub.config import Config

Severity = Literal["ok", "note", "warning", "problem"]

_KERNEL_MIN = (5, 17)
"""The mount speaks FUSE protocol 7.36 and looks names up with openat2(RESOLVE_CACHED)."""
_CAPABILITIES = {
    "CAP_SYS_ADMIN": (21, "mounting, and the trusted.* attributes of placeholders"),
    "CAP_LINUX_IMMUTABLE": (9, "a mountpoint that nobody can write into while nothing is mounted"),
    "CAP_LEASE": (28, "reserving the disks of other users for a backup"),
}
"""Name → number, and what needs it."""
_UNSTABLE = frozenset({"tmpfs", "ramfs", "overlay", "aufs"})
_FUSE_TIMEOUT = Path("/proc/sys/fs/fuse/max_request_timeout")


@dataclass(frozen=True, slots=True)
class HostFinding:
    """One thing looked at; ``remedy`` says what to do unless it is ok."""

    severity: Severity
    subject: str
    message: str
    remedy: str = ""


Check = Callable[["Config"], Iterator[HostFinding]]


def examine(config: Config) -> list[HostFinding]:
    """All checks, in the order in which one would set a host up."""
    found: list[HostFinding] = []
    for check in CHECKS:
        try:
            found += check(config)
        except PermissionError as exc:
            message = f"{exc.filename} could not be looked at: {exc.strerror}"
            found.append(HostFinding("problem", check.__name__, message, "be root"))
        except (OSError, VmfsStubError) as exc:
            found.append(HostFinding("problem", check.__name__, f"could not be looked at: {exc}", "see the message"))
    return found


def configuration(config: Config) -> Iterator[HostFinding]:
    """Allowed, but most likely not meant."""
    for warning in config.warnings:
        yield HostFinding("warning", "configuration", warning, "change it in the configuration file")


def fuse_device(config: Config, path: Path = Path("/dev/fuse")) -> Iterator[HostFinding]:
    """The device; fusermount3 is not needed, since the daemon mounts as root itself."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        yield HostFinding("problem", "fuse", f"{path} cannot be opened: {exc.strerror}", "modprobe fuse; be root")
    else:
        yield HostFinding("ok", "fuse", f"{path} can be opened")


def kernel(config: Config) -> Iterator[HostFinding]:
    """Whether the mount works with this kernel."""
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _KERNEL_MIN:
        yield HostFinding("problem", "kernel", f"{release} is too old", "use 5.17 or later")
    else:
        yield HostFinding("ok", "kernel", release)


def privileges(config: Config, status_file: Path = Path("/proc/self/status")) -> Iterator[HostFinding]:
    """What the daemon does that not every root may do: a container's has fewer capabilities."""
    status = status_file.read_text(encoding="ascii", errors="replace")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    held = int(match[1], 16) if match else 0
    missing = {name: use for name, (bit, use) in _CAPABILITIES.items() if not held >> bit & 1}
    for name, use in missing.items():
        option = name.removeprefix("CAP_")
        remedy = f"run vmfs-stub as root; in a container pass --cap-add {option}"
        yield HostFinding("problem", "privileges", f"{name} is missing, which is needed for {use}", remedy)
    if not missing:
        yield HostFinding("ok", "privileges", f"this process has {', '.join(_CAPABILITIES)}")


def backing(config: Config) -> Iterator[HostFinding]:
    """The backing directory: mode, filesystem, attributes, room."""
    path = config.datastore.backing
    if not path.is_dir():
        remedy = f"mount what belongs there; for a new datastore: mkdir -m 0700 {path}"
        yield HostFinding("problem", "backing", f"{path} is no directory", remedy)
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield HostFinding(
            "problem",
            "backing",
            f"{path} has mode {mode:04o}: others could take a sparse placeholder for a disk",
            f"chmod 0700 {path}",
        )
    here = mount_of(Path(os.path.realpath(path)))
    if here.kind in _UNSTABLE or here.kind.startswith("fuse"):
        yield HostFinding(
            "problem",
            "backing",
            f"{path} is on {here.kind} ({here.mountpoint}): inodes, attributes or data do not last there",
            "use a filesystem on a disk, such as ext4, XFS or Btrfs",
        )
    try:
        probe_xattrs(path)
    except VmfsStubError as exc:
        yield HostFinding("problem", "backing", str(exc), "root must be able to make files with attributes there")
    else:
        yield HostFinding("ok", "backing", f"{path} ({here.kind}) has trusted.* attributes")
    yield from _room(path, config.primary.free_floor_percent)


def other_hosts(config: Config) -> Iterator[HostFinding]:
    """Shared storage may let two hosts at one backing directory; the one that serves it says so there."""
    mark = served_elsewhere(config.private_dir)
    if mark is not None:
        remedy = f"`vmfs-stub unmount` there; if it has crashed, none: a start here finds out within {WATCHED_S:g} s"
        yield HostFinding("warning", "other hosts", f"{config.datastore.backing} is, or was, served by {mark}", remedy)


def _room(path: Path, floor_percent: float) -> Iterator[HostFinding]:
    room = os.statvfs(path)
    free, size = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    percent = 100 * free / size if size else 0.0
    text = f"{bytes_text(free)} of {bytes_text(size)} free ({percent:.0f} %)"
    if percent <= floor_percent:
        yield HostFinding(
            "problem",
            "free space",
            f"{text}, the floor is {floor_percent:g} %: `recall` and hydration stop; guests' own reads go on",
            "free space in the backing filesystem, or archive idle VMs",
        )
    elif percent <= 2 * floor_percent:
        yield HostFinding("warning", "free space", f"{text}, the floor is {floor_percent:g} %", "free space soon")
    else:
        yield HostFinding("ok", "free space", text)
    if room.f_files and room.f_favail * 100 < room.f_files:
        yield HostFinding("problem", "inodes", "fewer than 1 % of the inodes are free", "remove files")


def mountpoint(config: Config) -> Iterator[HostFinding]:
    """With no daemon, the mountpoint must be empty and unwritable."""
    path = config.datastore.mountpoint
    if is_mounted(path):
        if is_dead(path):
            remedy = "`vmfs-stub mount` replaces it"
            yield HostFinding("problem", "mountpoint", f"{path} is a mount whose daemon is gone", remedy)
        else:
            yield HostFinding("ok", "mountpoint", f"{path} is mounted")
        return
    if not path.is_dir():
        yield HostFinding("problem", "mountpoint", f"{path} is no directory", f"mkdir {path}")
        return
    with os.scandir(path) as entries:
        if any(True for _ in entries):
            yield HostFinding("problem", "mountpoint", f"{path} is not empty", "move what is in it elsewhere")
    immutable = is_immutable(path)
    if immutable is None:
        yield HostFinding(
            "warning",
            "mountpoint",
            f"{path} is on a filesystem without immutable directories: root can write into it while not mounted",
            "put the mountpoint on ext4, XFS or Btrfs",
        )
    elif not immutable:
        yield HostFinding("warning", "mountpoint", f"{path} can be written to while not mounted", f"chattr +i {path}")
    else:
        yield HostFinding("ok", "mountpoint", f"{path} is empty and immutable")


def runtime_dir(config: Config) -> Iterator[HostFinding]:
    """Volatile maps are quick on tmpfs; elsewhere they are still right."""
    path = config.datastore.runtime_dir
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if mount_of(Path(os.path.realpath(existing))).kind == "tmpfs":
        yield HostFinding("ok", "runtime_dir", f"{path} is on tmpfs")
    else:
        yield HostFinding(
            "note",
            "runtime_dir",
            f"{path} is not on tmpfs: setting residency bits writes to a disk",
            "use a directory on tmpfs, such as below /run",
        )
    if path.is_dir() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield HostFinding("problem", "runtime_dir", f"{path} is open to other users", f"chmod 0700 {path}")


def control_socket(config: Config) -> Iterator[HostFinding]:
    """Who may connect to the socket may command the daemon."""
    path = config.socket_path
    try:
        st = path.lstat()
    except FileNotFoundError:
        yield HostFinding("note", "control", f"no daemon runs ({path} is not there)", "`vmfs-stub mount` starts one")
        return
    if not stat.S_ISSOCK(st.st_mode):
        yield HostFinding("problem", "control", f"{path} is no socket", "move it away")
    elif stat.S_IMODE(st.st_mode) != 0o600:
        mode = stat.S_IMODE(st.st_mode)
        yield HostFinding("problem", "control", f"{path} has mode {mode:04o} instead of 0600", f"chmod 0600 {path}")
    else:
        yield from _daemon(config)


def _daemon(config: Config) -> Iterator[HostFinding]:
    from vmfs_stub.cli.context import client_of

    try:
        status = client_of(config).status()
    except DaemonUnreachable as exc:
        yield HostFinding("problem", "control", str(exc), "`vmfs-stub mount` starts a daemon")
        return
    except OtherDatastore as exc:
        yield HostFinding("problem", "control", str(exc), "give this datastore another datastore.runtime_dir")
        return
    yield HostFinding("ok", "control", f"the daemon (pid {status.daemon.pid}) answers")
    for finding in status.findings:
        yield HostFinding(finding.severity, finding.subject, finding.message, "see the message")


def request_timeout(config: Config, path: Path = _FUSE_TIMEOUT) -> Iterator[HostFinding]:
    """The kernel aborts the whole mount when one request takes longer than this."""
    try:
        limit_s = int(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return
    deadline_s = config.recall.recall_deadline_s
    if 0 < limit_s <= deadline_s:
        yield HostFinding(
            "problem",
            "fuse",
            f"{path} is {limit_s} s, not above recall.recall_deadline_s ({deadline_s:g} s): a slow recall would end "
            "the whole mount",
            f"set it to 0, or well above {deadline_s:g}",
        )


def protected_files(config: Config, directory: Path = Path("/proc/sys/fs")) -> Iterator[HostFinding]:
    """Links that a guest's user plants in a shared directory must not lead root astray."""
    for name in ("protected_symlinks", "protected_hardlinks"):
        path = directory / name
        if path.exists() and path.read_text(encoding="ascii").strip() == "0":
            yield HostFinding("note", "sysctl", f"fs.{name} is off", f"sysctl fs.{name}=1")


def store(config: Config) -> Iterator[HostFinding]:
    """Reachable, of a known format, and writable."""
    from vmfs_stub.store.probe import probe

    url = config.store.url
    try:
        found = open_store(config)
        may_remove = probe(found.objects)
    except StoreKeyError as exc:
        yield HostFinding("problem", "store", f"{url}: {exc}", "correct store.key_file or store.passphrase_file")
        return
    except VmfsStubError as exc:
        yield HostFinding("problem", "store", f"{url}: {exc}", "bring the store back, or correct store.url")
        return
    yield HostFinding("ok", "store", f"{url} (store {found.id}) can be read and written")
    if not may_remove:
        yield HostFinding("note", "store", "this host may not remove objects", "none, but another host has to run gc")


def replica(config: Config) -> Iterator[HostFinding]:
    """If one is configured: reachable, the store's own, and writable."""
    from vmfs_stub.store.probe import probe
    from vmfs_stub.store.replica import check_replica

    url = config.replica.url
    if not url:
        return
    try:
        both = replicated(config, open_store(config))
        assert both is not None
        check_replica(both.replica.stored, both.description)
        may_remove = probe(both.replica.stored)
    except StoreKeyError:
        return  # which the store's own check tells
    except VmfsStubError as exc:
        remedy = "bring it back, correct replica.url, or make it with `vmfs-stub replicate --create`"
        yield HostFinding("problem", "replica", f"{url}: {exc}", remedy)
        return
    yield HostFinding("ok", "replica", f"{url} can be read and written")
    if not may_remove:
        yield HostFinding(
            "note", "replica", "this host may not remove objects there", "none, but what gc removes stays"
        )


def hooks(config: Config) -> Iterator[HostFinding]:
    """Where the one before each step cannot be run, no VM is backed up."""
    yield from _hook("before", config.hooks.before, "problem")
    yield from _hook("after", config.hooks.after, "warning")


def _hook(key: str, command: tuple[str, ...], severity: Severity) -> Iterator[HostFinding]:
    if not command:
        return
    if Path(command[0]).is_file() and os.access(command[0], os.X_OK):
        yield HostFinding("ok", "hooks", f"{command[0]} ({key}) can be run")
    else:
        message = f"{command[0]} ({key}) is no file that can be run"
        yield HostFinding(severity, "hooks", message, f"chmod +x it, or correct [hooks] {key}")


def libvirt(config: Config) -> Iterator[HostFinding]:
    """Where this host has it."""
    from vmfs_stub.cli.libvirt_checks import check_libvirt

    yield from check_libvirt(config)


CHECKS: tuple[Check, ...] = (
    configuration,
    fuse_device,
    kernel,
    privileges,
    backing,
    other_hosts,
    mountpoint,
    runtime_dir,
    control_socket,
    request_timeout,
    protected_files,
    store,
    replica,
    hooks,
    libvirt,
)
