"""Reading a directory, robust while it changes.

Names are those of the last read from the start, so none is shown twice or left out while others come and go; one that
is gone by now is not shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from vmfs_stub.mount import entries
from vmfs_stub.mount.attributes import DirectoryEntry
from vmfs_stub.mount.inodes import Inodes
from vmfs_stub.mount.nodes import ROOT, DirectoryHandle
from vmfs_stub.mount.private import PRIVATE_NAME
from vmfs_stub.mount.runner import Runner

Emit = Callable[[DirectoryEntry], bool]

UNKNOWN_INO: Final = 0xFFFFFFFF
"""Shown for ``..``, as other filesystems do that do not know the parent's number."""

_DOTS: Final = 2
_BATCH_MIN: Final = 8
_BATCH_MAX: Final = 256


async def read_directory(inodes: Inodes, run: Runner, handle: DirectoryHandle, offset: int, emit: Emit) -> None:
    """Give entries from ``offset`` on to ``emit`` until it answers False (entry not taken) or there are no more.

    Counts a lookup for each entry taken.  A batch is looked up in one go: as many as the last request took.
    """
    node = handle.node
    if offset == 0:
        names = await run("mount.readdir", entries.list_names, node.fd)
        handle.names = [name for name in names if node.ino != ROOT or name != PRIVATE_NAME]
    for at, (name, ino) in enumerate(((b".", node.ino), (b"..", UNKNOWN_INO))):
        if offset <= at and not emit(DirectoryEntry(name, at + 1, ino, None)):
            return
    first = index = max(offset - _DOTS, 0)
    while index < len(handle.names):
        count = min(max(handle.batch - (index - first), _BATCH_MIN), _BATCH_MAX)
        names = handle.names[index : index + count]
        found = await run("mount.readdir", entries.open_entries, node.fd, names)
        taken = _emit_found(inodes, names, found, index, emit)
        index += taken
        if taken < len(names):
            break
    handle.batch = max(index - first + 1, _BATCH_MIN)


def _emit_found(inodes: Inodes, names: list[bytes], found: list[entries.Entry | None], index: int, emit: Emit) -> int:
    """How many of ``found`` were taken, those that are not shown included; closes what was not."""
    at = -1
    taken = True
    try:
        for at, entry in enumerate(found):
            if entry is not None:
                taken = False
                taken = _emit_one(inodes, names[at], entry, index + at + 1 + _DOTS, emit)
                if not taken:
                    return at
    finally:
        if not taken:
            for rest in found[at + 1 :]:
                if rest is not None:
                    os.close(rest.fd)
    return len(found)


def _emit_one(inodes: Inodes, name: bytes, entry: entries.Entry, next_offset: int, emit: Emit) -> bool:
    if inodes.is_private(entry):
        os.close(entry.fd)
        return True
    node = inodes.enter(entry)
    taken = False
    try:
        taken = emit(DirectoryEntry(name, next_offset, node.ino, inodes.attributes(node, entry.st)))
    finally:
        if taken:
            node.lookups += 1
        else:
            inodes.nodes.drop_unused(node)
    return taken
