"""What the kernel is told of an inode: the backing inode's status, with what a placeholder reports instead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple


class Attributes(NamedTuple):
    """Answer to a lookup or getattr; times in ns, timeouts in s, ``blocks`` of 512 bytes."""

    ino: int
    st: os.stat_result
    mode: int
    nlink: int
    blocks: int
    mtime_ns: int
    attr_timeout_s: float
    entry_timeout_s: float


class DirectoryEntry(NamedTuple):
    """One entry of a directory; ``next_offset`` continues after it; ``attributes`` is None for ``.`` and ``..``."""

    name: bytes
    next_offset: int
    ino: int
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asks: ids of the calling thread, and its umask where something is made."""

    pid: int
    uid: int
    gid: int
    umask: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a setattr changes; None leaves it as it is.  ``handle`` is the open file it came by, if any."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    handle: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing that was named."""
        return all(each is None for each in (self.size, self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns))
