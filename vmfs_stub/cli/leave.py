"""`leave`: the way out: plain files where the VMs were, for which no tool is needed any more.

Everything is recalled and the daemon ended before anything is taken away, and nothing is while one placeholder is left.
Each step can be repeated: a `leave` that fails is run again.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from vmfs_stub.cli.context import client_of, has_maps, load_config_of
from vmfs_stub.cli.job_progress import follow_job
from vmfs_stub.cli.output import bytes_text, say, warn
from vmfs_stub.cli.unmount import end_daemon
from vmfs_stub.core.errors import DaemonUnreachable, PrimaryIOError, Refused
from vmfs_stub.core.names import CHANGES_DIR, MAPS_DIR, PLACEHOLDER_XATTR, PRIVATE_DIR, TOP_MODE_XATTR, XATTR_PREFIX

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.control.client import ControlClient

_TOP_MODE = 0o755
_MAPS_GO_WITHIN_S = 15.0
"""A disk that is back is an ordinary file, and its pin and maps go after that."""


def leave(ctx: typer.Context) -> None:
    """Recall everything, unmount, and leave plain files at the path where hypervisors saw them.

    Restore points stay in the store, and the configuration where it is.  While disks are open it is refused, but only
    when all is back.
    """
    config = load_config_of(ctx)
    client = client_of(config)
    try:
        client.status()
    except DaemonUnreachable:
        if has_maps(config):
            raise  # only a daemon can bring back what is away
    else:
        _recall_all(client, config)
        _wait_for_maps_to_go(config)
        end_daemon(client, config, force=False)
    with _alone(config):
        _refuse_placeholders(config)
        _remove_attributes(config)
        _empty_private_dir(config.private_dir)
    _remove_the_rest(config)
    _move_to_mountpoint(config.datastore.backing, config.datastore.mountpoint)


def _recall_all(client: ControlClient, config: Config) -> None:
    away = [row for row in client.list_disks() if row.state != "resident"]
    absent = sum(row.size_bytes - row.resident_bytes for row in away)
    free = shutil.disk_usage(config.datastore.backing).free
    if absent > free:
        warn(f"{bytes_text(absent)} are absent, {bytes_text(free)} are free: it has room only if enough of it is zeros")
    if away:
        follow_job(client, client.start_recall(sorted({row.vm for row in away})))
    left = [row.path for row in client.list_disks() if row.state != "resident"]
    if left:
        raise Refused(f"{left[0]} and {len(left) - 1} other disks are not back yet; run `vmfs-stub leave` again")


def _wait_for_maps_to_go(config: Config) -> None:
    """Those that do not go in time are told of when the daemon has ended."""
    end_s = time.monotonic() + _MAPS_GO_WITHIN_S
    while has_maps(config) and time.monotonic() < end_s:
        time.sleep(0.05)


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    """No daemon may begin meanwhile, nor serve on another host."""
    from vmfs_stub.services.datastore_lock import locked, marked

    if not config.private_dir.exists():
        yield  # an earlier try has removed it
        return
    backing = config.datastore.backing
    with locked(config.lock_path, backing=backing), marked(config.private_dir, backing=backing):
        yield


def _refuse_placeholders(config: Config) -> None:
    if has_maps(config):
        raise Refused(
            f"placeholders are not over yet (there are maps in {config.maps_dir}): `vmfs-stub mount`, see that "
            "`vmfs-stub status` has no findings and the store is there, then `vmfs-stub leave` again"
        )
    for path in _all(config.datastore.backing):
        if PLACEHOLDER_XATTR in os.listxattr(path, follow_symlinks=False):
            raise Refused(f"{path} is a copy of a placeholder, whose absent blocks would read as zeros; remove it")


def _remove_attributes(config: Config) -> None:
    backing = config.datastore.backing
    try:
        for path in (backing, *_all(backing)):
            for name in os.listxattr(path, follow_symlinks=False):
                if name.startswith(XATTR_PREFIX) and name != TOP_MODE_XATTR:
                    os.removexattr(path, name, follow_symlinks=False)
    except OSError as exc:
        raise _not_removed(backing, exc) from exc


def _empty_private_dir(private_dir: Path) -> None:
    """All but the files by which others know that we are here."""
    from vmfs_stub.services.datastore_lock import LOCK_FILES

    for path in private_dir.iterdir() if private_dir.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in LOCK_FILES:
            with suppress(OSError):
                path.unlink()


def _remove_the_rest(config: Config) -> None:
    backing = config.datastore.backing
    try:
        mode = int(os.getxattr(backing, TOP_MODE_XATTR), 8)
    except (OSError, ValueError):
        mode = _TOP_MODE
    shutil.rmtree(config.private_dir, ignore_errors=True)
    for volatile in (MAPS_DIR, CHANGES_DIR):
        shutil.rmtree(config.datastore.runtime_dir / volatile, ignore_errors=True)
    try:
        backing.chmod(mode)
    except OSError as exc:
        raise _not_removed(backing, exc) from exc
    with suppress(OSError):  # last, or another try would not know the mode
        os.removexattr(backing, TOP_MODE_XATTR)


def _not_removed(backing: Path, exc: OSError) -> PrimaryIOError:
    return PrimaryIOError(f"cannot remove all traces from {backing}: {exc}; run `vmfs-stub leave` again")


def _all(backing: Path) -> Iterator[Path]:
    """Everything below the backing directory but our own; symbolic links are not followed."""
    for directory, folders, files in os.walk(backing, onerror=_fail):
        if Path(directory) == backing and PRIVATE_DIR in folders:
            folders.remove(PRIVATE_DIR)
        yield from (Path(directory, name) for name in (*folders, *files))


def _fail(exc: OSError) -> NoReturn:
    raise PrimaryIOError(f"{exc.filename} cannot be looked into: {exc.strerror}") from exc


def _move_to_mountpoint(backing: Path, mountpoint: Path) -> None:
    """Where the mount was are now the files themselves, if both are on one filesystem."""
    from vmfs_stub.mount.mountpoint import clear_immutable

    if mountpoint.exists():
        clear_immutable(mountpoint)
    try:
        backing.rename(mountpoint)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EBUSY):
            raise PrimaryIOError(f"cannot move {backing} to {mountpoint}: {exc.strerror}; move it yourself") from exc
        say(f"the files are in {backing}: `mount --bind {backing} {mountpoint}` shows them at the old path")
    else:
        say(f"the files are in {mountpoint}, and need no daemon any more")
