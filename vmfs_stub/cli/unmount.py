"""`unmount`: flush, unmount, stop the daemon, and wait until its process is gone."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.output import say
from vmfs_stub.core.errors import DaemonUnreachable

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.control.client import ControlClient


def unmount(
    ctx: typer.Context,
    force: Annotated[bool, typer.Option("--force", help="Even while disks are open; their users get errors.")] = False,
) -> None:
    """Unmount and stop the daemon; refused while disks are open unless --force."""
    config = load_config_of(ctx)
    client = client_of(config)
    try:
        client.status()
    except DaemonUnreachable as exc:
        _without_daemon(config, exc, force=force)
    else:
        end_daemon(client, config, force=force)


def end_daemon(client: ControlClient, config: Config, *, force: bool) -> None:
    """Unmount, and wait until the daemon's process is gone.  Raises InUse, DaemonUnreachable."""
    pid = client.status().daemon.pid
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        process = None
    try:
        client.shutdown(force=force)
        if process is not None:
            _wait_end(process, pid, config.control.request_timeout_s)
    finally:
        if process is not None:
            os.close(process)
    say(f"{config.datastore.mountpoint} is unmounted")


def _wait_end(process: int, pid: int, timeout_s: float) -> None:
    if not select.select([process], [], [], timeout_s)[0]:
        raise DaemonUnreachable(
            f"unmounted, but the daemon (pid {pid}) has not ended within {timeout_s:g} s; look at its log before you "
            "end it yourself"
        )


def _without_daemon(config: Config, unreachable: DaemonUnreachable, *, force: bool) -> None:
    """A daemon that died leaves a mount behind on which every call fails."""
    from vmfs_stub.mount.mountpoint import detach, is_mounted

    mountpoint = config.datastore.mountpoint
    if not is_mounted(mountpoint):
        raise DaemonUnreachable(f"{mountpoint} is not mounted, and {unreachable}") from unreachable
    if not force:
        raise DaemonUnreachable(
            f"{unreachable}; {mountpoint} is still mounted: `vmfs-stub mount` replaces it, `vmfs-stub unmount "
            "--force` removes it"
        ) from unreachable
    detach(mountpoint)
    say(f"{mountpoint} is unmounted; no daemon was there")
