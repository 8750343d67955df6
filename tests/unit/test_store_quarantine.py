"""Packs in quarantine: no backup refers to them any more, but for what primary has no copy of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing

import pytest
from store_fakes import FakeObjects
from store_points import back_up, finish, new_id, stored_file, write_chunks

from vmfs_stub.core.errors import CorruptStoreObject, StoreConflict
from vmfs_stub.core.ids import PackId, PointId, VmId
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.store.backup_writer import BackupWriter, EncodedBatch
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.collector import Collector
from vmfs_stub.store.keys import PACKS, quarantine_key
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.quarantine import (
    Quarantine,
    decode_quarantine,
    encode_quarantine,
    put_quarantine,
    quarantined_packs,
    read_quarantine,
)
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
RANDOM = random.Random(21)
DISK = RANDOM.randbytes(3 * CHUNK)


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects, chunk_size=CHUNK)


def packs(objects: FakeObjects) -> set[PackId]:
    return {PackId(key.rpartition("/")[2]) for key in objects.contents if key.startswith(PACKS)}


def mark(objects: FakeObjects, pack_ids: Sequence[PackId]) -> None:
    for pack_id in pack_ids:
        put_quarantine(objects, Quarantine(1.0, (), "damaged", new_id()), pack_id)


def commit(writer: BackupWriter, size: int, entries: Sequence[object]) -> Manifest:
    file = stored_file("disk.raw", size, writer.add_file(entries))  # type: ignore[arg-type]
    vm_id, point_id = VmId(new_id()), PointId(new_id())
    return writer.commit(vm_id=vm_id, point_id=point_id, vm_name="vm", host="h", files=[file], metadata={})


def test_what_scrub_finds_is_stored_afresh_by_the_next_backup(store: Store, objects: FakeObjects) -> None:
    index = ChunkIndex(None, store.id)
    back_up(store, {"disk.raw": DISK}, index=index)
    (damaged,) = packs(objects)
    key = f"packs/{damaged[:2]}/{damaged}"
    objects.contents[key] = b"?" + objects.contents[key][1:]
    with closing(ScrubProgress(None, store.id)) as progress:
        (found,) = scrub(store, progress).damages
    assert found.since_s is not None
    assert quarantined_packs(objects) == {damaged}
    first = read_quarantine(objects, damaged)
    assert first is not None
    assert first.offsets == (0,)
    for each in (index, ChunkIndex(None, store.id)):
        made = back_up(store, {"disk.raw": DISK}, index=each)
        (segment_id,) = made.files[0].segments
        assert segment_id is not None
        assert damaged not in store.segments.load(segment_id).packs
    with closing(ScrubProgress(None, store.id)) as progress:
        scrub(store, progress)
    assert read_quarantine(objects, damaged) == first, "the first mark stays"


def test_a_pack_that_is_listed_again_stays_forgotten(store: Store, objects: FakeObjects) -> None:
    """Garbage collection writes index objects anew."""
    index = ChunkIndex(None, store.id)
    back_up(store, {"disk.raw": DISK}, index=index)
    mark(objects, sorted(packs(objects)))
    (key,) = [key for key in objects.contents if key.startswith("index/")]
    ids = [ref.chunk_id for ref in index_refs(objects, key)]
    index.sync(objects)
    objects.contents["index/" + "9" * 32] = objects.contents[key]
    index.sync(objects)
    assert len(ids) == 3
    assert index.lookup(ids) == {}


def index_refs(objects: FakeObjects, key: str) -> list[object]:
    from vmfs_stub.store.index_objects import decode_index

    return [ref for _, refs in decode_index(objects.contents[key], key) for ref in refs]


def test_a_backup_that_uses_what_is_found_damaged_meanwhile_fails_once(store: Store, objects: FakeObjects) -> None:
    index = ChunkIndex(None, store.id)
    back_up(store, {"disk.raw": DISK}, index=index)
    (damaged,) = packs(objects)
    writer = store.begin_backup(index=index)
    entries = write_chunks(writer, DISK)
    finish(writer)
    mark(objects, [damaged])
    with pytest.raises(StoreConflict, match="1 packs and 0 segments"):
        commit(writer, len(DISK), entries)
    assert not any(key.endswith(".pending") for key in objects.contents)
    back_up(store, {"disk.raw": DISK}, index=index)
    assert len(packs(objects)) == 2


def test_what_has_no_other_copy_may_be_referred_to(store: Store, objects: FakeObjects) -> None:
    """A placeholder's absent chunks are taken over as they are, or it could be backed up no more."""
    back_up(store, {"disk.raw": DISK})
    (damaged,) = packs(objects)
    (vm,) = store.vms()
    refs = store.open_point(vm.vm_id, vm.points[0].point_id).chunks(0).locate(0, 3)
    mark(objects, [damaged])
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = writer.append(EncodedBatch(tuple(refs))).entries
    assert commit(writer, len(DISK), entries).files[0].segments


def test_a_mark_goes_after_its_pack(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})
    gone = back_up(store, {"disk.raw": DISK[::-1]})
    (segment_id,) = gone.files[0].segments
    assert segment_id is not None
    (damaged,) = store.segments.load(segment_id).packs
    mark(objects, sorted(packs(objects)))
    store.forget(gone.vm_id, gone.point_id, host="host", why="by hand")
    late: list[bool] = []

    def look(call: str, key: str) -> None:
        if (call, key) == ("delete", quarantine_key(damaged)):
            late.append(damaged not in packs(objects))

    objects.before = look
    with closing(Reachability(None, store.id, objects, workers=1)) as reachability:
        Collector(objects, reachability, lag_s=0, sleep=lambda seconds: None, workers=1).run()
    assert late == [True]
    assert quarantined_packs(objects) == packs(objects)
    assert len(packs(objects)) == 1


def test_a_mark_is_a_document_of_its_place(objects: FakeObjects) -> None:
    pack_id, found = PackId("a" * 32), Quarantine(12.5, (0, 96), "damaged \udcff", "n")
    data, key = encode_quarantine(found, pack_id), quarantine_key(pack_id)
    assert decode_quarantine(data, key) == found
    with pytest.raises(CorruptStoreObject, match="another mark"):
        decode_quarantine(data, quarantine_key(PackId("b" * 32)))
    with pytest.raises(CorruptStoreObject, match="not an integer"):
        decode_quarantine(encode_quarantine(Quarantine(1.0, (-1,), ""), pack_id), key)
    objects.contents[key] = b"not one"
    objects.contents["quarantined/README"] = b""
    assert read_quarantine(objects, pack_id) is None
    assert quarantined_packs(objects) == {pack_id}, "it counts by its name"
