"""The chunk index is a cache: lost, damaged or stale, it costs time or room and never hands out a wrong place."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from store_fakes import FakeObjects
from store_points import back_up, new_id

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import NoSpace, PrimaryIOError
from vmfs_stub.core.ids import ChunkId, PackId, StoreId
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.index_objects import encode_index
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.store import Store

STORE = StoreId("d" * 32)
RANDOM = random.Random(9)


def _refs(pack_id: PackId, count: int, first: int = 0) -> list[FrameRef]:
    found = []
    for number in range(first, first + count):
        digest = blake3(b"%d" % number).digest()
        found.append(FrameRef(ChunkId(digest), pack_id, (number - first) * 100, 100, 65536, digest[:16]))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[ChunkIndex]:
    made = ChunkIndex(path, STORE)
    yield made
    made.close()


def _publish(objects: FakeObjects, refs: list[FrameRef]) -> str:
    key = f"index/{new_id()}"
    objects.put(key, encode_index([(refs[0].pack_id, refs)]))
    return key


def test_what_was_added_is_found(index: ChunkIndex) -> None:
    refs = _refs(PackId(new_id()), 1200)
    index.add(refs[0].pack_id, refs)
    assert index.lookup([ref.chunk_id for ref in refs]) == {ref.chunk_id: ref for ref in refs}
    assert index.lookup([ChunkId(bytes(32))]) == {}
    assert index.lookup([]) == {}


def test_forgotten_packs_are_not_handed_out_and_may_be_replaced(index: ChunkIndex) -> None:
    refs, others = _refs(PackId(new_id()), 10), _refs(PackId(new_id()), 10)
    index.add(refs[0].pack_id, refs)
    index.add(others[0].pack_id, others)
    ids = [ref.chunk_id for ref in refs]
    assert set(index.lookup(ids).values()) == set(refs)
    index.forget_packs([refs[0].pack_id])
    assert index.lookup(ids) == {}
    newer = _refs(PackId(new_id()), 10)
    index.add(newer[0].pack_id, newer)
    assert set(index.lookup(ids).values()) == set(newer)


def test_sync_reads_only_what_is_new(index: ChunkIndex) -> None:
    objects = FakeObjects()
    first = _refs(PackId(new_id()), 5)
    key = _publish(objects, first)
    assert index.sync(objects).added == 1
    second = _refs(PackId(new_id()), 5, first=5)
    _publish(objects, second)
    objects.calls.clear()
    assert index.sync(objects).added == 1
    assert len(objects.calls) == 1
    assert len(index.lookup([ref.chunk_id for ref in first + second])) == 10
    objects.delete(key)
    assert index.sync(objects).removed == 1
    assert set(index.lookup([ref.chunk_id for ref in first + second]).values()) == set(second)


def test_packs_of_a_job_that_was_cut_short_are_used_by_the_next_where_they_are_there_still(path: Path) -> None:
    objects = FakeObjects()
    published, kept, lost = (_refs(PackId(new_id()), 5, first=first) for first in (0, 5, 10))
    index = ChunkIndex(path, STORE)
    index.sync(objects)
    for refs in (published, kept, lost):
        objects.contents[pack_key(refs[0].pack_id)] = b"a pack"
        index.add(refs[0].pack_id, refs)
    _publish(objects, published)
    index.sync(objects)
    index.close()
    del objects.contents[pack_key(lost[0].pack_id)]
    for is_first in (True, False):
        again = ChunkIndex(path, STORE)
        objects.calls.clear()
        again.sync(objects)
        assert len([key for call, key in objects.calls if call == "size"]) == (2 if is_first else 1)
        again.sync(objects)
        found = again.lookup([ref.chunk_id for ref in published + kept + lost])
        assert set(found.values()) == {*published, *kept}
        again.close()


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "junk", "another store", "no tables", "newer"])
def test_a_lost_or_damaged_file_is_rebuilt(path: Path, damage: str) -> None:
    objects = FakeObjects()
    refs = _refs(PackId(new_id()), 500)
    _publish(objects, refs)
    index = ChunkIndex(path, STORE)
    index.sync(objects)
    index.close()
    whole = path.read_bytes()
    store_id = STORE
    if damage == "deleted":
        path.unlink()
    elif damage == "another store":
        store_id = StoreId("e" * 32)
    elif damage == "newer":
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version = 99")
        database.close()
    elif damage == "no tables":
        path.unlink()
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE x (y)")
        database.execute("PRAGMA user_version = 1")
        database.close()
    else:
        path.write_bytes({"emptied": b"", "cut": whole[: len(whole) // 2], "junk": b"junk" * 5000}[damage])
    again = ChunkIndex(path, store_id)
    again.lookup([ref.chunk_id for ref in refs])  # damage deep in the file shows here
    again.sync(objects)
    assert again.lookup([ref.chunk_id for ref in refs]) == {ref.chunk_id: ref for ref in refs}
    again.close()


def test_a_file_whose_error_is_no_text_is_rebuilt(path: Path) -> None:
    """SQLite's message quotes what is damaged."""
    ChunkIndex(path, STORE).close()
    content = bytearray(path.read_bytes())
    at = content.index(b"CREATE TABLE store")
    content[at : at + 18] = b"CREATE T\xff\xffLE store"
    path.write_bytes(content)
    index = ChunkIndex(path, STORE)
    refs = _refs(PackId(new_id()), 3)
    index.add(refs[0].pack_id, refs)
    assert index.lookup([refs[0].chunk_id]) == {refs[0].chunk_id: refs[0]}
    index.close()


