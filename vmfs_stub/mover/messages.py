"""What the daemon and its data mover say to each other: one type for each thing that is said.

Every request begins a *conversation* of that number, which ends with exactly one of Fetched, Committed, Replicated,
Failed and Ended.  Until then the mover may use what came with it: a file's descriptor, a slot of shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import PrimaryError, VmfsStubError
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.services.mover import CopyOrder, Part, PointFile, PointOrder
from vmfs_stub.store.backup_writer import WriterCounts
from vmfs_stub.store.clients import ErrorsByPlace
from vmfs_stub.store.format import StoreDescription
from vmfs_stub.store.objects_url import StoreAt
from vmfs_stub.store.sealing import StoreKey


@dataclass(frozen=True, slots=True)
class MoverSettings:
    """What a mover needs of the configuration; times in seconds.  ``slot_bytes`` is the size of a slot.

    With a ``replica``, ``read_back_path`` is where it notes which packs there were read back.
    """

    store: StoreAt
    store_description: StoreDescription
    store_key: StoreKey | None
    index_path: Path
    workers: int
    files_threads: int
    store_threads: int
    slot_bytes: int
    replica: StoreAt | None = None
    read_back_path: Path | None = None


# From the daemon


@dataclass(frozen=True, slots=True)
class BeginBackup:
    """A backup job; answered with Ready."""


@dataclass(frozen=True, slots=True)
class BeginCopying:
    """What follows is copied; see mover.Backup.copying."""

    verify: bool


@dataclass(frozen=True, slots=True)
class Aside:
    """The file that is copied next is being changed; what of it is set aside is in the file that comes along."""

    fd: int = -1


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a file, whose descriptor comes along; its parts follow.  Answered with Copied for each batch, then Ready."""

    order: CopyOrder
    fd: int = -1


@dataclass(frozen=True, slots=True)
class AllParts:
    """The file's last part was told."""


@dataclass(frozen=True, slots=True)
class EndCopying:
    """All files were copied; answered with Ready when everything is stored and read back."""


@dataclass(frozen=True, slots=True)
class Files:
    """Some of the restore point's files."""

    files: Sequence[PointFile]


@dataclass(frozen=True, slots=True)
class Commit:
    """All files were told; answered with Committed."""

    order: PointOrder


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the conversation as soon as nothing of it is in use; answered with Ended."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Put the raw bytes of frames one after the other into a slot; answered with Fetched."""

    slot: int
    frames: Sequence[FrameRef]


@dataclass(frozen=True, slots=True)
class Replicate:
    """Bring restore points of a VM into the replica; answered with Copied for each pack, then Replicated."""

    vm_id: VmId
    points: Sequence[PointId]


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?  Answered with Pong.  ``beside_guests`` is whether guests use their disks now."""

    beside_guests: bool


@dataclass(frozen=True, slots=True)
class NewClients:
    """The store and its replica are asked like this from now on, with other credentials say; places stay the same."""

    store: StoreAt
    replica: StoreAt | None


# From the mover


@dataclass(frozen=True, slots=True)
class Ready:
    """Done; what comes next?"""


@dataclass(frozen=True, slots=True)
class Copied:
    """So many more bytes have been dealt with."""

    size: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The slot has the bytes.  Ends the conversation."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The restore point exists.  Ends the conversation."""

    counts: WriterCounts


@dataclass(frozen=True, slots=True)
class Replicated:
    """The replica has the points.  Ends the conversation."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked for failed; ``error`` is None after a programming error.  Ends the conversation."""

    error: VmfsStubError | None


@dataclass(frozen=True, slots=True)
class Ended:
    """After Cancel.  Ends the conversation."""


@dataclass(frozen=True, slots=True)
class Pong:
    """I am; and so many calls of store and replica have failed in this process."""

    errors: ErrorsByPlace


@dataclass(frozen=True, slots=True)
class Started:
    """The mover is ready for work, and has its chunk index open."""


@dataclass(frozen=True, slots=True)
class IndexState:
    """The chunk index cannot be used, for this reason; or it can again."""

    error: PrimaryError | None


FromDaemon: TypeAlias = (
    MoverSettings
    | BeginBackup
    | BeginCopying
    | Aside
    | Copy
    | Part
    | AllParts
    | EndCopying
    | Files
    | Commit
    | Cancel
    | Fetch
    | Replicate
    | Ping
    | NewClients
)
FromMover: TypeAlias = Started | IndexState | Ready | Copied | Fetched | Committed | Replicated | Failed | Ended | Pong
Message: TypeAlias = FromDaemon | FromMover
LAST: tuple[type[Message], ...] = (Fetched, Committed, Replicated, Failed, Ended)
"""What ends a conversation."""
