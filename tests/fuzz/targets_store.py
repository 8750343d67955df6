"""What is read from secondary storage: hostile until proven otherwise."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import ClassVar

from blake3 import blake3
from lz4.block import LZ4BlockError, decompress  # type: ignore[import-untyped]
from xxhash import xxh3_128_digest

from tests.fuzz.seals import edit_document, seal_document, seal_pack, seal_tail
from tests.fuzz.target import Bound, Edit, Target, Violation, check_types, require
from tests.store_fakes import FakeObjects
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    AlreadyExists,
    CorruptFrame,
    CorruptManifest,
    CorruptPack,
    CorruptSegment,
    CorruptStoreObject,
    IntegrityError,
    NoSpace,
    ObjectMissing,
    PrimaryIOError,
    StoreUnavailable,
    UnknownFormat,
)
from vmfs_stub.core.ids import ChunkId, DatastoreId, PackId, PlaceholderId, PointId, SegmentId, StoreId, VmId, WriterId
from vmfs_stub.services.restore import restore_point
from vmfs_stub.store import frames
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.claims import Claim, ClaimState, decode_claim, encode_claim
from vmfs_stub.store.condemned import Condemned, decode_condemned, encode_condemned
from vmfs_stub.store.forgotten import Forgotten, decode_forgotten, encode_forgotten
from vmfs_stub.store.format import (
    FRAME_HEADER,
    FRAME_LENGTH_MAX,
    PACK_ENTRY,
    StoreDescription,
    decode_description,
    encode_description,
)
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keys import (
    claim_key,
    forgotten_key,
    is_id,
    is_segment_id,
    lease_key,
    manifest_key,
    moved_key,
    pack_key,
    pin_key,
    quarantine_key,
    segment_key,
)
from vmfs_stub.store.leases import LeaseState, decode_lease, encode_lease
from vmfs_stub.store.manifest import FileKind, Manifest, StoredFile, decode_manifest, encode_manifest
from vmfs_stub.store.moved import Move, decode_moved, encode_moved
from vmfs_stub.store.packs import OpenPack, read_footer
from vmfs_stub.store.pins import Pin, decode_pin, encode_pin
from vmfs_stub.store.quarantine import Quarantine, decode_quarantine, encode_quarantine
from vmfs_stub.store.segments import Segment, entries_of, seal_segment
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
PACK = PackId("3a" * 16)
WRITER = WriterId("7b" * 8)
VM, POINT, PLACEHOLDER = VmId("1b" * 16), PointId("2c" * 16), PlaceholderId("4d" * 16)

PLAIN = bytes(range(256)) * 40
"""Compresses well."""
NOISE = b"".join(blake3(str(number).encode()).digest() for number in range(100))


def frame_of(raw: bytes, pack: OpenPack) -> FrameRef:
    """Lay a chunk into a pack as a backup does."""
    room = memoryview(bytearray(FRAME_LENGTH_MAX))
    return pack.add(frames.encode(memoryview(raw), ChunkId(blake3(raw).digest()), into=room))


def sample_pack(pack_id: PackId = PACK, *chunks: bytes) -> tuple[bytes, list[FrameRef]]:
    """A sealed pack of chunks and the references to its frames."""
    pack = OpenPack(pack_id)
    refs = [frame_of(raw, pack) for raw in chunks or (PLAIN, NOISE, PLAIN[:5], NOISE[:700])]
    return bytes(pack.seal().data), refs


class FrameTarget(Target):
    """A frame, read by a reference: the input is the reference as a footer has it, and the frame."""

    name = "frame"
    permitted = (CorruptFrame,)
    bound = Bound(base_bytes=4 << 20, per_byte=4)
    is_checked = True

    def seeds(self) -> list[bytes]:
        pack, refs = sample_pack()
        return [
            PACK_ENTRY.pack(ref.chunk_id, ref.offset, ref.length, ref.raw_length, ref.checksum)
            + pack[ref.offset : ref.end]
            for ref in refs
        ]

    def call(self, data: bytes) -> object:
        reference = data[: PACK_ENTRY.size].ljust(PACK_ENTRY.size, b"\0")
        chunk_id, offset, length, raw_length, checksum = PACK_ENTRY.unpack(reference)
        ref = FrameRef(ChunkId(chunk_id), PACK, offset, length, raw_length, checksum)
        raw = frames.decode(memoryview(data[PACK_ENTRY.size :]), ref)
        require(len(raw) == raw_length and xxh3_128_digest(raw) == checksum, "a frame of other bytes than referred to")
        return raw

    def reseal(self, data: bytes) -> bytes:
        """The reference and the header agree, with each other and with the payload as far as it can be decoded."""
        frame_at = PACK_ENTRY.size
        if len(data) < frame_at + FRAME_HEADER.size:
            return data
        payload = data[frame_at + FRAME_HEADER.size :]
        flags, raw_length = data[frame_at + 4], struct.unpack_from("<I", data, frame_at + 8)[0]
        raw = payload
        if flags & 1:
            try:
                raw = decompress(payload, uncompressed_size=min(raw_length, 1 << 21))
            except (LZ4BlockError, ValueError):
                raw = b""
        checksum = xxh3_128_digest(raw)
        header = data[frame_at : frame_at + 8] + struct.pack("<II", raw_length, len(payload)) + checksum
        entry = data[:36] + struct.pack("<II", FRAME_HEADER.size + len(payload), raw_length) + checksum
        return entry + header + payload


class PackTarget(Target):
    """The footer of a pack, as it is read to make an index again."""

    name = "pack"
    permitted = (CorruptPack, UnknownFormat)
    is_checked = True

    def seeds(self) -> list[bytes]:
        return [sample_pack()[0], sample_pack(PACK, PLAIN)[0], sample_pack(PACK, *[NOISE[:90]] * 40)[0]]

    def call(self, data: bytes) -> object:
        objects = FakeObjects()
        objects.contents[pack_key(PACK)] = data
        refs = read_footer(objects, PACK)
        end = 0
        for ref in refs:
            check_types(ref)
            require(ref.offset == end and ref.end <= len(data), "a frame outside its pack")
            end = ref.end
        entries = [PACK_ENTRY.pack(r.chunk_id, r.offset, r.length, r.raw_length, r.checksum) for r in refs]
        require(data.endswith(b"".join(entries), 0, len(data) - 76), "the footer does not read back")
        return refs

    def reseal(self, data: bytes) -> bytes:
        return seal_pack(data)


class SegmentTarget(Target):
    """A segment; the input is its name (40 bytes) and its bytes."""

    name = "segment"
    permitted = (CorruptSegment, UnknownFormat)
    bound = Bound(base_bytes=6 << 20)
    """Two bytes of a slot become a reference, but there are no more than 4,096 slots."""
    is_checked = True

    def seeds(self) -> list[bytes]:
        _, refs = sample_pack()
        _, others = sample_pack(PackId("5e" * 16))
        tables = ([*refs, None, *others, refs[0]], [None] * 400 + [refs[1]], [refs[0]] * 300, refs[:1])
        sealed = [seal_segment(entries_of(table), CHUNK, WRITER) for table in tables]
        return [bytes.fromhex(one.segment_id) + one.data for one in sealed if one is not None]

    def call(self, data: bytes) -> object:
        segment = Segment(data[40:], SegmentId(data[:40].hex()))
        entries = segment.entries(0, segment.slot_count)
        found = [segment.ref(slot) for slot in range(segment.slot_count)]
        require(entries == entries_of(found), "entries are not what they are when taken apart")
        for ref in found:
            if ref is not None:
                check_types(ref)
        if any(ref is not None for ref in found):
            again = seal_segment(entries_of(found), segment.chunk_size, WRITER)
            require(again is not None, "a segment is lost when it is written again")
            assert again is not None
            reread = Segment(again.data, again.segment_id)
            require([reread.ref(slot) for slot in range(reread.slot_count)] == found, "a segment does not read back")
        return segment.chunk_size, segment.packs, found

    def reseal(self, data: bytes) -> bytes:
        return blake3(data[40:]).digest() + data[32:]


class IndexObjectTarget(Target):
    """An index object."""

    name = "index-object"
    permitted = (CorruptStoreObject, UnknownFormat)
    is_checked = True

    def seeds(self) -> list[bytes]:
        packs = [(PackId(digit * 32), sample_pack(PackId(digit * 32))[1]) for digit in "1234"]
        return [encode_index(packs), encode_index(packs[:1]), encode_index([])]

    def call(self, data: bytes) -> object:
        packs = decode_index(data, "index/1")
        require(encode_index(packs) == data, "an index object does not read back")
        return packs

    def reseal(self, data: bytes) -> bytes:
        return seal_tail(data)


class DocumentTarget(Target):
    """The store's description; what all documents share."""

    name = "description"
    permitted: ClassVar[tuple[type[Exception], ...]] = (CorruptStoreObject, UnknownFormat)
    tokens: ClassVar[tuple[bytes, ...]] = (
        b"[",
        b'{"a":',
        b'"\\ud800"',
        b"NaN",
        b"1e999",
        b"9" * 50,
        b"\n",
        b'"required":["x"],',
    )
    bound = Bound(per_byte=200)
    is_checked = True

    def seeds(self) -> list[bytes]:
        return [encode_description(StoreDescription(StoreId(digit * 32), CHUNK << int(digit))) for digit in "0123"]

    def call(self, data: bytes) -> object:
        description = decode_description(data)
        check_types(description)
        require(decode_description(encode_description(description)) == description, "does not read back")
        return description

    def reseal(self, data: bytes) -> bytes:
        return seal_document(data)

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        return edit_document(data, edit)


