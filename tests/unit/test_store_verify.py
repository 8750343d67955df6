"""Verify finds what would fail a restore, names it, and finds nothing in a whole store."""

from __future__ import annotations

import random

import pytest
from store_fakes import FakeObjects
from store_points import back_up, new_id
from xxhash import xxh3_128_digest

from vmfs_stub.core.errors import PointNotFound, StoreUnavailable
from vmfs_stub.core.ids import PointId
from vmfs_stub.services.verify import verify
from vmfs_stub.store.format import FRAME_HEADER, FRAME_MAGIC
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.store import Store

RANDOM = random.Random(11)
CHUNK = 64 * 1024
DISK = RANDOM.randbytes(5 * CHUNK + 17)


@pytest.fixture
def store(objects: FakeObjects, source: KeySource | None) -> Store:
    return Store.create(objects, source=source)


def _only(objects: FakeObjects, prefix: str) -> str:
    (key,) = [key for key in objects.contents if key.startswith(prefix)]
    return key


def _flip(objects: FakeObjects, key: str, at: int) -> None:
    data = bytearray(objects.contents[key])
    data[at] ^= 1
    objects.contents[key] = bytes(data)


def test_a_whole_store_has_no_findings(store: Store) -> None:
    first = back_up(store, {"disk.raw": DISK + bytes(CHUNK), "empty": b""})
    back_up(store, {"disk.raw": DISK}, vm_id=first.vm_id)
    back_up(store, {"other.raw": DISK[CHUNK:]}, vm_name="db")
    done: list[int] = []
    report = verify(store, progress=done.append)
    assert report.findings == ()
    assert (report.point_count, report.file_count) == (3, 4)
    assert sum(done) == sum(vm.points[0].size_bytes * len(vm.points) for vm in store.vms()) - CHUNK
    assert verify(store, vm_id=first.vm_id, point_id=first.point_id).point_count == 1
    assert verify(store, vm_id=first.vm_id).point_count == 2


def test_a_bad_chunk_is_named_in_every_point_that_uses_it(
    objects: FakeObjects, store: Store, source: KeySource | None
) -> None:
    first = back_up(store, {"disk.raw": DISK})
    second = back_up(store, {"disk.raw": DISK}, vm_id=first.vm_id)
    _flip(objects, _only(objects, "packs/"), 2 * (CHUNK + FRAME_HEADER.size) + 100)
    findings = verify(store).findings
    assert [(f.vm_name, f.path, f.chunk) for f in findings] == [("web1", "disk.raw", 2)] * 2
    assert {f.point_id for f in findings} == {first.point_id, second.point_id}
    assert ("damaged content" if source is None else "cannot be decrypted") in findings[0].problem


def test_a_frame_that_is_whole_but_another_chunk_is_found(objects: FakeObjects) -> None:
    """A made-up frame that passes its checksum does not pass its identity."""
    store = Store.create(objects)
    made = back_up(store, {"disk.raw": DISK})
    point = store.open_point(made.vm_id, made.point_id)
    ref = point.chunks(0).locate(1, 2)[0]
    assert ref is not None
    other = RANDOM.randbytes(CHUNK)
    forged = FRAME_HEADER.pack(FRAME_MAGIC, 0, CHUNK, CHUNK, xxh3_128_digest(other)) + other
    pack = _only(objects, "packs/")
    data = bytearray(objects.contents[pack])
    data[ref.offset : ref.end] = forged
    objects.contents[pack] = bytes(data)
    segment = _only(objects, "segments/")
    table = objects.contents.pop(segment).replace(ref.checksum, xxh3_128_digest(other))
    _replace_segment(objects, store, made.point_id, segment, table)
    findings = verify(Store.open(objects)).findings
    assert [f.chunk for f in findings] == [1]
    assert "another chunk" in findings[0].problem


def _replace_segment(objects: FakeObjects, store: Store, point_id: PointId, segment: str, table: bytes) -> None:
    """A hostile writer's work: a segment and a manifest that agree with each other."""
    from dataclasses import replace

    from blake3 import blake3

    from vmfs_stub.core.ids import WriterId
    from vmfs_stub.store.keys import segment_id_of
    from vmfs_stub.store.manifest import encode_manifest

    new = segment_id_of(blake3(table).hexdigest(), WriterId("1" * 16))
    objects.contents[f"segments/{new[:2]}/{new}"] = table
    (vm,) = store.vms()
    manifest = store.open_point(vm.vm_id, point_id).manifest
    stored = replace(manifest.files[0], segments=(new,))
    key = f"manifests/{vm.vm_id}/{point_id}"
    objects.contents[key] = encode_manifest(replace(manifest, files=(stored,)))
    assert segment not in objects.contents


@pytest.mark.parametrize(("prefix", "path"), [("packs/", "disk.raw"), ("segments/", "disk.raw"), ("manifests/", "")])
def test_missing_truncated_and_emptied_objects_are_found(prefix: str, path: str, source: KeySource | None) -> None:
    for damage in ("missing", "truncated", "emptied"):
        objects = FakeObjects()
        made = back_up(Store.create(objects, source=source), {"disk.raw": DISK})
        key = _only(objects, prefix)
        whole = objects.contents.pop(key)
        if damage != "missing":
            objects.contents[key] = whole[: len(whole) // 2] if damage == "truncated" else b""
        store = Store.open(objects, source)
        if (prefix, damage) == ("manifests/", "missing"):
            with pytest.raises(PointNotFound):
                verify(store, vm_id=made.vm_id, point_id=made.point_id)
            continue
        findings = verify(store, vm_id=made.vm_id, point_id=made.point_id).findings
        assert findings, (prefix, damage)
        assert findings[0].path == path


def test_damage_behind_the_segment_cache_is_found(objects: FakeObjects, store: Store) -> None:
    made = back_up(store, {"disk.raw": DISK})
    store.open_point(made.vm_id, made.point_id).chunks(0).locate(0, 1)
    del objects.contents[_only(objects, "segments/")]
    assert verify(store).findings


def test_a_store_that_does_not_answer_is_not_a_finding(objects: FakeObjects, store: Store) -> None:
    back_up(store, {"disk.raw": DISK})

    def fail(call: str, key: str) -> None:
        if call == "get_range":
            raise StoreUnavailable(key)

    objects.before = fail
    with pytest.raises(StoreUnavailable):
        verify(store)


def test_an_unknown_point_is_said(store: Store) -> None:
    made = back_up(store, {"disk.raw": DISK})
    with pytest.raises(PointNotFound):
        verify(store, vm_id=made.vm_id, point_id=PointId(new_id()))