def test_a_pack_is_forgotten_also_where_the_table_s_own_index_is_damaged(path: Path) -> None:
    index = ChunkIndex(path, STORE)
    refs = _refs(PackId(new_id()), 3)
    _publish(objects := FakeObjects(), refs)
    index.sync(objects)
    index.close()
    pack_id = refs[0].pack_id.encode()
    content = path.read_bytes()
    places = [at for at in range(len(content)) if content.startswith(pack_id, at)]
    outcomes = set()
    for at in places:  # in the table, and in its index
        path.write_bytes(content[:at] + b"0" * 32 + content[at + 32 :])
        index = ChunkIndex(path, STORE)
        index.forget_packs([refs[0].pack_id])
        found = index.lookup([ref.chunk_id for ref in refs])
        outcomes.add(len(found))
        index.close()
    assert len(places) >= 2
    assert outcomes == {0}


def test_a_flipped_bit_anywhere_never_gives_a_wrong_place(path: Path) -> None:
    objects = FakeObjects()
    refs = _refs(PackId(new_id()), 300)
    _publish(objects, refs)
    index = ChunkIndex(path, STORE)
    index.sync(objects)
    index.close()
    whole = path.read_bytes()
    expected = {ref.chunk_id: ref for ref in refs}
    changed = 0
    for _ in range(150):
        flipped = bytearray(whole)
        bit = RANDOM.randrange(len(whole) * 8)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        damaged = ChunkIndex(path, STORE)
        for ref in damaged.lookup([ref.chunk_id for ref in refs]).values():
            assert ref == expected[ref.chunk_id]
        damaged.sync(objects)
        found = damaged.lookup([ref.chunk_id for ref in refs])
        assert found.items() <= expected.items()
        changed += found != expected
        damaged.close()
        for name in ("index.sqlite-wal", "index.sqlite-shm"):
            path.with_name(name).unlink(missing_ok=True)
    assert changed < 150


def test_damaged_index_objects_are_skipped_and_said(index: ChunkIndex) -> None:
    objects = FakeObjects()
    refs = _refs(PackId(new_id()), 5)
    _publish(objects, refs)
    bad = _publish(objects, _refs(PackId(new_id()), 5, first=5))
    objects.contents[bad] = objects.contents[bad][:-1]
    report = index.sync(objects)
    assert report.damaged == (bad,)
    assert index.lookup([ref.chunk_id for ref in refs])