class PinTarget(DocumentTarget):
    """A pin."""

    name = "pin"

    def seeds(self) -> list[bytes]:
        pins = (
            Pin(PLACEHOLDER, "host1", "vms", 1_700_000_000.25, "n" * 32),
            Pin(PLACEHOLDER, "\udcff\x1b[2J", "", 0.0),
        )
        return [encode_pin(pin, VM, POINT) for pin in pins]

    def call(self, data: bytes) -> object:
        key = pin_key(VM, POINT, PLACEHOLDER)
        pin = decode_pin(data, key)
        check_types(pin)
        require(decode_pin(encode_pin(pin, VM, POINT), key) == pin, "a pin does not read back")
        return pin


class LeaseTarget(DocumentTarget):
    """A lease."""

    name = "lease"

    def seeds(self) -> list[bytes]:
        return [encode_lease(LeaseState(WRITER, counter)) for counter in (0, 2**40)]

    def call(self, data: bytes) -> object:
        state = decode_lease(data, lease_key(WRITER))
        check_types(state)
        require(decode_lease(encode_lease(state), lease_key(WRITER)) == state, "a lease does not read back")
        return state


class CondemnedTarget(DocumentTarget):
    """A list of what is condemned."""

    name = "condemned"

    def seeds(self) -> list[bytes]:
        packs = frozenset(PackId(digit * 32) for digit in "123")
        some = Condemned(packs, frozenset([SegmentId("6f" * 40)]), frozenset([PackId("4" * 32)]))
        return [encode_condemned(each, "nonce") for each in (some, Condemned())]

    def call(self, data: bytes) -> object:
        found = decode_condemned(data, "condemned/list")
        require(all(map(is_id, found.packs)) and all(map(is_segment_id, found.segments)), "a name that is none")
        require(decode_condemned(encode_condemned(found, ""), "condemned/list") == found, "a list does not read back")
        return found


