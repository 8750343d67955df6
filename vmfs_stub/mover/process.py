"""The mover's process, as its parent sees it: started with one socket and the shared memory, ended for certain.

It inherits the movers' lock and nothing else: no lock of the datastore, no mount, no other descriptor.  It dies with
the thread that starts it, which must be the daemon's main thread.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import trio

from vmfs_stub.core.errors import MoverLost
from vmfs_stub.mover.lock import MoverLock

_GONE_S = 1.0
"""How long one that was told to go, or was killed, is waited for."""


class MoverProcess:
    """One process, from start to end; ``socket`` is our end of the connection."""

    def __init__(self, slots_fd: int, lock: MoverLock) -> None:
        """Start it, with the memory of that descriptor and its part of the lock.  Raises MoverLost."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as exc:
            raise could_not_start(exc) from exc
        numbers = [theirs.fileno(), slots_fd, os.getpid()]
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "vmfs_stub.mover.main", *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), slots_fd, lock.fd),
                cwd="/",
            )
        except OSError as exc:
            ours.close()
            raise could_not_start(exc) from exc
        finally:
            theirs.close()
        self.socket = trio.socket.from_stdlib_socket(ours)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def end(self) -> str:
        """Wait until it is gone, and kill it if it does not go, but never wait for ever; returns how it ended."""
        if await self._gone() is None:
            self._child.kill()
        code = await self._gone()
        if code is None:
            return "hangs in a system call"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def has_gone(self) -> bool:
        """Whether it can do nothing any more."""
        return self._child.poll() is not None

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self._child.returncode = self._child.returncode or 0

    async def _gone(self) -> int | None:
        """Its exit code as Popen has it; None when it still runs after a while."""
        if self._child.poll() is None:
            fd = os.pidfd_open(self._child.pid)
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(_GONE_S):
                    await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)
        return self._child.poll()


def could_not_start(exc: OSError) -> MoverLost:
    """What is said when there is no memory, descriptor or process for it."""
    return MoverLost(f"the data mover could not be started: {exc.strerror}; free memory, open files or processes")
