"""What can be seen from outside of how far a daemon is with something, so that a kill may be aimed at it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from scripts.lab.kill_disk import KillDisk
from scripts.lab.kill_jobs import LifeJob
from scripts.lab.kill_plan import Aim
from vmfs_stub.control.client import ControlClient
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.primary.durable_map import DurableMap, MapState

_GROWTH_BLOCKS = 128
"""Of 512 bytes: a disk that has so many more is coming back."""


class Sight:
    """Looks at a datastore from the beginning of a life on.

    ``maps`` is where its durable maps are; ``jobs`` are those of the life, which come later.
    """

    def __init__(
        self, disks: Sequence[KillDisk], jobs: Sequence[LifeJob], *, maps: Path, client: ControlClient
    ) -> None:
        self._jobs = jobs
        self._disks = [disk for disk in disks if not disk.is_gone]
        self._maps = maps
        self._client = client
        self._names = set(maps.iterdir())
        self._records = {disk.label: _record(disk) for disk in self._disks}
        self._blocks = {disk.label: _blocks(disk) for disk in self._disks}
        self._seen: Mapping[Aim, Callable[[], bool]] = {
            "any moment": lambda: True,
            "copy": self._sees_copy,
            "commit": lambda: not set(self._maps.iterdir()) <= self._names,
            "release": lambda: any(_record(disk) not in (b"", self._records[disk.label]) for disk in self._disks),
            "hydration": lambda: any(_blocks(d) > self._blocks[d.label] + _GROWTH_BLOCKS for d in self._disks),
            "graduation": self._sees_graduation,
            "sync": lambda: any(lane.doing == "sync" for disk in self._disks for lane in disk.lanes),
            "resize": lambda: self._sees_change("trunc"),
            "mapped write": lambda: self._sees_change("mmap"),
            "naming": lambda: any(disk.is_being_named for disk in self._disks),
        }

    def sees(self, aim: Aim) -> bool:
        """Whether that is under way now, or was a moment ago."""
        return self._seen[aim]()

    def _sees_copy(self) -> bool:
        return any(self._client.job(job.id).progress.done_bytes for job in self._jobs if job.kind != "recall")

    def _sees_graduation(self) -> bool:
        return MapState.GRADUATING in map_states(self._maps) or any(
            self._records[disk.label] and not _record(disk) for disk in self._disks
        )

    def _sees_change(self, what: str) -> bool:
        changes = [lane.change for disk in self._disks for lane in disk.lanes]
        return any(change is not None and what in change.what for change in changes)


def map_states(maps: Path) -> Counter[MapState]:
    """How many durable maps are in which state; what cannot be read just now is not counted."""
    return Counter(_states(maps))


def _states(maps: Path) -> Iterator[MapState]:
    for path in maps.glob("*.map"):
        with suppress(OSError, VmfsStubError):
            found = DurableMap.open(PLAIN, path, label=path.name)
            yield found.header.state
            found.close()


def _record(disk: KillDisk) -> bytes:
    """The placeholder's record of a disk; empty where there is none."""
    try:
        return os.getxattr(disk.backing, PLACEHOLDER_XATTR)
    except OSError:
        return b""


def _blocks(disk: KillDisk) -> int:
    try:
        return disk.backing.stat().st_blocks
    except OSError:
        return 0