class QuarantineTarget(DocumentTarget):
    """The mark of a damaged pack."""

    name = "quarantine"

    def seeds(self) -> list[bytes]:
        marks = (
            Quarantine(1_700_000_000.25, (0, 65_568, 1 << 26), "has damaged content", "n" * 16),
            Quarantine(0.0, (), "\udcff\x1b[2J"),
        )
        return [encode_quarantine(mark, PACK) for mark in marks]

    def call(self, data: bytes) -> object:
        key = quarantine_key(PACK)
        mark = decode_quarantine(data, key)
        check_types(mark)
        require(decode_quarantine(encode_quarantine(mark, PACK), key) == mark, "a mark does not read back")
        return mark


class MovedTarget(DocumentTarget):
    """Where frames of a damaged pack are now."""

    name = "moved"

    def seeds(self) -> list[bytes]:
        moves = [Move(at, PackId(digit * 32), at + 32, 33 + at) for at, digit in ((0, "1"), (65_568, "2"))]
        return [encode_moved(each, PACK, "nonce") for each in (moves, [])]

    def call(self, data: bytes) -> object:
        key = moved_key(PACK, "5e" * 16)
        moves = decode_moved(data, key)
        for move in moves:
            check_types(move)
            require(is_id(move.pack_id) and 0 < move.length <= FRAME_LENGTH_MAX, "a place where no frame can be")
        require(decode_moved(encode_moved(moves, PACK, ""), key) == moves, "a document does not read back")
        return moves


