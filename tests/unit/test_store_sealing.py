"""An encrypted store: nothing of its content is readable, and nothing in it can be altered or exchanged unseen."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up, new_id

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    CorruptFrame,
    CorruptManifest,
    CorruptPack,
    CorruptSegment,
    CorruptStoreObject,
    IntegrityError,
    KeyMissing,
    UnknownFormat,
)
from vmfs_stub.core.ids import PackId, PlaceholderId, PointId, SegmentId, StoreId
from vmfs_stub.mover.messages import MoverSettings
from vmfs_stub.store import aes_sealing, frames
from vmfs_stub.store.aes_sealing import AesSealing
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.format import FRAME_HEADER, SEAL_GROWTH, StoreDescription
from vmfs_stub.store.keys import SEGMENTS, pack_key, segment_digest, segment_key, writer_of
from vmfs_stub.store.objects_url import StoreAt
from vmfs_stub.store.packs import read_footer
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.sealing import PLAIN, PLAIN_FRAMES, StoreKey
from vmfs_stub.store.segments import Segment
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
RANDOM = random.Random(11)
MARKER = b"the guest's secret, in plain words"
SECRET = StoreKey(RANDOM.randbytes(32))
SEALING = AesSealing(SECRET)
DESCRIPTION = StoreDescription(StoreId("d" * 32), CHUNK, is_encrypted=True)
JOB, PACK = "0123456789abcdef", PackId("f" * 16 + "0123456789abcdef")


def _frame(raw: bytes, by=SEALING, job: str = JOB) -> tuple[bytes, FrameRef]:  # type: ignore[no-untyped-def]
    seal = by.frame_seal(job)
    room = bytearray(FRAME_HEADER.size + len(raw) + seal.growth)
    encoded = frames.encode(memoryview(raw), by.chunk_id(raw), into=memoryview(room), seal=seal)
    ref = FrameRef(encoded.chunk_id, PACK, 0, len(encoded.frame), len(raw), encoded.checksum)
    return bytes(encoded.frame), ref


def _open(frame: bytes | bytearray, ref: FrameRef, by=SEALING, job: str = JOB) -> bytes:  # type: ignore[no-untyped-def]
    return frames.decode(memoryview(frame), ref, by.frame_seal(job))


@pytest.mark.parametrize("raw", [RANDOM.randbytes(300), MARKER * 10, RANDOM.randbytes(CHUNK), b"x"])
def test_a_frame_gives_its_chunk_back_and_shows_nothing(raw: bytes) -> None:
    frame, ref = _frame(raw)
    assert _open(frame, ref) == raw
    frames.check_identity(raw, ref, SEALING)
    assert raw[:16] not in frame or len(raw) < 16
    assert ref.checksum not in frame
    assert ref.chunk_id not in frame
    assert ref.chunk_id != PLAIN.chunk_id(raw)
    again, _ = _frame(raw)
    assert again != frame  # a nonce of its own
    plain, plain_ref = _frame(raw, PLAIN)
    assert raw[:16] in plain or len(plain) < len(raw)  # the same look finds it where it is
    assert ref.length == plain_ref.length + 16


@pytest.mark.parametrize("raw", [RANDOM.randbytes(100), MARKER * 10], ids=["raw", "lz4"])
def test_any_flipped_bit_of_a_frame_is_found(raw: bytes) -> None:
    frame, ref = _frame(raw)
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptFrame, match=ref.pack_id):
            _open(damaged, ref)


def test_a_frame_opens_as_its_own_chunk_only() -> None:
    raw, other = RANDOM.randbytes(500), RANDOM.randbytes(500)
    frame, ref = _frame(raw)
    _, other_ref = _frame(other)
    with pytest.raises(CorruptFrame, match="another chunk"):
        _open(frame, other_ref)
    with pytest.raises(CorruptFrame, match="another chunk"):
        _open(frame, ref._replace(chunk_id=other_ref.chunk_id))  # even where a checksum collides
    with pytest.raises(CorruptFrame, match="another chunk"):
        _open(frame, ref, job="0" * 16)
    with pytest.raises(CorruptFrame, match="another chunk"):
        _open(frame, ref, AesSealing(StoreKey(bytes(32))))
    assert _open(frame, ref._replace(pack_id=PackId("0" * 16 + JOB), offset=70)) == raw  # moved within its job


def test_plain_and_encrypted_frames_are_told_apart() -> None:
    raw = RANDOM.randbytes(500)
    frame, ref = _frame(raw)
    plain, plain_ref = _frame(raw, PLAIN)
    with pytest.raises(CorruptFrame, match="is encrypted, in a plain store"):
        frames.decode(memoryview(frame), ref, PLAIN_FRAMES)
    with pytest.raises(CorruptFrame, match="is not encrypted, in a store that is"):
        _open(plain, plain_ref)


def test_whole_objects_are_bound_to_their_names() -> None:
    sealed = SEALING.seal(MARKER, "pins/a")
    assert len(sealed) == len(MARKER) + SEAL_GROWTH
    assert MARKER not in sealed
    assert SEALING.open(sealed, "pins/a") == MARKER
    assert SEALING.seal(MARKER, "pins/a") == sealed  # what is put again after a lost answer is the same
    for key, error in (("pins/b", CorruptStoreObject), ("manifests/a", CorruptManifest), ("packs/aa/a", CorruptPack)):
        with pytest.raises(error, match=f"{key}: .*another one"):
            SEALING.open(sealed, key)
    for bit in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((IntegrityError, UnknownFormat)):
            SEALING.open(bytes(damaged), "pins/a")
    for end in range(len(sealed)):
        with pytest.raises(CorruptStoreObject):
            SEALING.open(sealed[:end], "pins/a")


def test_each_job_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aes_sealing.os, "urandom", lambda size: b"n" * size)
    same, again, other = (_frame(MARKER, job=job)[0] for job in (JOB, JOB, "0" * 16))
    assert same == again
    assert same[:32] == other[:32]
    assert same[32:] != other[32:]
    assert SEALING.chunk_id(MARKER) != AesSealing(StoreKey(bytes(32))).chunk_id(MARKER)


def test_a_key_is_never_shown() -> None:
    settings = MoverSettings(StoreAt("file:///x"), DESCRIPTION, SECRET, Path("x"), 1, 1, 1, 1)
    shown = (repr(SECRET), str(SECRET), f"{SECRET}", repr(SEALING), repr(KEY_SOURCE), repr(settings))
    for secret in (SECRET.secret, KEY_SOURCE.secret):
        for text in shown:
            assert secret.hex() not in text
            assert repr(secret)[2:12] not in text
    assert pickle.loads(pickle.dumps(settings)) == settings  # and yet it travels to the mover


def _made() -> tuple[FakeObjects, Store, PointId]:
    objects = FakeObjects()
    store = Store.create(objects, source=KEY_SOURCE)
    pin = Pin(PlaceholderId(new_id()), "host1", "images", 1.0)
    index = ChunkIndex(None, store.id)
    made = back_up(store, {"disk": MARKER * 9000}, vm_name="payroll-db", pins=[pin], index=index)
    back_up(store, {"disk": MARKER * 5000}, vm_id=made.vm_id, vm_name="payroll-db", index=index)
    return objects, store, made.point_id


def test_nothing_that_names_or_holds_content_lies_open() -> None:
    needles = (MARKER, b"payroll-db", b"host1", b"images", b"disk", b"domain")
    objects, store, _ = _made()
    for key, data in objects.contents.items():
        assert not [needle for needle in needles if needle in data], key
    assert store.key is not None
    assert all(store.key.secret not in data for data in objects.contents.values())
    plain = FakeObjects()
    back_up(Store.create(plain), {"disk": MARKER * 9000}, vm_name="payroll-db")
    everything = b"".join(plain.contents.values())
    assert [needle for needle in needles if needle in everything] == [
        needle for needle in needles if needle != b"images"
    ]


def _touch_all(objects: FakeObjects) -> list[type[Exception]]:
    """Read everything as the program does; the kinds of what it found to be wrong."""
    found: list[type[Exception]] = []
    store = Store.open(objects, KEY_SOURCE)
    index = ChunkIndex(None, store.id)
    if index.sync(store.objects).damaged:
        found.append(CorruptStoreObject)
    for vm in store.vms():
        for point in vm.points:
            try:
                opened = store.open_point(vm.vm_id, point.point_id)
                store.pins(vm.vm_id, point.point_id)
                table = opened.chunks(0)
                for ref in table.locate(0, table.chunk_count):
                    assert ref is not None
                    frames.check_identity(store.fetch([ref])[0], ref, store.sealing)
                    read_footer(objects, ref.pack_id, store.sealing)
            except IntegrityError as exc:
                found.append(type(exc))
    return found


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("manifests/", CorruptManifest),
        ("segments/", CorruptSegment),
        ("index/", CorruptStoreObject),
        ("pins/", CorruptStoreObject),
        ("packs/", CorruptFrame),
    ],
)
def test_every_kind_that_is_altered_or_exchanged_is_the_right_error(prefix: str, expected: type[Exception]) -> None:
    objects, _, _ = _made()
    assert _touch_all(objects) == []
    keys = sorted(key for key in objects.contents if key.startswith(prefix))
    whole = dict(objects.contents)
    for at in (5, 40, len(whole[keys[0]]) // 2):
        data = bytearray(whole[keys[0]])
        data[at] ^= 1
        objects.contents[keys[0]] = bytes(data)
        assert expected in _touch_all(objects), at
    if len(keys) > 1:
        objects.contents.update({keys[0]: whole[keys[1]], keys[1]: whole[keys[0]]})
        assert _touch_all(objects)


def test_a_footer_in_the_clear_is_refused_and_so_is_a_footer_of_another_pack() -> None:
    objects, store, _ = _made()
    pack = PackId(next(key for key in objects.contents if key.startswith("packs/")).rpartition("/")[2])
    assert read_footer(objects, pack, store.sealing)
    with pytest.raises(CorruptPack):
        read_footer(objects, pack)  # as if it were plain
    with pytest.raises(CorruptPack, match="cannot be decrypted"):
        read_footer(objects, pack, SEALING)
    assert writer_of(pack) == pack[16:]
    assert pack_key(pack) in objects.contents


def test_a_plain_segment_is_refused_in_an_encrypted_store() -> None:
    objects, store, _ = _made()
    key = next(key for key in objects.contents if key.startswith("segments/"))
    segment_id = SegmentId(key.rpartition("/")[2])
    assert Segment(objects.contents[key], segment_id, store.sealing).slot_count
    with pytest.raises((CorruptSegment, UnknownFormat)):
        Segment(objects.contents[key], segment_id)
    plain = FakeObjects()
    back_up(Store.create(plain), {"disk": MARKER * 9000})
    key = next(key for key in plain.contents if key.startswith("segments/"))
    segment_id = SegmentId(key.rpartition("/")[2])
    assert key == segment_key(segment_id)
    with pytest.raises(CorruptSegment, match="not encrypted"):
        Segment(plain.contents[key], segment_id, store.sealing)


def test_equal_tables_have_equal_names_when_encrypted_too() -> None:
    objects = FakeObjects()
    store = Store.create(objects, source=KEY_SOURCE)
    index = ChunkIndex(None, store.id)
    for _ in range(2):
        back_up(store, {"disk": MARKER * 9000}, index=index)
    digests = {
        segment_digest(SegmentId(key.rpartition("/")[2])) for key in objects.contents if key.startswith(SEGMENTS)
    }
    assert len(digests) == 1
    assert len([key for key in objects.contents if key.startswith("packs/")]) == 1


def test_a_store_is_not_opened_without_its_key() -> None:
    _, store, _ = _made()
    with pytest.raises(KeyMissing):
        Store(FakeObjects(), store.description)
