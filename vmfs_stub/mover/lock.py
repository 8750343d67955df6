"""How a daemon knows that the movers of daemons before it have gone: a lock that a daemon shares with its movers.

A mover is killed with its daemon, but one that is in a system call of a slow disk goes only after it, and the call may
be the one that gives a pin its name.  The lock belongs to one open file, which the daemon's movers inherit, and is free
when the last of them has gone.  A start does not wait for it, unlike for the datastore's lock: only what such a mover
might still undo does.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError


class MoverLock:
    """The lock in the file at ``path``, from when earlier movers have gone until this daemon and its movers have.

    Attributes: ``fd`` is what movers inherit.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; `take` locks it.  Raises PrimaryIOError."""
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise PrimaryIOError(f"cannot open the data movers' lock {path}: {exc.strerror}") from exc
        self._is_taken = False

    def take(self) -> bool:
        """Whether all movers of other daemons have gone; from then on this one has the lock."""
        if not self._is_taken:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._is_taken = True
        return True

    def close(self) -> None:
        """Give up this process's part in it."""
        os.close(self.fd)
