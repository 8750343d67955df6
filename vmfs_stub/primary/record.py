"""The placeholder record: what makes a sparse file a placeholder.

It lives in one extended attribute of the file, so that rename, chmod and hard links need no bookkeeping.
A record is bound to its inode: on a copy of the file it does not count.  Layout: docs/FORMAT.md.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass

from vmfs_stub.core.errors import CorruptRecord, IdentityMismatch, UnknownFormat
from vmfs_stub.core.ids import PlaceholderId, PointId, StoreId, VmId
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.primary.envelope import (
    FILE_TIME_NS_END,
    TIME_NS_MIN,
    UINT64_MAX,
    Body,
    Damaged,
    NewerVersion,
    seal,
    unseal,
)
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import InodeIdentity

_MAGIC = b"VSPHREC\0"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class PlaceholderRecord:
    """What a placeholder stands for.

    Sizes are bytes, times nanoseconds since the epoch; ``file_index`` counts the files of the restore point;
    ``replaces`` is the placeholder that this file was before, when it was archived again while partly recalled.
    """

    placeholder_id: PlaceholderId
    store_id: StoreId
    vm_id: VmId
    point_id: PointId
    file_index: int
    size: int
    mtime_ns: int
    archived_ns: int
    filesystem: str
    ino: int
    generation: int
    replaces: PlaceholderId | None = None

    @property
    def identity(self) -> InodeIdentity:
        """The inode that the record was made for."""
        return InodeIdentity(self.filesystem, self.ino, self.generation)


def encode_record(record: PlaceholderRecord) -> bytes:
    """The bytes of the extended attribute."""
    return seal(_MAGIC, _VERSION, asdict(record))


def decode_record(raw: bytes, *, label: str) -> PlaceholderRecord:
    """Parse an extended attribute; ``label`` names the file.  Raises CorruptRecord, UnknownFormat."""
    try:
        return _record_of(Body(unseal(raw, magic=_MAGIC, version=_VERSION)))
    except NewerVersion as exc:
        raise UnknownFormat(f"{label}: the placeholder record is of {exc}") from exc
    except Damaged as exc:
        raise CorruptRecord(
            f"{label}: the placeholder record is damaged: {exc}; write the restore point out elsewhere with "
            "`vmfs-stub restore`"
        ) from exc


def _record_of(body: Body) -> PlaceholderRecord:
    replaces = body.identifier_or_none("replaces")
    record = PlaceholderRecord(
        placeholder_id=PlaceholderId(body.identifier("placeholder_id")),
        store_id=StoreId(body.identifier("store_id")),
        vm_id=VmId(body.identifier("vm_id")),
        point_id=PointId(body.identifier("point_id")),
        file_index=body.integer("file_index"),
        size=body.integer("size"),
        mtime_ns=body.integer("mtime_ns", low=-FILE_TIME_NS_END, high=FILE_TIME_NS_END - 1),
        archived_ns=body.integer("archived_ns", low=TIME_NS_MIN),
        filesystem=body.text("filesystem"),
        ino=body.integer("ino", high=UINT64_MAX),
        generation=body.integer("generation", high=UINT64_MAX),
        replaces=None if replaces is None else PlaceholderId(replaces),
    )
    body.finish()
    return record


def read_record(files: FileCalls, site: str, fd: int | str, *, label: str) -> PlaceholderRecord | None:
    """The record of a file, None where there is none.  Raises CorruptRecord, UnknownFormat, OSError."""
    try:
        raw = files.call(site, os.getxattr, fd, PLACEHOLDER_XATTR)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return None
        raise
    return decode_record(raw, label=label)


def check_identity(record: PlaceholderRecord, actual: InodeIdentity, *, label: str) -> None:
    """Refuse a record that was made for another inode.  Raises IdentityMismatch."""
    if record.identity != actual:
        raise IdentityMismatch(
            f"{label} is a copy of a placeholder, not the placeholder itself: which blocks were written since is known "
            f"only to the original (inode {record.ino}). Remove this copy, and copy the original through the mount"
        )
