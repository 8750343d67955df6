"""`mount`: run the daemon, in the foreground or in the background."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import config_path_of, load_config_of
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.output import say, warn
from vmfs_stub.core.errors import DaemonUnreachable, DatastoreLocked, PrimaryIOError

if TYPE_CHECKING:
    from pathlib import Path

    from vmfs_stub.config import Config

_POLL_S = 0.05
_ANSWER_S = 2.0
_STOP_S = 10.0
_LOG_TAIL_BYTES = 16 << 10
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def mount(
    ctx: typer.Context,
    background: Annotated[
        bool, typer.Option("--background", help="Return when the mount answers; the daemon logs to a file.")
    ] = False,
) -> None:
    """Run the daemon and mount the datastore."""
    config = load_config_of(ctx)
    if background:
        mount_in_background(config, config_path_of(ctx))
        return
    from vmfs_stub import daemon

    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    daemon.run(config, config_path=config_path_of(ctx))


def mount_in_background(config: Config, config_path: Path) -> None:
    """Start the daemon of the datastore; returns when the mount answers.  Raises DatastoreLocked, DaemonUnreachable."""
    if _answering_pid(config) is not None:
        raise DatastoreLocked(f"a daemon answers on {config.socket_path} already: {config.datastore.mountpoint}")
    log, start = _open_log(config.log_path)
    try:
        command = [sys.executable, "-m", "vmfs_stub.cli.main", "--config", os.path.abspath(config_path), "mount"]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    finally:
        os.close(log)
    deadline = time.monotonic() + config.control.start_timeout_s
    try:
        while time.monotonic() < deadline:
            code = child.poll()
            if code is not None:
                raise typer.Exit(_told_why(config.log_path, start, code))
            if _answering_pid(config) == child.pid:
                say(f"{config.datastore.mountpoint} is mounted; the daemon (pid {child.pid}) logs to {config.log_path}")
                child.returncode = 0  # it lives on: no warning that a running child is forgotten
                return
            time.sleep(_POLL_S)
        raise DaemonUnreachable(
            f"the mount did not answer within {config.control.start_timeout_s:g} s (control.start_timeout_s); the "
            f"daemon was stopped; its log is {config.log_path}"
        )
    except BaseException:
        _stop(child)
        raise


def _answering_pid(config: Config) -> int | None:
    """The pid of the daemon whose mount answers; None while there is none.  Raises OtherDatastore."""
    from vmfs_stub.control.client import ControlClient
    from vmfs_stub.mount.mountpoint import is_mounted

    try:
        found = ControlClient(config.socket_path, backing=config.datastore.backing, timeout_s=_ANSWER_S).status()
    except DaemonUnreachable:
        return None
    return found.daemon.pid if found.mount.mounted and is_mounted(config.datastore.mountpoint) else None


def _open_log(path: Path) -> tuple[int, int]:
    """Descriptor of the log, to append to, and where it ends now."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise PrimaryIOError(f"cannot write the daemon's log {path}: {exc.strerror}") from exc
    return log, os.fstat(log).st_size


def _told_why(path: Path, start: int, code: int) -> int:
    """Pass on what the daemon said on its way out, and its exit code."""
    with path.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start, end - _LOG_TAIL_BYTES))
        said = log.read().decode("utf-8", "backslashreplace").rstrip()
    if said:
        print(said, file=sys.stderr)
    warn(f"the daemon ended before the mount answered; its log is {path}")
    return code if code > 0 else ExitCode.FAILED


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(_STOP_S)