class ClaimTarget(DocumentTarget):
    """A claim."""

    name = "claim"

    def seeds(self) -> list[bytes]:
        held = Claim(VM, 1, ClaimState.HELD, DatastoreId("9" * 32), "host1", "vms", 1_700_000_000.25, nonce="n" * 16)
        free = Claim(VM, 1, ClaimState.FREE, DatastoreId("9" * 32), "\udcff\x1b[2J", "", 0.0, POINT)
        return [encode_claim(held), encode_claim(free)]

    def call(self, data: bytes) -> object:
        key = claim_key(VM, 1)
        claim = decode_claim(data, key)
        check_types(claim)
        require(decode_claim(encode_claim(claim), key) == claim, "a claim does not read back")
        return claim


class ForgottenTarget(DocumentTarget):
    """The mark of a forgotten restore point."""

    name = "forgotten"

    def seeds(self) -> list[bytes]:
        marks = (
            Forgotten("host1", 1_700_000_000.25, "rules: keep_last 3, keep_daily 7", "n" * 16),
            Forgotten("\udcff\x1b[2J", 0.0, ""),
        )
        return [encode_forgotten(mark, VM, POINT) for mark in marks]

    def call(self, data: bytes) -> object:
        key = forgotten_key(VM, POINT)
        mark = decode_forgotten(data, key)
        check_types(mark)
        require(decode_forgotten(encode_forgotten(mark, VM, POINT), key) == mark, "a mark does not read back")
        return mark


def sample_manifest(*files: StoredFile, top: StoredFile | None = None) -> bytes:
    """A manifest of files."""
    return encode_manifest(
        Manifest(VM, POINT, "web \udcff", 1_700_000_000.5, "host1", CHUNK, files, {"domain": "<domain/>"}, top)
    )


def sample_file(path: str, kind: FileKind = FileKind.FILE, size: int = 0, **fields: object) -> StoredFile:
    """An entry of a manifest."""
    return StoredFile(path, kind, size, 0o640, 0, 0, 1_700_000_000_000_000_001, -5, **fields)  # type: ignore[arg-type]


class ManifestTarget(DocumentTarget):
    """A manifest, up to the rule that no path of it leads out."""

    name = "manifest"
    permitted: ClassVar[tuple[type[Exception], ...]] = (CorruptManifest, UnknownFormat)
    tokens = (*DocumentTarget.tokens, b"../", b"\\u0000", b"/a", b'"path":"', b"null,", b"{},")

    def seeds(self) -> list[bytes]:
        xattrs = {"user.comment": b"\0\xff", "security.capability": b"x"}
        segment = SegmentId("6f" * 40)
        return [
            sample_manifest(
                sample_file("disk.raw", size=3 << 28, segments=(segment, None, segment), xattrs=xattrs),
                sample_file("sub", FileKind.DIRECTORY),
                sample_file("sub/deep/link", FileKind.SYMLINK, target="../../disk.raw"),
                sample_file("sub/\udcff \udc80", size=1, segments=(None,)),
            ),
            sample_manifest(top=sample_file("web \udcff", FileKind.DIRECTORY, xattrs=xattrs)),
            sample_manifest(sample_file("link", FileKind.SYMLINK, target="disk")),
            sample_manifest(*(sample_file("/".join("abcdefgh"[: depth + 1])) for depth in (7,))),
        ]

    def call(self, data: bytes) -> object:
        manifest = decode_manifest(data, manifest_key(VM, POINT))
        check_types(manifest)
        for stored in manifest.files:
            check_path(stored.path)
            require(all(one is None or is_segment_id(one) for one in stored.segments), "a segment id that is none")
            require(stored.target is None or "\0" not in os.fsencode(stored.target).decode("latin-1"), "a target")
        if manifest.top is not None:
            check_path(manifest.top.path)
            require("/" not in manifest.top.path and manifest.top.kind is FileKind.DIRECTORY, "a top that is none")
        require(is_id(manifest.vm_id) and is_id(manifest.point_id), "an id that is none")
        require(decode_manifest(encode_manifest(manifest), "manifests/x") == manifest, "does not read back")
        return manifest


