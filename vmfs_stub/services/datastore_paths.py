"""Where a path that a hypervisor or an image names leads: below the backing directory, or elsewhere on this host.

The mount itself is never touched: a daemon that waits for its own mount may wait for ever.  What lies below the
mountpoint is looked up below the backing directory instead, and one component after the other, so that a symbolic link
may lead in from outside, and out again.  Blocking, thread-safe.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Final

from vmfs_stub.core.sites import FileCalls

LINKS_MAX: Final = 40
"""Symbolic links on one path, as many as the kernel follows."""
KEPT_S: Final = 30.0
"""How long a path is taken to lead where it led."""


class DatastorePaths:
    """Tells of paths where they lead; what is found out is kept for ``kept_s``, or until `forget`."""

    def __init__(self, *, files: FileCalls, backing: Path, mountpoint: Path, kept_s: float = KEPT_S) -> None:
        self._files = files
        self._mountpoint = str(mountpoint)
        self._backing = str(backing)
        self._kept_s = kept_s
        self._since_s = time.monotonic()
        self._tops: tuple[str, str] | None = None
        self._known: dict[str, str] = {}
        self._targets: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def locate(self, path: str) -> str:
        """The place of an absolute path: relative to the backing directory, or absolute when it lies outside.

        That of mountpoint and backing directory themselves is empty.  The last component need not exist.  Raises
        OSError when a link below the backing directory cannot be read.
        """
        with self._lock:
            if time.monotonic() - self._since_s >= self._kept_s:
                self._clear()
            known = self._known.get(path)
            if known is None:
                backing, mountpoint = self._resolved_tops()
                at = self._walked(path, backing, mountpoint)
                is_inside = at == backing or at.startswith(f"{backing}/")
                known = self._known[path] = at[len(backing) + 1 :] if is_inside else at
            return known

    def forget(self) -> None:
        """Look anew from now on, as whoever decides on an archive has to: links may lead elsewhere by now."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._known.clear()
        self._targets.clear()
        self._tops = None
        self._since_s = time.monotonic()

    def _resolved_tops(self) -> tuple[str, str]:
        """Backing directory and mountpoint as they are without links; of the mountpoint itself nothing is asked."""
        if self._tops is None:
            above, _, name = self._mountpoint.rpartition("/")
            self._tops = self._walked(self._backing, "", ""), f"{self._walked(above, '', '')}/{name}"
        return self._tops

    def _walked(self, path: str, backing: str, mountpoint: str) -> str:
        todo, at, links = path.split("/")[::-1], "", 0
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                at = (mountpoint if backing and at == backing else at).rpartition("/")[0]
                continue
            at = f"{at}/{name}"
            if mountpoint and at in (mountpoint, self._mountpoint):
                at = backing
                continue
            if at not in self._targets:
                self._targets[at] = self._target(at, is_inside=bool(backing) and at.startswith(f"{backing}/"))
            target = self._targets[at]
            if target is not None and links < LINKS_MAX:
                links += 1
                todo += target.split("/")[::-1]
                at = "" if target.startswith("/") else at.rpartition("/")[0]
        return at or "/"

    def _target(self, path: str, *, is_inside: bool) -> str | None:
        """Where a symbolic link leads; None for what is none, or cannot be told outside the backing directory."""
        try:
            return self._files.call("chain.link", os.readlink, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            if is_inside and exc.errno != errno.EINVAL:
                raise
            return None
