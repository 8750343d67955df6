"""Every object kind: what is written is read back, and one flipped bit, a cut or an absence is the right error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fakes import FakeObjects
from store_points import back_up, new_id, stored_file

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    ConfigError,
    CorruptFrame,
    CorruptManifest,
    CorruptPack,
    CorruptSegment,
    CorruptStoreObject,
    IntegrityError,
    ObjectMissing,
    PointNotFound,
    UnknownFormat,
    VmfsStubError,
)
from vmfs_stub.core.ids import ChunkId, PackId, PlaceholderId, PointId, StoreId, VmId, WriterId
from vmfs_stub.store import documents, frames
from vmfs_stub.store.format import (
    ENCRYPTION,
    FRAME_HEADER,
    SEGMENT_CHUNKS,
    StoreDescription,
    decode_description,
    encode_description,
)
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keys import segment_id_of
from vmfs_stub.store.manifest import (
    TIME_NS_END,
    FileKind,
    Manifest,
    StoredFile,
    decode_manifest,
    encode_manifest,
    segment_count,
)
from vmfs_stub.store.packs import OpenPack, read_footer
from vmfs_stub.store.pins import Pin, decode_pin, encode_pin
from vmfs_stub.store.segments import Segment, entries_of, seal_segment
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
WRITER = WriterId("0123456789abcdef")
RANDOM = random.Random(3)
IDS = st.binary(min_size=16, max_size=16).map(bytes.hex)
TEXTS = st.text(max_size=20)
XATTR_NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


def _frame(raw: bytes, pack: str = "ab" * 16, offset: int = 0) -> tuple[bytes, FrameRef]:
    encoded = frames.encode(
        memoryview(raw), ChunkId(blake3(raw).digest()), into=memoryview(bytearray(len(raw) + FRAME_HEADER.size))
    )
    frame = bytes(encoded.frame)
    return frame, FrameRef(encoded.chunk_id, PackId(pack), offset, len(frame), len(raw), encoded.checksum)


def _ref(number: int, pack: str = "ab" * 16, offset: int = 0, raw_length: int = CHUNK) -> FrameRef:
    digest = blake3(b"%d" % number).digest()
    return FrameRef(ChunkId(digest), PackId(pack), offset, 100, raw_length, digest[:16])


@given(st.one_of(st.binary(min_size=1, max_size=3000), st.binary(min_size=1, max_size=30).map(lambda b: b * 100)))
def test_a_frame_gives_its_chunk_back(raw: bytes) -> None:
    frame, ref = _frame(raw)
    assert frames.decode(memoryview(frame), ref) == raw
    frames.check_identity(raw, ref)
    assert ref.length <= FRAME_HEADER.size + len(raw)


@pytest.mark.parametrize("raw", [RANDOM.randbytes(300), b"abc" * 100], ids=["raw", "lz4"])
def test_any_flipped_bit_of_a_frame_is_found(raw: bytes) -> None:
    frame, ref = _frame(raw)
    harmless = 0
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = frames.decode(memoryview(damaged), ref)
        except CorruptFrame as exc:
            assert ref.pack_id in str(exc)
        else:
            # Several lz4 blocks mean the same bytes (a repetition's distance doubled): not wrong, so not an error.
            assert found == raw
            harmless += 1
    assert harmless <= (0 if len(frame) > len(raw) else 16)


@given(st.data())
def test_random_bytes_are_no_frame(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=1, max_size=200))
    frame, ref = _frame(raw)
    junk = data.draw(st.binary(max_size=300))
    if junk != frame:
        with pytest.raises(CorruptFrame):
            frames.decode(memoryview(junk), ref._replace(length=max(len(junk), 1)))


def test_a_frame_that_claims_a_huge_length_allocates_nothing() -> None:
    frame, ref = _frame(b"abc" * 100)
    damaged = bytearray(frame)
    damaged[8:12] = b"\xff\xff\xff\x7f"
    with pytest.raises(CorruptFrame):
        frames.decode(memoryview(damaged), ref._replace(raw_length=0x7FFFFFFF))


def test_identities_of_zeros_and_short_ends() -> None:
    data = bytes(CHUNK) + b"a" * CHUNK + bytes(CHUNK - 1) + b"b" + bytes(10)
    ids = frames.identities(data, CHUNK)
    assert [found is None for found in ids] == [True, False, False, True]
    middle = bytearray(CHUNK)
    middle[CHUNK // 2] = 1
    assert frames.identities(middle, CHUNK) == [blake3(middle).digest()]


def _stored_pack() -> tuple[FakeObjects, PackId, list[FrameRef]]:
    pack = OpenPack(PackId(new_id()))
    for number in range(5):
        raw = RANDOM.randbytes(200 + number)
        room = memoryview(bytearray(500))
        pack.add(frames.encode(memoryview(raw), ChunkId(blake3(raw).digest()), into=room))
    sealed = pack.seal()
    objects = FakeObjects()
    objects.put(f"packs/{pack.pack_id[:2]}/{pack.pack_id}", sealed.data)
    return objects, pack.pack_id, list(sealed.refs)


def test_a_footer_lists_the_frames() -> None:
    objects, pack_id, refs = _stored_pack()
    assert read_footer(objects, pack_id) == refs


def test_any_flipped_bit_of_a_footer_is_found() -> None:
    objects, pack_id, refs = _stored_pack()
    (key,) = objects.contents
    whole = objects.contents[key]
    for bit in range(refs[-1].end * 8, len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        objects.contents[key] = bytes(damaged)
        with pytest.raises(CorruptPack, match=key):
            read_footer(objects, pack_id)


def test_a_pack_that_is_cut_emptied_lengthened_renamed_or_gone_is_found() -> None:
    objects, pack_id, _ = _stored_pack()
    (key,) = objects.contents
    whole = objects.contents[key]
    for damaged in [whole[:end] for end in range(len(whole))] + [whole + b"x"]:
        objects.contents[key] = damaged
        with pytest.raises(CorruptPack, match=key):
            read_footer(objects, pack_id)
    other = PackId(new_id())
    objects.contents = {f"packs/{other[:2]}/{other}": whole}
    with pytest.raises(CorruptPack, match="another name"):
        read_footer(objects, other)
    with pytest.raises(ObjectMissing):
        read_footer(objects, pack_id)


PLACES = st.one_of(st.none(), st.tuples(st.integers(0, 20), st.sampled_from(["aa" * 16, "bb" * 16, "cc" * 16])))


@given(st.lists(PLACES, min_size=1, max_size=60))
def test_a_segment_gives_its_entries_back(places: list[tuple[int, str] | None]) -> None:
    entries = [None if place is None else _ref(place[0], place[1], place[0] * 100) for place in places]
    sealed = seal_segment(entries_of(entries), CHUNK, WRITER)
    if sealed is None:
        assert not any(entries)
        return
    segment = Segment(sealed.data, sealed.segment_id)
    assert [segment.ref(slot) for slot in range(segment.slot_count)] == entries
    assert set(segment.packs) == sealed.packs == {ref.pack_id for ref in entries if ref}


@given(st.lists(PLACES, min_size=1, max_size=60), st.data())
def test_chunks_go_from_one_segment_to_another_as_they_are(places: list[tuple[int, str] | None], draw: Any) -> None:
    refs = [None if place is None else _ref(place[0], place[1], place[0] * 100) for place in places]
    first = draw.draw(st.integers(0, len(refs)))
    end = draw.draw(st.integers(first, len(refs)))
    sealed = seal_segment(entries_of(refs), CHUNK, WRITER)
    if sealed is None:
        return
    found = Segment(sealed.data, sealed.segment_id).entries(first, end)
    assert found == entries_of(refs[first:end])
    assert [entry and entry.ref for entry in found] == refs[first:end]


def test_entries_of_one_place_that_differ_stay_apart() -> None:
    """A forged segment has such ones; the first stood for both when its entries were used again."""
    entry = _ref(1)
    entries = [entry, entry._replace(checksum=bytes(16)), entry._replace(raw_length=entry.raw_length - 1), entry]
    sealed = seal_segment(entries_of(entries), CHUNK, WRITER)
    assert sealed is not None
    segment = Segment(sealed.data, sealed.segment_id)
    assert [segment.ref(slot) for slot in range(segment.slot_count)] == entries


def test_a_full_segment() -> None:
    entries = [_ref(number, offset=number * 100) for number in range(SEGMENT_CHUNKS)]
    sealed = seal_segment(entries_of(entries), CHUNK, WRITER)
    assert sealed is not None
    segment = Segment(sealed.data, sealed.segment_id)
    assert [segment.ref(slot) for slot in range(SEGMENT_CHUNKS)] == entries


def test_any_flipped_bit_or_cut_of_a_segment_is_found() -> None:
    sealed = seal_segment(entries_of([_ref(1), None, _ref(2, offset=100)]), CHUNK, WRITER)
    assert sealed is not None
    for bit in range(len(sealed.data) * 8):
        damaged = bytearray(sealed.data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptSegment, match=sealed.segment_id):
            Segment(bytes(damaged), sealed.segment_id)
    for end in range(len(sealed.data)):
        with pytest.raises(CorruptSegment):
            Segment(sealed.data[:end], sealed.segment_id)


@given(st.integers(0, 300), st.binary(min_size=1, max_size=8))
def test_a_hostile_segment_that_matches_its_name_gives_a_typed_error_or_sane_refs(at: int, junk: bytes) -> None:
    sealed = seal_segment(entries_of([_ref(1), None, _ref(2, offset=100), _ref(3, "cd" * 16)]), CHUNK, WRITER)
    assert sealed is not None
    data = bytearray(sealed.data)
    data[at : at + len(junk)] = junk
    try:
        segment = Segment(bytes(data), segment_id_of(blake3(data).hexdigest(), WRITER))
        entries = segment.entries(0, segment.slot_count)
        refs = [segment.ref(slot) for slot in range(segment.slot_count)]
    except (CorruptSegment, UnknownFormat):
        return
    assert entries == entries_of(refs)
    for ref in refs:
        assert ref is None or (ref.raw_length <= segment.chunk_size and ref.end <= 2**26 and len(ref.pack_id) == 32)


FILES = st.builds(
    lambda path, size, mode, mtime, xattrs: stored_file(
        path, size, [None] * segment_count(size, CHUNK), mode=mode, mtime_ns=mtime, xattrs=xattrs
    ),
    path=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
        lambda name: name not in (".", "..") and len(name.encode()) < 250
    ),
    size=st.integers(0, 2**33),
    mode=st.integers(0, 0o7777),
    mtime=st.integers(-TIME_NS_END, TIME_NS_END - 1),
    xattrs=st.dictionaries(XATTR_NAMES, st.binary(max_size=20), max_size=3),
)


@given(IDS, IDS, TEXTS, st.lists(FILES, max_size=4, unique_by=lambda stored: stored.path))
def test_a_manifest_gives_itself_back(vm: str, point: str, name: str, files: list[StoredFile]) -> None:
    top = replace(files[0], kind=FileKind.DIRECTORY, size=0, segments=()) if files else None
    made = Manifest(VmId(vm), PointId(point), name, 1.25, "host", CHUNK, tuple(files), {"domain": name}, top)
    data = encode_manifest(made)
    assert decode_manifest(data, f"manifests/{vm}/{point}") == made
    assert encode_manifest(decode_manifest(data, "manifests/x")) == data


def test_names_that_are_not_text_survive() -> None:
    name = b"disk\xff\xfe".decode("utf-8", "surrogateescape")
    made = Manifest(VmId("a" * 32), PointId("b" * 32), name, 1.0, "h", CHUNK, (stored_file(name, 0),))
    assert decode_manifest(encode_manifest(made), "manifests/x").files[0].path.encode("utf-8", "surrogateescape") == (
        b"disk\xff\xfe"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": 2**63},
        {"size": True},
        {"size": "1"},
        {"mode": 0o10000},
        {"mtime_ns": TIME_NS_END},
        {"uid": 2**32},
        {"kind": "device"},
        {"kind": "symlink"},
        {"target": "x"},
        {"segments": ["../../x"]},
        {"segments": [None, None]},
        {"segments": [1]},
        {"xattrs": {"user.a": "not base64!"}},
        {"xattrs": []},
        {"path": 5},
        {"path": None},
    ],
)
def test_a_manifest_with_an_impossible_file_is_refused(change: dict[str, object]) -> None:
    body = {
        "vm_id": "a" * 32,
        "point_id": "b" * 32,
        "vm_name": "x",
        "created_s": 1.0,
        "host": "h",
        "chunk_size": CHUNK,
        "metadata": {},
    }
    good = {"path": "a", "kind": "file", "size": 10, "mode": 0, "uid": 0, "gid": 0, "mtime_ns": 0, "atime_ns": 0}
    good["segments"] = [None]
    key = "manifests/a/b"
    assert decode_manifest(documents.encode("vmfs-stub manifest", 1, {**body, "files": [good]}), key)
    with pytest.raises(CorruptManifest, match=key):
        decode_manifest(documents.encode("vmfs-stub manifest", 1, {**body, "files": [{**good, **change}]}), key)


@pytest.mark.parametrize(
    "top",
    [[], "web", {}]
    + [
        {"path": "web", "kind": "directory", "mode": 0, "uid": 0, "gid": 0, "mtime_ns": 0, "atime_ns": 0, **change}
        for change in ({"path": "../web"}, {"path": "a/b"}, {"path": ".."}, {"path": ""}, {"kind": "file"}, {"size": 1})
    ],
)
def test_a_manifest_whose_top_is_no_directory_of_the_top_is_refused(top: object) -> None:
    made = Manifest(VmId("a" * 32), PointId("b" * 32), "x", 1.0, "h", CHUNK, ())
    body = {**json.loads(encode_manifest(made).split(b"\n")[0]), "top": top}
    data = documents.encode("vmfs-stub manifest", 1, body)
    with pytest.raises(CorruptManifest, match="manifests/x"):
        decode_manifest(data, "manifests/x")


@pytest.mark.parametrize("line", [b"[]", b"1", b"{", b"[" * 100_000, b"\xff", b'{"a": NaN}', b"1" * 10_000, b"{}"])
def test_whole_documents_of_nonsense_are_refused(line: bytes) -> None:
    data = line + b'\n{"blake3":"' + blake3(line).hexdigest().encode() + b'"}\n'
    with pytest.raises(CorruptStoreObject, match="pins/x"):
        documents.decode(data, "pins/x", "any", version=1)


def _documents() -> dict[str, tuple[bytes, Callable[[bytes], object], type[IntegrityError]]]:
    pin = Pin(PlaceholderId("c" * 32), "host", "images", 1.5, "nonce")
    vm, point = VmId("a" * 32), PointId("b" * 32)
    manifest = Manifest(vm, point, "web1", 1.0, "h", CHUNK, (stored_file("disk", 5, [None]),))
    index = [(PackId("ab" * 16), [_ref(1), _ref(2, offset=100)])]
    return {
        "description": (
            encode_description(StoreDescription(StoreId("d" * 32), CHUNK)),
            decode_description,
            CorruptStoreObject,
        ),
        "pin": (
            encode_pin(pin, vm, point),
            lambda data: decode_pin(data, f"pins/{vm}/{point}/{pin.placeholder_id}"),
            CorruptStoreObject,
        ),
        "manifest": (encode_manifest(manifest), lambda data: decode_manifest(data, "manifests/x"), CorruptManifest),
        "index": (encode_index(index), lambda data: decode_index(data, "index/x"), CorruptStoreObject),
    }


@pytest.mark.parametrize("kind", ["description", "pin", "manifest", "index"])
def test_any_flipped_bit_or_cut_of_a_document_is_found(kind: str) -> None:
    data, decode, expected = _documents()[kind]
    decode(data)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(expected):
            decode(bytes(damaged))
    for end in range(len(data)):
        with pytest.raises(expected):
            decode(data[:end])
    with pytest.raises(expected):
        decode(data + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"required": ["something new"]},
        {"required": ["encryption"], **ENCRYPTION, "cipher": "rot13"},
        {"required": ["encryption"], **ENCRYPTION, "object_cipher": "rot13"},
        {"required": ["encryption"], **ENCRYPTION, "identity": "md5"},
        {"compression": "zstd"},
        {"hash": "sha256"},
        {"format": "something else"},
    ],
)
def test_a_store_of_another_format_is_refused(change: dict[str, object]) -> None:
    body = {"store_id": "d" * 32, "chunk_size": CHUNK, "compression": "lz4-block", "hash": "blake3-256", **change}
    objects = FakeObjects()
    objects.put("vmfs-store.json", documents.encode("vmfs-stub store", 1, body))
    with pytest.raises(UnknownFormat, match=r"vmfs-store\.json"):
        Store.open(objects)


@pytest.mark.parametrize("chunk_size", [0, 1, 4096, 100_000, 2 * 1024 * 1024, -65536])
def test_a_chunk_size_that_no_store_has_is_refused(chunk_size: int) -> None:
    with pytest.raises(ConfigError):
        Store.create(FakeObjects(), chunk_size=chunk_size)
    body = {"store_id": "d" * 32, "chunk_size": chunk_size, "compression": "lz4-block", "hash": "blake3-256"}
    with pytest.raises(CorruptStoreObject):
        decode_description(documents.encode("vmfs-stub store", 1, body))


def test_a_pin_under_another_name_is_refused() -> None:
    pin = Pin(PlaceholderId("c" * 32), "host", "images", 1.5)
    data = encode_pin(pin, VmId("a" * 32), PointId("b" * 32))
    with pytest.raises(CorruptStoreObject, match="belongs to"):
        decode_pin(data, f"pins/{'a' * 32}/{'e' * 32}/{'c' * 32}")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_store_with_any_one_object_damaged_gives_right_bytes_or_a_typed_error(data: st.DataObject) -> None:
    """Flip one bit, cut, empty or remove any object of a store: reading all of it never gives wrong bytes."""
    seeded = random.Random(data.draw(st.integers(0, 2**32)))
    objects = FakeObjects()
    content = seeded.randbytes(2 * CHUNK) + bytes(CHUNK) + b"text " * 20_000
    made = back_up(Store.create(objects), {"disk": content})
    key = data.draw(st.sampled_from(sorted(objects.contents)))
    whole = objects.contents[key]
    damage = data.draw(st.sampled_from(["flip", "cut", "empty", "remove"]))
    if damage == "flip":
        flipped = bytearray(whole)
        bit = seeded.randrange(len(whole) * 8)
        flipped[bit // 8] ^= 1 << bit % 8
        objects.contents[key] = bytes(flipped)
    elif damage == "remove":
        del objects.contents[key]
    else:
        objects.contents[key] = whole[: seeded.randrange(len(whole))] if damage == "cut" else b""
    expected: dict[str, tuple[type[VmfsStubError], ...]] = {
        "packs": (CorruptFrame, CorruptPack, ObjectMissing),
        "segments": (CorruptSegment, ObjectMissing),
        "manifests": (CorruptManifest, PointNotFound),
        "vmfs-store.json": (CorruptStoreObject, ObjectMissing),
        "index": (),
    }
    try:
        store = Store.open(objects)
        table = store.open_point(made.vm_id, made.point_id).chunks(0)
        found = b""
        for ref, index in zip(table.locate(0, table.chunk_count), range(table.chunk_count), strict=True):
            found += bytes(min(CHUNK, table.size - index * CHUNK)) if ref is None else store.fetch([ref])[0]
    except expected[key.split("/")[0]]:
        return
    assert found == content


def test_kinds_are_told_apart() -> None:
    files = (stored_file("d", 0, kind=FileKind.DIRECTORY), stored_file("l", 0, kind=FileKind.SYMLINK, target="/x"))
    made = Manifest(VmId("a" * 32), PointId("b" * 32), "x", 1.0, "h", CHUNK, files)
    assert decode_manifest(encode_manifest(made), "manifests/x") == made
