"""How a daemon knows that the movers of daemons before it have gone: a lock that a daemon shares with its movers.

A mover is killed with its daemon, but one that is in a system call of a slow disk goes only after it, and the call may
be the one that gives a pin its name.  The lock belongs to one open file, which the daemon's movers inherit, and is free
when the last of them has gone.  A start does not wait for it, unlike for the datastore's lock: only what such a mover
might still undo does.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.primary.file_lock import open_lock, try_lock


class MoverLock:
    """The lock in the file at ``path``, from when earlier movers have gone until this daemon and its movers have.

    Attributes: ``fd`` is what movers inherit.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; `take` locks it.  Raises PrimaryIOError."""
        try:
            self.fd = open_lock(path)
        except OSError as exc:
            raise PrimaryIOError(f"cannot open the data movers' lock {path}: {exc.strerror}") from exc
        self._is_taken = False

    def take(self) -> bool:
        """Whether all movers of other daemons have gone; from then on this one has the lock."""
        self._is_taken = self._is_taken or try_lock(self.fd)
        return self._is_taken

    def close(self) -> None:
        """Give up this process's part in it."""
        os.close(self.fd)