def check_path(path: str) -> None:
    """Raise Violation when ``path`` can name anything but something below the directory that it is relative to."""
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError as exc:
        raise Violation("a path that no file can have") from exc
    below = os.path.normpath(b"/top/" + raw)
    require(b"\0" not in raw and below.startswith(b"/top/") and below == b"/top/" + raw, "a path that leads out")


class RestoreTarget(ManifestTarget):
    """A manifest, its segments and frames written out as files: nothing outside the target may change."""

    name = "restore"
    permitted = (
        IntegrityError,
        UnknownFormat,
        AlreadyExists,
        NoSpace,
        PrimaryIOError,
        ObjectMissing,
        StoreUnavailable,
    )
    bound = Bound(base_bytes=24 << 20, per_byte=200, cpu_s=5.0)
    is_checked = False
    size_max: ClassVar[int] = 1 << 24
    """Larger files are not written: their size alone costs time."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        objects = FakeObjects()
        self._store = Store.create(objects, chunk_size=CHUNK)
        raw = [(PLAIN * 7)[:CHUNK], bytes(reversed(PLAIN)) * 6 + bytes(CHUNK - 6 * len(PLAIN)), PLAIN[:100]]
        pack, refs = sample_pack(PACK, *raw)
        objects.contents[pack_key(PACK)] = pack
        segment = seal_segment(entries_of([refs[0], None, refs[1], refs[2]]), CHUNK, WRITER)
        assert segment is not None
        self._segment, self._content = segment.segment_id, raw[0] + bytes(CHUNK) + raw[1] + raw[2]
        objects.contents[segment_key(segment.segment_id)] = segment.data
        self._witness = place / "outside"
        self._witness.write_bytes(b"as it was")

    def seeds(self) -> list[bytes]:
        disk = sample_file(
            "d/disk.raw", size=len(self._content), segments=(self._segment,), xattrs={"user.comment": b"\0\xff"}
        )
        return [
            sample_manifest(
                disk,
                sample_file("empty"),
                sample_file("d", FileKind.DIRECTORY),
                sample_file("link", FileKind.SYMLINK, target="d/disk.raw"),
                sample_file("zeros \udcff", size=5 * CHUNK, segments=(None,)),
            ),
            sample_manifest(
                sample_file("x/y/z", FileKind.DIRECTORY), sample_file("x/link", FileKind.SYMLINK, target="/")
            ),
            sample_manifest(sample_file("link", FileKind.SYMLINK, target="disk")),
            sample_manifest(sample_file("empty", xattrs={"user.a": b"1", "user.b": b"2"})),
        ]

    def call(self, data: bytes) -> object:
        manifest = decode_manifest(data, manifest_key(VM, POINT))
        if sum(stored.size for stored in manifest.files) > self.size_max:
            return None
        to = self.place / "to"
        try:
            restore_point(self._store, RestorePoint(manifest, self._store.segments), to)
            for stored in manifest.files:
                self._check(to, stored)
        finally:
            left = {path.name for path in self.place.iterdir()} - {"to", "outside"}
            shutil.rmtree(to, ignore_errors=True)
            require(not left, "something was made outside the target", str(left))
            require(self._witness.read_bytes() == b"as it was", "a file outside the target was changed")
        return None

    def _check(self, to: Path, stored: StoredFile) -> None:
        st = (to / stored.path).lstat()
        kinds = {FileKind.FILE: 0o100000, FileKind.DIRECTORY: 0o040000, FileKind.SYMLINK: 0o120000}
        require(st.st_mode & 0o170000 == kinds[stored.kind], "another kind of file was restored")
        if stored.kind is FileKind.FILE:
            content = self._content if stored.segments == (self._segment,) else bytes(stored.size)
            require((to / stored.path).read_bytes() == content, "wrong bytes were restored")