def test_a_wrong_index_object_does_not_make_a_wrong_backup() -> None:
    """Another host's index may lie about what a chunk must decode to; the next backup stores the chunk afresh."""
    objects = FakeObjects()
    store = Store.create(objects)
    content = RANDOM.randbytes(65536)
    lie = FrameRef(ChunkId(blake3(content).digest()), PackId(new_id()), 0, 100, 65536, bytes(16))
    _publish(objects, [lie])
    made = back_up(store, {"disk": content})
    ref = store.open_point(made.vm_id, made.point_id).chunks(0).locate(0, 1)[0]
    assert ref is not None
    assert store.fetch([ref]) == [content]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(PrimaryIOError, match="chunk index"):
        ChunkIndex(tmp_path / "missing" / "index.sqlite", STORE)


def test_without_room_less_is_deduplicated_and_nothing_fails(tmp_path: Path) -> None:
    lost: list[Exception] = []
    path = tmp_path / "away" / "index.sqlite"
    objects = FakeObjects()
    published, later = PackId("1" * 32), PackId("2" * 32)
    refs = _refs(published, 3)
    objects.put("index/" + new_id(), encode_index([(published, refs)]))
    regained: list[int] = []
    index = ChunkIndex(path, STORE, on_lost=lost.append, on_regained=lambda: regained.append(1))
    assert [type(error) for error in lost] == [PrimaryIOError]
    assert index.sync(objects).added == 0
    added = _refs(later, 2, first=10)
    index.add(later, added)
    assert set(index.lookup([ref.chunk_id for ref in added])) == {ref.chunk_id for ref in added}
    assert index.lookup([ref.chunk_id for ref in refs]) == {}
    assert regained == []
    path.parent.mkdir()
    assert index.sync(objects).added == 1
    assert regained == [1]
    assert set(index.lookup([ref.chunk_id for ref in refs])) == {ref.chunk_id for ref in refs}
    assert len(lost) == 1
    index.close()


def test_room_that_ends_later_is_no_failure_either(tmp_path: Path) -> None:
    lost: list[Exception] = []
    index = ChunkIndex(tmp_path / "index.sqlite", STORE, on_lost=lost.append)
    pages = index._opened().execute("PRAGMA page_count").fetchone()[0]
    index._opened().execute(f"PRAGMA max_page_count = {pages}")
    pack = PackId("1" * 32)
    for first in range(0, 4000, 1000):
        index.add(pack, _refs(pack, 1000, first=first))
        index.forget_packs([pack])
    assert [type(error) for error in lost] == [NoSpace]
    index.close()


def test_memory_use_does_not_grow_with_the_store(index: ChunkIndex) -> None:
    database = index._opened()
    assert database.execute("PRAGMA cache_size").fetchone()[0] < 0
    assert database.execute("PRAGMA user_version").fetchone()[0] == 1


def test_what_comes_after_the_close_is_refused(tmp_path: Path) -> None:
    """A thread that was abandoned while the store hung, when another daemon may have the file already."""
    path = tmp_path / "index.sqlite"
    index = ChunkIndex(path, STORE, on_lost=lambda error: None)
    index.close()
    path.unlink()
    with pytest.raises(PrimaryIOError, match="is closed"):
        index.add(PackId("1" * 32), _refs(PackId("1" * 32), 1))
    with pytest.raises(PrimaryIOError, match="is closed"):
        index.sync(FakeObjects())
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_that_read_the_same_index_object_at_once(path: Path) -> None:
    """The second found it entered already, and the whole file was given up for one in memory."""
    lost: list[Exception] = []
    index = ChunkIndex(path, STORE, on_lost=lost.append)
    objects = FakeObjects()
    refs = _refs(PackId(new_id()), 3)
    key = _publish(objects, refs)

    def other_job(call: str, got: str) -> None:
        if (call, got) == ("get", key):
            objects.before = lambda call, key: None
            assert index.sync(objects).added == 1

    objects.before = other_job
    index.sync(objects)
    assert lost == []
    assert index.lookup([ref.chunk_id for ref in refs]) == {ref.chunk_id: ref for ref in refs}
    index.close()
