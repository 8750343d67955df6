"""The daemon of a datastore as a child of this process, to be killed at any moment, also while it starts.

Unlike ``mount --background`` nothing stands between: how long it takes from its start to its first answer is measured,
and the program may be another one, with a planted fault.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from scripts.lab.datastore import Datastore, children, ended
from scripts.lab.failure import LabError
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient
from vmfs_stub.core.errors import DaemonUnreachable

PROGRAM: Final = ("-m", "vmfs_stub.cli.main")
_CLIENT_TIMEOUT_S: Final = 60.0
_DEATH_DEADLINE_S: Final = 30.0
_LOG_SHOWN: Final = 4000
_MOVER: Final = b"vmfs_stub.mover.main"


class DaemonProcess:
    """One daemon after the other of one datastore; ``program`` is what Python runs, ``log_path`` has what all said."""

    def __init__(self, datastore: Datastore, *, program: Sequence[str | Path] = PROGRAM) -> None:
        self.client = ControlClient(load_config(datastore.config).socket_path, timeout_s=_CLIENT_TIMEOUT_S)
        self.log_path = datastore.home / "log"
        self._datastore = datastore
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._launched_s = 0.0
        self._log_seen = 0

    @property
    def is_running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its number, also after its death."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start it; it does not answer yet."""
        command = [sys.executable, *map(str, self._program), "--config", str(self._datastore.config), "mount"]
        with self.log_path.open("ab") as log:
            self._launched_s = time.monotonic()
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._datastore.daemon_pid = self._process.pid

    def wait_answers(self, *, deadline_s: float) -> float:
        """Wait until the mount is served; seconds since the launch.  Raises LabError at the deadline, or if it ends."""
        while True:
            if not self.is_running:
                raise LabError(f"the daemon ended instead of answering:\n{self.log_tail()}")
            taken_s = time.monotonic() - self._launched_s
            with suppress(DaemonUnreachable):
                status = self.client.status()
                if status.daemon.pid == self.pid and status.mount.mounted:
                    return time.monotonic() - self._launched_s
            if taken_s > deadline_s:
                raise LabError(f"the daemon does not answer {deadline_s:g} s after its start:\n{self.log_tail()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9; it is dead on return.  Raises LabError when it does not die."""
        if self._process is None:
            return
        self._process.kill()
        try:
            self._process.wait(_DEATH_DEADLINE_S)
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"the daemon (process {self.pid}) does not die") from exc

    def wait_ended(self) -> None:
        """After an unmount.  Raises LabError when it does not end, or not well."""
        assert self._process is not None
        try:
            code = self._process.wait(_DEATH_DEADLINE_S)
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"the daemon (process {self.pid}) is still there after 'unmount'") from exc
        if code:
            raise LabError(f"the daemon ended with exit code {code}:\n{self.log_tail()}")

    def kill_mover(self) -> bool:
        """kill -9 the data mover alone; false when there was none.

        The daemon knows on return, or a job that begins next would be given to the dead one.  Raises LabError when it
        does not notice.
        """
        found = movers_of(self.pid)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until_s = time.monotonic() + _DEATH_DEADLINE_S
        while any(Path(f"/proc/{pid}").exists() for pid in found):  # until its parent has reaped it
            if time.monotonic() > until_s:
                raise LabError("the daemon does not notice that its data mover is dead")
            time.sleep(0.001)
        return bool(found)

    def new_log(self) -> str:
        """What was logged since this was last asked."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_seen)
            said = log.read()
        self._log_seen += len(said)
        return said.decode("utf-8", "backslashreplace")

    def log_tail(self) -> str:
        """The last of what was logged."""
        return self.log_path.read_text("utf-8", "backslashreplace")[-_LOG_SHOWN:]


def movers_of(daemon_pid: int) -> list[int]:
    """The running data movers of a daemon: one, or for a moment none."""
    found = []
    for pid in children().get(daemon_pid, []):
        with suppress(OSError):
            if _MOVER in Path(f"/proc/{pid}/cmdline").read_bytes() and not ended(pid, deadline_s=0):
                found.append(pid)
    return found
