"""What moves data between primary and the store: the bytes of a backup out, those that no guest waits for back in.

Purpose: one interface, so that the daemon can have this done by a process of its own (`vmfs_stub.mover`), and tests in
theirs.  tests/contract runs one suite over both.  A mover reads backing files and writes the store; what is resident,
and every write to a backing file, is the business of whoever calls it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.origin import Origin
from vmfs_stub.store.backup_writer import WriterCounts
from vmfs_stub.store.manifest import StoredFile
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.pins import Pin

FETCHES_AT_ONCE = 16
"""Background fetches at once, of the whole datastore, at the most; each is held in memory until it is on primary."""


class Content(Enum):
    """Where the bytes of a part of a file are."""

    DATA = "in the file"
    ZEROS = "nowhere: a hole"
    STORED = "in the store, as the part's origin says"


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive chunks of a file that is copied; those that are STORED are the same ones of ``origin``."""

    chunks: Extent
    content: Content
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """A file to copy: its ``size`` in bytes, and what messages call it."""

    size: int
    label: str


@dataclass(frozen=True, slots=True)
class PointFile:
    """An entry of the restore point that is to be; ``copy`` is the number of the copy (from 0) with its contents."""

    stored: StoredFile
    copy: int | None = None


@dataclass(frozen=True, slots=True)
class PointOrder:
    """The restore point that is to be, without its files; ``top`` is the VM's directory, None if it is one file."""

    vm_id: VmId
    point_id: PointId
    vm_name: str
    host: str
    metadata: Mapping[str, str]
    pins: Sequence[Pin] = ()
    top: StoredFile | None = None


class Copying(Protocol):
    """Copies files into one backup, one after the other."""

    async def copy(
        self,
        fd: int,
        order: CopyOrder,
        parts: AsyncIterable[Part],
        progress: Callable[[int], None],
        *,
        aside_fd: int | None = None,
    ) -> None:
        """Copy a file; ``parts`` cover all its chunks, in order.

        Nobody changes it meanwhile, or what is changed is set aside before in ``aside_fd`` (primary/aside_file.py),
        until ``progress`` has told that it is copied.
        ``parts`` is asked for more while earlier ones are copied; ``progress`` gets numbers of bytes.
        Raises StoreError, IntegrityError, PrimaryError, MoverLost, and what ``parts`` raises.
        """
        ...


class Backup(Protocol):
    """One backup job of one VM: first `copying`, once, then `commit`."""

    def copying(self, *, verify: bool) -> AbstractAsyncContextManager[Copying]:
        """Copy files within the block; at its end everything is stored durably.

        With ``verify``, as for what is to be released, every frame that is referred to was read back, too: reused
        ones included.
        """
        ...

    async def commit(self, order: PointOrder, files: Sequence[PointFile]) -> WriterCounts:
        """Make the restore point one that exists; see BackupWriter.commit."""
        ...


class Mover(Protocol):
    """Moves data; all calls raise MoverLost when whoever does it for them has gone."""

    def backup(self) -> AbstractAsyncContextManager[Backup]:
        """A backup job; at the end of the block no file is read any more.

        Without a commit there is no restore point.  A commit that was cancelled may have made one; its pins are the
        caller's to remove after the block, and none is made later and stays.
        """
        ...

    def hurried(self) -> AbstractContextManager[None]:
        """Within the block somebody waits for what is under way, which may be done with the lowest priority else."""
        ...

    async def wait_earlier_gone(self) -> None:
        """Return when nothing can take effect any more of what a process did that was lost.

        Raises MoverLost when that takes long; it may then go on for ever.
        """
        ...

    async def replicate(self, vm_id: VmId, points: Sequence[PointId], progress: Callable[[int], None]) -> None:
        """Bring restore points of a VM into the replica; see `replication.replicate`.  Raises as it does."""
        ...

    def fetch(self, frames: Sequence[FrameRef]) -> AbstractAsyncContextManager[Sequence[Buffer]]:
        """The verified raw bytes of frames as `Store.fetch` gives them, for which no guest waits.

        They may be used within the block only.
        """
        ...
