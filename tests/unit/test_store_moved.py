"""Frames that were moved are found, whatever became of their pack, and only what is expected is ever returned."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import back_up, new_id, stored_file

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptFrame, CorruptStoreObject, ObjectMissing, StoreConflict, StoreUnavailable
from vmfs_stub.core.ids import PackId, PointId
from vmfs_stub.services.restore import restore_point
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.services.scrub_report import ScrubReport
from vmfs_stub.services.verify import verify
from vmfs_stub.store.backup_writer import EncodedBatch
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.collector import Collected, Collector
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.format import FRAME_HEADER
from vmfs_stub.store.keys import moved_key, pack_key
from vmfs_stub.store.moved import HOPS_MAX, KNOWN_S, Move, MovedFrames, decode_moved, encode_moved
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
FRAME = CHUNK + FRAME_HEADER.size
RANDOM = random.Random(33)
DISK = RANDOM.randbytes(4 * CHUNK + 9)


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects, chunk_size=CHUNK)


def packs(objects: FakeObjects) -> list[PackId]:
    return sorted(PackId(key.rpartition("/")[2]) for key in objects.contents if key.startswith("packs/"))


def keys(objects: FakeObjects, prefix: str) -> list[str]:
    return sorted(key for key in objects.contents if key.startswith(prefix))


def scrubbed(store: Store) -> ScrubReport:
    with closing(ScrubProgress(None, store.id)) as progress:
        return scrub(Store.open(store.objects), progress)


def collected(store: Store) -> Collected:
    with closing(Reachability(None, store.id, store.objects, workers=1)) as reachability:
        return Collector(store.objects, reachability, lag_s=0, sleep=lambda seconds: None, workers=1).run()


def damaged_with_copy(store: Store, objects: FakeObjects, spoil: Callable[[bytes], bytes | None]) -> PackId:
    """One pack is damaged, and a backup after that was found has stored all of it again."""
    back_up(store, {"disk.raw": DISK}, vm_name="old")
    (damaged,) = packs(objects)
    spoilt = spoil(objects.contents.pop(pack_key(damaged)))
    if spoilt is not None:
        objects.contents[pack_key(damaged)] = spoilt
    assert not scrubbed(store).is_whole or spoilt is not None
    back_up(store, {"disk.raw": DISK}, vm_name="new")
    return damaged


DAMAGES = pytest.mark.parametrize(
    ("spoil", "count"),
    [
        (lambda pack: pack[:100] + bytes([pack[100] ^ 1]) + pack[101:], 1),
        (lambda pack: pack[: len(pack) // 2], 5),
        (lambda pack: b"", 5),
        (lambda pack: None, 5),
    ],
    ids=["bit", "truncated", "emptied", "missing"],
)


@DAMAGES
def test_what_is_stored_elsewhere_is_repaired(
    store: Store, objects: FakeObjects, tmp_path: Path, spoil: Callable[[bytes], bytes | None], count: int
) -> None:
    damaged = damaged_with_copy(store, objects, spoil)
    names = {vm.name: (vm.vm_id, vm.points[0].point_id) for vm in store.vms()}
    before = dict(objects.contents)
    report = scrubbed(store)
    assert report.is_whole
    (damage,) = report.damages
    assert (damage.key, damage.frame_count, damage.repaired_count) == (pack_key(damaged), count, count)
    assert {key: objects.contents[key] for key in before} == before, "nothing gets another content"
    assert keys(objects, "leases/") == []
    fresh = Store.open(objects)
    assert verify(fresh).findings == ()
    restore_point(fresh, fresh.open_point(*names["old"]), tmp_path / "out")
    assert (tmp_path / "out/disk.raw").read_bytes() == DISK
    moved = keys(objects, "moved/")
    assert moved
    assert scrubbed(store).is_whole
    assert keys(objects, "moved/") == moved, "what is repaired is not repaired again"


@DAMAGES
def test_what_was_moved_stays_as_long_as_it_is_needed(
    store: Store, objects: FakeObjects, spoil: Callable[[bytes], bytes | None], count: int
) -> None:
    """The other copy goes with its point, and the repaired one with the pack that it replaces."""
    damaged = damaged_with_copy(store, objects, spoil)
    assert scrubbed(store).is_whole
    old, new = sorted((vm for vm in store.vms()), key=lambda vm: vm.name != "old")
    store.forget(new.vm_id, new.points[0].point_id, host="host", why="by hand")
    assert collected(store).packs == 1
    fresh = Store.open(objects)
    assert verify(fresh).findings == ()
    assert verify(fresh).point_count == 1
    store.forget(old.vm_id, old.points[0].point_id, host="host", why="by hand")
    order: list[str] = []
    objects.before = lambda call, key: order.append(key.split("/")[0]) if call == "delete" else None
    collected(store)
    assert packs(objects) == []
    assert {key.split("/")[0] for key in objects.contents} == {"vmfs-store.json"}
    assert order.index("moved") > max(number for number, kind in enumerate(order) if kind == "packs")
    assert damaged not in packs(objects)


def test_a_pack_whose_footer_is_damaged_is_written_anew(store: Store, objects: FakeObjects) -> None:
    """Its frames are whole, so that it takes no other copy."""
    back_up(store, {"disk.raw": DISK})
    (damaged,) = packs(objects)
    content = objects.contents[pack_key(damaged)]
    objects.contents[pack_key(damaged)] = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    report = scrubbed(store)
    assert report.is_whole
    assert [(damage.frame_count, damage.repaired_count) for damage in report.damages] == [(5, 5)]
    objects.contents[pack_key(damaged)] = b""
    assert verify(Store.open(objects)).findings == ()


def test_a_copy_that_was_never_published_is_found_by_its_footer(store: Store, objects: FakeObjects) -> None:
    damaged_with_copy(store, objects, lambda pack: pack[:100] + bytes([pack[100] ^ 1]) + pack[101:])
    for key in keys(objects, "index/"):
        del objects.contents[key]
    assert scrubbed(store).is_whole


def test_a_copy_that_is_damaged_too_is_no_repair(store: Store, objects: FakeObjects) -> None:
    damaged = damaged_with_copy(store, objects, lambda pack: b"?" + pack[1:])
    (copy,) = set(packs(objects)) - {damaged}
    objects.contents[pack_key(copy)] = b"?" + objects.contents[pack_key(copy)][1:]
    report = scrubbed(store)
    assert not report.is_whole
    assert [damage.repaired_count for damage in report.damages] == [0, 0]
    assert keys(objects, "moved/") == []


def test_only_what_has_no_copy_stays_damaged(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK}, vm_name="old")
    (damaged,) = packs(objects)
    content = objects.contents[pack_key(damaged)]
    objects.contents[pack_key(damaged)] = bytes(2 * FRAME) + content[2 * FRAME :]
    scrubbed(store)
    back_up(store, {"disk.raw": DISK[:CHUNK]}, vm_name="new")
    (damage,) = scrubbed(store).damages
    assert (damage.frame_count, damage.repaired_count) == (2, 1)
    assert [(need.vm_name, need.chunk_count) for need in damage.needs] == [("old", 1)]
    assert [finding.chunk for finding in verify(Store.open(objects)).findings] == [1]
    back_up(store, {"disk.raw": DISK[CHUNK : 2 * CHUNK]}, vm_name="newer")
    assert scrubbed(store).is_whole
    assert len(keys(objects, "moved/")) == 2, "a later repair adds a document"
    assert verify(Store.open(objects)).findings == ()


def test_a_repair_that_is_damaged_in_turn_is_repaired_again(store: Store, objects: FakeObjects) -> None:
    damaged_with_copy(store, objects, lambda pack: b"?" + pack[1:])
    before = set(packs(objects))
    scrubbed(store)
    (new,) = set(packs(objects)) - before
    del objects.contents[pack_key(new)]
    assert len(verify(Store.open(objects)).findings) == 1
    assert scrubbed(store).is_whole
    assert verify(Store.open(objects)).findings == ()


def test_one_that_was_taken_for_dead_does_not_count_on_what_it_told(store: Store, objects: FakeObjects) -> None:
    damaged_with_copy(store, objects, lambda pack: b"?" + pack[1:])

    def take_for_dead(call: str, key: str) -> None:
        if call == "put" and key.startswith("moved/"):
            (lease,) = keys(objects, "leases/")
            objects.contents[lease.replace("leases/", "dead/")] = b""

    objects.before = take_for_dead
    assert not scrubbed(store).is_whole
    assert keys(objects, "leases/") == []
    objects.before = lambda call, key: None
    assert keys(objects, "moved/"), "a backup may count on it by now"
    assert scrubbed(store).is_whole


def moved_chain(store: Store, objects: FakeObjects, hops: int) -> FrameRef:
    """A frame that was moved so often."""
    back_up(store, {"disk.raw": DISK[:CHUNK]})
    (pack,) = packs(objects)
    (vm,) = store.vms()
    (ref,) = store.open_point(vm.vm_id, vm.points[0].point_id).chunks(0).locate(0, 1)
    assert ref is not None
    for _ in range(hops):
        new = PackId(new_id())
        objects.contents[pack_key(new)] = objects.contents.pop(pack_key(pack))
        move = Move(ref.offset, new, ref.offset, ref.length)
        objects.contents[moved_key(pack, str(new))] = encode_moved([move], pack, "")
        pack = new
    return ref


@pytest.mark.parametrize("hops", range(HOPS_MAX + 2))
def test_moves_are_followed_so_far_and_no_further(store: Store, objects: FakeObjects, hops: int) -> None:
    ref = moved_chain(store, objects, hops)
    if hops <= HOPS_MAX:
        assert store.fetch([ref]) == [DISK[:CHUNK]]
    else:
        with pytest.raises(ObjectMissing):
            store.fetch([ref])
    assert collected(store).packs == 0, "the collector counts all of them"


def test_documents_that_name_each_other_end(store: Store, objects: FakeObjects) -> None:
    ref = moved_chain(store, objects, 1)
    (new,) = packs(objects)
    objects.contents.pop(pack_key(new))
    back = Move(ref.offset, ref.pack_id, ref.offset, ref.length)
    objects.contents[moved_key(new, "1" * 32)] = encode_moved([back], new, "")
    with pytest.raises(ObjectMissing):
        store.fetch([ref])
    collected(store)


def test_a_document_cannot_make_anything_of_a_frame(store: Store, objects: FakeObjects) -> None:
    """What is found at the other place must be what the reference expects."""
    ref = moved_chain(store, objects, 0)
    back_up(store, {"disk.raw": DISK[CHUNK : 2 * CHUNK]})
    (other,) = set(packs(objects)) - {ref.pack_id}
    objects.contents[pack_key(ref.pack_id)] = b"?" + objects.contents[pack_key(ref.pack_id)][1:]
    objects.contents[moved_key(ref.pack_id, "1" * 32)] = encode_moved(
        [Move(ref.offset, other, 0, ref.length)], ref.pack_id, ""
    )
    with pytest.raises(CorruptFrame):
        store.fetch([ref])


def test_a_look_counts_for_a_while(store: Store, objects: FakeObjects) -> None:
    ref = moved_chain(store, objects, 1)
    document = keys(objects, "moved/")[0]
    content = objects.contents.pop(document)
    now, looks = 0.0, 0

    def count(call: str, key: str) -> None:
        nonlocal looks
        looks += call == "list"

    objects.before = count
    moved = MovedFrames(objects, store.fetch_in_place, clock=lambda: now)
    assert moved.fetch(ref) is None
    objects.contents[document] = content
    assert moved.fetch(ref) is None
    assert looks == 1
    now += KNOWN_S
    assert moved.fetch(ref) == DISK[:CHUNK]
    assert looks == 2


def test_a_store_that_does_not_answer_is_not_taken_for_one_without_documents(
    store: Store, objects: FakeObjects
) -> None:
    ref = moved_chain(store, objects, 1)

    def fail(call: str, key: str) -> None:
        if key.startswith("moved/"):
            raise StoreUnavailable(key)

    objects.before = fail
    with pytest.raises(StoreUnavailable):
        store.fetch([ref])


def test_a_document_that_cannot_be_read_stops_garbage_collection_while_it_is_needed(
    store: Store, objects: FakeObjects
) -> None:
    back_up(store, {"disk.raw": DISK})
    (needed,) = packs(objects)
    objects.contents[moved_key(PackId("e" * 32), "1" * 32)] = b"?"
    objects.contents[moved_key(needed, "1" * 32)] = b"?"
    objects.contents["packs/ab/" + "ab" * 16] = b"garbage"
    with pytest.raises(CorruptStoreObject):
        collected(store)
    assert len(packs(objects)) == 2
    del objects.contents[moved_key(needed, "1" * 32)]
    collected(store)
    assert packs(objects) == [needed]
    assert keys(objects, "moved/") == []


@pytest.mark.parametrize("is_missing", [False, True])
def test_what_was_repaired_can_be_taken_over(store: Store, objects: FakeObjects, is_missing: bool) -> None:
    """It is what a backup of a placeholder does with what is absent on primary."""
    damaged = damaged_with_copy(store, objects, lambda pack: None if is_missing else b"?" + pack[1:])
    old = next(vm for vm in store.vms() if vm.name == "old")

    def take_over() -> None:
        taking = Store.open(objects)
        refs = taking.open_point(old.vm_id, old.points[0].point_id).chunks(0).locate(0, 5)
        writer = taking.begin_backup(index=ChunkIndex(None, store.id))
        entries = writer.append(EncodedBatch(tuple(refs))).entries
        file = stored_file("disk.raw", len(DISK), writer.add_file(entries))
        point_id = PointId(new_id())
        writer.read_back([ref for ref in refs if ref is not None])
        writer.commit(vm_id=old.vm_id, point_id=point_id, vm_name="old", host="h", files=[file], metadata={})

    with pytest.raises((CorruptFrame, ObjectMissing)):
        take_over()
    assert scrubbed(store).is_whole
    take_over()
    assert (damaged in packs(objects)) != is_missing
    assert verify(Store.open(objects)).findings == ()
    for key in keys(objects, "moved/"):
        del objects.contents[key]
    with pytest.raises((CorruptFrame, ObjectMissing)):
        take_over()


def test_what_was_saved_of_a_missing_pack_and_is_condemned_is_not_taken_over(
    store: Store, objects: FakeObjects
) -> None:
    damaged_with_copy(store, objects, lambda pack: None)
    before = set(packs(objects))
    scrubbed(store)
    (saved,) = set(packs(objects)) - before
    old = next(vm for vm in store.vms() if vm.name == "old")
    refs = store.open_point(old.vm_id, old.points[0].point_id).chunks(0).locate(0, 5)
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    file = stored_file("disk.raw", len(DISK), writer.add_file(writer.append(EncodedBatch(tuple(refs))).entries))
    objects.contents["condemned/" + "c" * 32] = encode_condemned(Condemned(frozenset([saved])), "")
    with pytest.raises(StoreConflict):
        writer.commit(vm_id=old.vm_id, point_id=PointId(new_id()), vm_name="old", host="h", files=[file], metadata={})


def test_a_document_is_of_its_pack() -> None:
    pack_id = PackId("a" * 32)
    moves = [Move(0, PackId("b" * 32), 96, 100), Move(500, PackId("c" * 32), 0, 33)]
    data, key = encode_moved(moves, pack_id, "n"), moved_key(pack_id, "d" * 32)
    assert decode_moved(data, key) == moves
    with pytest.raises(CorruptStoreObject, match="another pack"):
        decode_moved(data, moved_key(PackId("b" * 32), "d" * 32))
    with pytest.raises(CorruptStoreObject, match="not an id"):
        decode_moved(encode_moved([Move(0, PackId("../../x"), 0, 1)], pack_id, ""), key)
    with pytest.raises(CorruptStoreObject, match="not an integer"):
        decode_moved(encode_moved([Move(0, pack_id, 0, 0)], pack_id, ""), key)
