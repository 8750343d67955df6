"""What is known of a file that nobody changes: from which restore point it differs, and in which chunks.

One file in the private directory for each, named after the inode's number.  It speaks of the file as it was when this
was written (`Seen`): of another one, or of the file after anybody wrote to it, it says nothing.  So it goes, durably,
before a write, and a damaged, old or missing one is no loss: then everything is read.  For the same reason it need not
be durable itself.  Blocking.  Layout: docs/FORMAT.md.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from vmfs_stub.core.changed import BITS_SIZE_MAX, Changed, bits_size
from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN
from vmfs_stub.core.ids import PointId, StoreId, VmId
from vmfs_stub.core.origin import Origin
from vmfs_stub.primary.durable_map import NEW_SUFFIX
from vmfs_stub.primary.envelope import (
    FILE_TIME_NS_END,
    UINT64_MAX,
    Body,
    Damaged,
    NewerVersion,
    seal,
    sealed_size,
    unseal,
)
from vmfs_stub.primary.files import FileCalls, read_fully, write_fully
from vmfs_stub.primary.identity import InodeIdentity

_MAGIC = b"VSTBCHG\0"
_VERSION = 1
_FILES_MAX = 2**32
RECORD_SIZE_MAX = BITS_SIZE_MAX + (1 << 20)
"""Bytes; the bits might not be compressible."""


@dataclass(frozen=True, slots=True)
class Seen:
    """By what it is recognised that a file was not changed: size in bytes, times in nanoseconds since the epoch."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: os.stat_result) -> Seen:
        """What stat says."""
        return cls(st.st_size, st.st_mtime_ns, st.st_ctime_ns)

    def is_content_of(self, st: os.stat_result) -> bool:
        """Whether nobody wrote to it, as far as those are honest who set times.

        Change of owner or names, which hypervisors make at every start, is no matter.
        """
        return (self.size, self.mtime_ns) == (st.st_size, st.st_mtime_ns)

    def is_all_of(self, st: os.stat_result) -> bool:
        """Whether nobody did anything to it: nobody can set the time of the last change of any kind."""
        return self == Seen.of(st)

    def is_left_as(self, st: os.stat_result, *, until_ns: int) -> bool:
        """Whether nobody did anything to it but what became of owner and names before ``until_ns``."""
        return self.is_all_of(st) or (self.is_content_of(st) and self.ctime_ns <= st.st_ctime_ns < until_ns)


@dataclass(frozen=True, slots=True)
class ChangedRecord:
    """The file with ``identity``, as long as it is as it was ``seen``."""

    identity: InodeIdentity
    seen: Seen
    changed: Changed


def encode_changed(record: ChangedRecord) -> bytes:
    """The bytes of the file: an envelope, then the compressed bits."""
    packed = zlib.compress(record.changed.bits, 1)
    body = {
        **described(record.identity, record.changed.origin),
        "seen": asdict(record.seen),
        "bits": {"size": len(packed), "digest": xxhash.xxh3_128_hexdigest(packed)},
    }
    return seal(_MAGIC, _VERSION, body) + packed


def decode_changed(raw: bytes) -> ChangedRecord:
    """Parse it.  Raises Damaged, NewerVersion."""
    body = Body(unseal(raw, magic=_MAGIC, version=_VERSION))
    identity, origin = take_described(body)
    seen, bits = body.body("seen"), body.body("bits")
    times = {"low": -FILE_TIME_NS_END, "high": FILE_TIME_NS_END - 1}
    was_seen = Seen(seen.integer("size"), seen.integer("mtime_ns", **times), seen.integer("ctime_ns", **times))
    size, digest = bits.integer("size", low=1, high=RECORD_SIZE_MAX), bits.identifier("digest")
    for each in (seen, bits, body):
        each.finish()
    packed = raw[sealed_size(raw) :]
    if len(packed) != size or xxhash.xxh3_128_hexdigest(packed) != digest:
        raise Damaged("its bits are not those that were written")
    return ChangedRecord(identity, was_seen, Changed(origin, _unpacked(packed, bits_size(origin))))


def _unpacked(packed: bytes, size: int) -> bytes:
    unpacking = zlib.decompressobj()
    try:
        bits = unpacking.decompress(packed, size + 1)
    except zlib.error as exc:
        raise Damaged("its bits cannot be unpacked") from exc
    if len(bits) != size:
        raise Damaged("it has another number of bits than its file has chunks")
    return bits


def described(identity: InodeIdentity, origin: Origin) -> dict[str, object]:
    """How a file and its origin are told in a body."""
    return {"identity": asdict(identity), "origin": asdict(origin)}


def take_described(body: Body) -> tuple[InodeIdentity, Origin]:
    """Identity and origin, as `described` put them into a body.  Raises Damaged."""
    identity, origin = body.body("identity"), body.body("origin")
    found = (
        InodeIdentity(
            identity.text("filesystem"),
            identity.integer("ino", high=UINT64_MAX),
            identity.integer("generation", high=UINT64_MAX),
        ),
        Origin(
            store_id=StoreId(origin.identifier("store_id")),
            vm_id=VmId(origin.identifier("vm_id")),
            point_id=PointId(origin.identifier("point_id")),
            file_index=origin.integer("file_index", high=_FILES_MAX),
            size=origin.integer("size", low=1),
            chunk_size=origin.integer("chunk_size", low=CHUNK_SIZE_MIN, high=CHUNK_SIZE_MAX),
        ),
    )
    for each in (identity, origin):
        each.finish()
    if bits_size(found[1]) > BITS_SIZE_MAX:
        raise Damaged("its file is larger than any of which changes are noted")
    return found


def save_changed(files: FileCalls, path: Path, record: ChangedRecord) -> None:
    """Put it in place of what is at ``path``.  Raises OSError; what was there is then there still."""
    new = path.with_name(path.name + NEW_SUFFIX)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = files.call("changes.create", os.open, new, flags, 0o600)
    try:
        files.call("changes.write", write_fully, fd, encode_changed(record), 0)
        files.call("changes.create", os.rename, new, path)
    finally:
        os.close(fd)


def load_changed(files: FileCalls, path: Path) -> ChangedRecord | None:
    """The record at ``path``; None when there is none, or none that says anything.  Raises OSError."""
    try:
        fd = files.call("changes.open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(fd).st_size
        return decode_changed(read_fully(files, "changes.read", fd, size, 0)) if size <= RECORD_SIZE_MAX else None
    except (Damaged, NewerVersion):
        return None
    finally:
        os.close(fd)
