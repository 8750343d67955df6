"""Having a backing directory to oneself: a lock within this host, a serving mark between hosts.

Whoever changes backing files takes both before it looks at any.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from vmfs_stub.core.errors import DatastoreLocked, PrimaryIOError
from vmfs_stub.core.names import LOCK_FILE
from vmfs_stub.primary.file_lock import open_lock, try_lock
from vmfs_stub.primary.serving_mark import MARK, PACE, Machine, Mark, ServingMark, mark_in

log = logging.getLogger(__name__)

LOCK_FILES = (LOCK_FILE, MARK)
"""In the private directory."""
WATCHED_S = PACE.still_s
"""How long a start watches the mark of another host, in seconds, before it takes over."""


def take_lock(path: Path, *, backing: Path) -> int:
    """Lock the datastore, of which this is the lock file, until the descriptor is closed.

    Raises DatastoreLocked, PrimaryIOError.
    """
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = open_lock(path)
    except OSError as exc:
        raise PrimaryIOError(
            f"cannot open the datastore's lock {path}: {exc.strerror}; is the backing filesystem mounted, and are you "
            "root?"
        ) from exc
    if not try_lock(fd):
        holder = os.pread(fd, 16, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise DatastoreLocked(
            f"another daemon (pid {holder or 'unknown'}) serves {backing}; `vmfs-stub unmount` ends it"
        )
    # The pid is for messages; a full filesystem may have no room for it.
    with suppress(OSError):
        os.pwrite(fd, f"{os.getpid()}\n".encode().ljust(16), 0)
    return fd


@contextmanager
def locked(path: Path, *, backing: Path) -> Iterator[None]:
    """Have the datastore to oneself, among the processes of this host, within the block.  Raises as `take_lock`."""
    fd = take_lock(path, backing=backing)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def marked(private_dir: Path, *, backing: Path) -> Iterator[None]:
    """Have it to oneself among hosts, too.  Raises DatastoreLocked, PrimaryIOError."""
    mark = ServingMark.take(backing, private_dir, machine=Machine.this())
    with mark.kept(end_at_once):
        yield


def end_at_once(why: str) -> NoReturn:
    """End this process without another call: what an orderly end writes is not this daemon's to write any more."""
    log.critical("ending at once: %s", why)
    os._exit(1)


def served_elsewhere(private_dir: Path) -> Mark | None:
    """The mark of another host, or of this one in another boot, that serves or has served this backing directory.

    Whether it still does, only a start tells, which watches it.  Raises OSError.
    """
    mark, ours = mark_in(private_dir), Machine.this()
    return None if mark is None or mark.machine == ours else mark
