"""Garbage collection by itself; beside others it is tried in tests/collection."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_fakes import FakeObjects, refused_deletes
from store_points import KEY_SOURCE, back_up, finish, write_chunks

from vmfs_stub.core.errors import (
    ClaimedElsewhere,
    CorruptSegment,
    PrimaryIOError,
    StoreConflict,
    StoreDenied,
    StoreUnavailable,
)
from vmfs_stub.core.ids import DatastoreId, PackId, PlaceholderId, PointId, SegmentId, VmId
from vmfs_stub.store import backup_writer
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.claims import Claim, ClaimState, put_claim
from vmfs_stub.store.collector import Collected, Collector
from vmfs_stub.store.committing import Committing
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.condemning import Condemning
from vmfs_stub.store.format import SEAL_GROWTH
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keys import INDEX, MANIFESTS, PENDING_SUFFIX, pin_key
from vmfs_stub.store.manifest import VOID_SIZE_MAX, Manifest, encode_void
from vmfs_stub.store.objects import Buffer, ObjectInfo
from vmfs_stub.store.pins import Pin, encode_pin
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.retrying import RetryingObjects
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
RANDOM = random.Random(8)


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects, chunk_size=CHUNK)


def names(objects: FakeObjects, prefix: str) -> list[str]:
    return [key.rpartition("/")[2] for key in objects.contents if key.startswith(prefix)]


def keys(objects: FakeObjects, prefix: str) -> list[str]:
    return [key for key in objects.contents if key.startswith(prefix)]


def collect(
    store: Store, path: Path | None = None, *, sleep: Callable[[float], None] = lambda seconds: None
) -> Collected:
    with closing(Reachability(path, store.id, store.objects, sealing=store.sealing, workers=2)) as reachability:
        return Collector(store.objects, reachability, lag_s=1, sleep=sleep, workers=2).run()


def needed(store: Store, objects: FakeObjects, path: Path | None = None) -> tuple[int, int]:
    """Packs and segments that the manifests need, of those that are there."""
    with closing(Reachability(path, store.id, objects, workers=2)) as reachability:
        reachability.look(keys(objects, "manifests/"))
        packs = sum(reachability.has_pack(PackId(name)) for name in names(objects, "packs/"))
        return packs, sum(reachability.has_segment(SegmentId(name)) for name in names(objects, "segments/"))


def test_what_is_known_is_not_read_again(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    for _ in range(3):
        back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    assert needed(store, objects, tmp_path / "cache") == (3, 3)
    objects.calls.clear()
    assert needed(store, objects, tmp_path / "cache") == (3, 3)
    assert [key for call, key in objects.calls if call == "get"] == []


def test_what_is_known_is_believed_only_with_its_checksum(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    """Whatever is needed and not known to be would be deleted."""
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    path = tmp_path / "cache"
    assert needed(store, objects, path) == (1, 1)
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute("UPDATE objects SET named = x''").rowcount == 2
    assert needed(store, objects, path) == (1, 1)


@pytest.mark.parametrize("found", [b"not a database at all" * 300, b""])
def test_a_file_that_is_damaged_is_made_afresh(
    store: Store, objects: FakeObjects, tmp_path: Path, found: bytes
) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (tmp_path / "cache").write_bytes(found)
    assert needed(store, objects, tmp_path / "cache") == (1, 1)


def test_a_file_of_another_store_is_not_used(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    assert needed(store, objects, tmp_path / "cache") == (1, 1)
    other = Store.create(other_objects := FakeObjects(), chunk_size=CHUNK)
    other_objects.contents |= {key: data for key, data in objects.contents.items() if key != "vmfs-store.json"}
    other_objects.calls.clear()
    assert needed(other, other_objects, tmp_path / "cache") == (1, 1)
    assert [key for call, key in other_objects.calls if call == "get"] != []


def test_a_segment_that_cannot_be_read_stops_it(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (key,) = keys(objects, "segments/")
    objects.contents[key] = b"?"
    objects.contents["packs/ab/" + "a" * 32] = b"garbage"
    with pytest.raises(CorruptSegment):
        collect(store)
    assert "packs/ab/" + "a" * 32 in objects.contents
    assert keys(objects, "condemned/") == []


def test_a_host_that_may_not_delete_is_told_so_before_anything(store: Store, objects: FakeObjects) -> None:
    objects.contents["packs/aa/" + "a" * 32] = b"garbage"
    with refused_deletes(objects), pytest.raises(StoreDenied, match="may not delete"):
        collect(store)
    assert {key.split("/")[0] for key in objects.contents} == {"vmfs-store.json", "packs", "doctor-probe"}


def test_what_goes_is_on_a_list_when_it_goes(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    garbage = [f"packs/{digit * 2}/{digit * 32}" for digit in "abc"]
    objects.contents |= dict.fromkeys(garbage, b"12345")
    listed: list[int] = []

    def look(call: str, key: str) -> None:
        if call == "delete" and key in garbage:
            listed.append(len(keys(objects, "condemned/")))

    objects.before = look
    assert collect(store) == Collected(packs=3, bytes=15)
    assert listed == [1, 1, 1]
    assert keys(objects, "condemned/") == []
    assert needed(store, objects) == (1, 1)


def test_a_list_of_another_collector_stays_while_a_name_on_it_is_there(store: Store, objects: FakeObjects) -> None:
    """That one may be about to delete it, and a backup that began to need it would lose it."""
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (pack,) = names(objects, "packs/")
    other, gone, damaged, foreign = (f"condemned/{name}" for name in ("1" * 32, "2" * 32, "3" * 32, "README"))
    objects.contents[other] = encode_condemned(Condemned(frozenset([PackId(pack)])), "")
    objects.contents[gone] = encode_condemned(Condemned(frozenset([PackId("d" * 32)])), "")
    objects.contents |= {damaged: b"?", foreign: b"?"}
    collect(store)
    assert keys(objects, "condemned/") == [other, damaged, foreign]


def test_what_a_forgotten_point_has_pending_still_is_not_voided(store: Store, objects: FakeObjects) -> None:
    """The void one took the name of one that other collectors knew, and for them its packs were needed for ever."""
    made = back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (key,) = keys(objects, "manifests/")
    objects.contents[f"{key}.{'5' * 16}.pending"] = objects.contents[key]  # came late
    store.forget(made.vm_id, made.point_id, host="host", why="by hand")
    assert collect(store).points == 1
    assert {key.split("/")[0] for key in objects.contents} == {"vmfs-store.json"}


def test_what_was_pending_when_it_was_listed_and_is_committed_when_it_is_read_counts(
    store: Store, objects: FakeObjects
) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (key,) = keys(objects, "manifests/")
    (pack,) = names(objects, "packs/")
    with closing(Reachability(None, store.id, objects, workers=1)) as reachability:
        reachability.look([f"{key}.{'5' * 16}.pending"])
        assert reachability.has_pack(PackId(pack))


def in_wait(number: int, act: Callable[[], object]) -> Callable[[float], None]:
    """A sleep that does ``act`` in that wait, counted from 1."""
    waits = iter(range(1, 10))
    return lambda seconds: act() if next(waits) == number else None


def test_a_pin_that_comes_while_it_waits_keeps_a_forgotten_point(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    store.forget(made.vm_id, made.point_id, host="host", why="by hand")
    pin = Pin(PlaceholderId("7" * 32), "host", "vms", 0.0)
    key = pin_key(made.vm_id, made.point_id, pin.placeholder_id)
    put = partial(store.objects.put, key, encode_pin(pin, made.vm_id, made.point_id))
    found = collect(store, sleep=in_wait(1, put))
    assert (found.points, found.waiting_points) == (0, 1)
    assert needed(store, objects) == (1, 1)
    store.remove_pin(made.vm_id, made.point_id, pin.placeholder_id)
    assert collect(store).points == 1


def test_what_a_backup_needs_that_comes_while_it_waits_stays(store: Store, objects: FakeObjects) -> None:
    index = ChunkIndex(None, store.id)
    content = RANDOM.randbytes(CHUNK)
    made = back_up(store, {"disk": content}, index=index)
    store.forget(made.vm_id, made.point_id, host="host", why="by hand")
    conflicts = 0

    def again() -> None:
        nonlocal conflicts
        try:
            back_up(store, {"disk": content}, index=index)
        except StoreConflict:
            conflicts += 1

    # While it waits for the lists to be seen, they are; when it waits before, what it needs is not condemned.
    collect(store, sleep=in_wait(3, again))
    assert (conflicts, needed(store, objects)) == (1, (0, 0))
    back_up(store, {"disk": content}, index=index)
    collect(store, sleep=in_wait(1, again))
    assert (conflicts, needed(store, objects)) == (1, (1, 2))


def test_of_an_encrypted_store() -> None:
    store = Store.create(objects := FakeObjects(), chunk_size=CHUNK, source=KEY_SOURCE)
    kept = back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    gone = back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    store.forget(gone.vm_id, gone.point_id, host="host", why="by hand")
    dead = store.begin_backup(index=ChunkIndex(None, store.id))
    found = collect(store)
    assert (found.points, found.packs, found.segments, found.leases) == (1, 1, 1, 1)
    assert len(keys(objects, "packs/")) == 1
    table = store.open_point(kept.vm_id, kept.point_id).chunks(0)
    assert [ref is not None and len(store.fetch([ref])[0]) for ref in table.locate(0, 1)] == [CHUNK]
    assert keys(objects, "dead/") == [f"dead/{dead.writer_id}"]


class LaggingObjects(FakeObjects):
    """``unlisted`` were put so short a time ago that a listing misses them, though it shows what was deleted since."""

    def __init__(self) -> None:
        super().__init__()
        self.unlisted: set[str] = set()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if info.key not in self.unlisted)


def test_what_is_committed_while_it_looks_for_the_last_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pending manifest was deleted already, its committed one not listed yet, and its packs were deleted."""
    store = Store.create(objects := LaggingObjects(), chunk_size=CHUNK)
    index = ChunkIndex(None, store.id)
    content = RANDOM.randbytes(CHUNK)
    made = back_up(store, {"disk": content}, index=index)
    store.forget(made.vm_id, made.point_id, host="host", why="by hand")
    go_on, stands_still, condemn, put = (
        threading.Event(),
        threading.Event(),
        Condemning.condemn,
        Committing._put_manifest,
    )

    def slowly(committing: Committing, key: str, data: bytes) -> None:
        stands_still.set()
        assert go_on.wait(10)
        put(committing, key, data)
        objects.unlisted.add(key)

    def condemned_since(self: Condemning, names: Condemned, keys: Any) -> Any:
        backup.start()
        assert stands_still.wait(10)
        return condemn(self, names, keys)

    def sleep(seconds: float) -> None:
        if go_on.is_set():
            objects.unlisted.clear()  # so long after the last look
        elif stands_still.is_set():
            go_on.set()
            backup.join()

    monkeypatch.setattr(Committing, "_put_manifest", slowly)
    monkeypatch.setattr(Condemning, "condemn", condemned_since)
    backup = threading.Thread(target=lambda: back_up(store, {"disk": content}, vm_id="5" * 32, index=index))
    collect(store, sleep=sleep)
    (point,) = store.points(VmId("5" * 32))
    table = store.open_point(point.vm_id, point.point_id).chunks(0)
    assert [ref is not None and store.fetch([ref])[0] for ref in table.locate(0, 1)] == [content]


def test_what_is_not_ours_is_left_alone(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    foreign = [f"manifests/{made.vm_id}/{made.point_id}.bak", f"manifests/{made.vm_id}/notes", "manifests/README"]
    objects.contents |= dict.fromkeys(foreign, b"?")
    collect(store)
    assert [key for key in foreign if key in objects.contents] == foreign


def test_a_host_that_may_not_delete_leaves_no_mark_for_each_backup(store: Store, objects: FakeObjects) -> None:
    with refused_deletes(objects):
        back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    assert [len(keys(objects, kind)) for kind in ("leases/", "manifests/")] == [1, 2]
    found = collect(store)
    assert (found.leases, found.pending) == (1, 1)
    assert [len(keys(objects, kind)) for kind in ("leases/", "manifests/", "dead/")] == [0, 1, 0]


def test_index_objects_that_a_collector_which_died_has_left_are_cleared(store: Store, objects: FakeObjects) -> None:
    index = ChunkIndex(None, store.id)
    content = RANDOM.randbytes(CHUNK)
    gone, kept = back_up(store, {"disk": content}, index=index), back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    left = {key: objects.contents[key] for key in keys(objects, "index/")}
    (pack,) = set(names(objects, "packs/")) - _packs_needed(store, kept)
    store.forget(gone.vm_id, gone.point_id, host="host", why="by hand")
    collect(store)
    objects.contents |= left  # as if it had died after the packs
    assert len(keys(objects, "index/")) == 2
    collect(store)
    (key,) = keys(objects, "index/")
    assert bytes.fromhex(pack) not in objects.contents[key]
    back_up(store, {"disk": content}, index=ChunkIndex(None, store.id))
    index.close()


@pytest.mark.parametrize("is_forgotten", [True, False])
def test_a_manifest_that_a_late_try_puts_again_goes_again(
    store: Store, objects: FakeObjects, *, is_forgotten: bool
) -> None:
    """The answer was lost, and the host stood still; or nothing has happened but that what was pending is gone."""
    lost: list[str] = []

    def put(key: str, data: Buffer, *, if_absent: bool = True) -> None:
        plain_put(key, data, if_absent=if_absent)
        if key.startswith(MANIFESTS) and not key.endswith(PENDING_SUFFIX) and not lost:
            lost.append(key)
            raise StoreUnavailable("the answer was lost")

    def stand_still(seconds: float) -> None:
        _, vm_id, point_id = lost[0].split("/")
        if is_forgotten:
            store.forget(VmId(vm_id), PointId(point_id), host="other", why="by hand")
        collect(store)

    plain_put = objects.put
    objects.put = put  # type: ignore[method-assign]
    stopped = Store.open(RetryingObjects(objects, sleep=stand_still))
    with pytest.raises(StoreConflict) if is_forgotten else nullcontext():
        back_up(stopped, {"disk": RANDOM.randbytes(CHUNK)})
    assert len(lost) == 1
    collect(store)
    assert len(keys(objects, MANIFESTS)) == len(keys(objects, "packs/")) == (not is_forgotten)


def test_index_objects_do_not_multiply_when_collectors_run_at_the_same_time(store: Store, objects: FakeObjects) -> None:
    """Each of two that begin at the same hour each night would write again what the other one does."""
    made = [back_up(store, {"disk": RANDOM.randbytes(CHUNK)}) for _ in range(5)]
    packs = [each for key in keys(objects, INDEX) for each in decode_index(store.objects.get(key), key)]
    for key in keys(objects, INDEX):
        del objects.contents[key]
    store.objects.put(INDEX + "ab" * 16, encode_index(packs))  # as of a backup that has put many packs

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith(INDEX):
            objects.before = lambda call, key: None
            collect(store)
            objects.before = before

    for number, point in enumerate(made[:4]):
        store.forget(point.vm_id, point.point_id, host="host", why="by hand")
        objects.before = before
        collect(store)
        objects.before = lambda call, key: None
        (key,) = keys(objects, INDEX)
        assert len(decode_index(store.objects.get(key), key)) == 4 - number


def _packs_needed(store: Store, made: Manifest) -> set[str]:
    table = store.open_point(made.vm_id, made.point_id).chunks(0)
    return {ref.pack_id for ref in table.locate(0, table.chunk_count) if ref is not None}


def test_what_living_writers_have_listed_stays_listed(store: Store, objects: FakeObjects) -> None:
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    write_chunks(writer, RANDOM.randbytes(CHUNK))
    finish(writer)
    writer._publish_index()
    before = {key: objects.contents[key] for key in keys(objects, "index/")}
    collect(store, sleep=lambda seconds: writer.renew_lease())
    assert {key: objects.contents[key] for key in keys(objects, "index/")} == before != {}


def test_index_objects_are_read_once(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    collect(store, tmp_path / "cache")
    objects.calls.clear()
    collect(store, tmp_path / "cache")
    assert [key for call, key in objects.calls if call == "get" and not key.startswith("doctor-probe/")] == []


def test_a_writer_that_was_taken_for_dead_lists_nothing(
    store: Store, objects: FakeObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_writer, "INDEX_OBJECT_ENTRIES", 1)
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    objects.put(f"dead/{writer.writer_id}", b"")
    write_chunks(writer, RANDOM.randbytes(CHUNK))
    with pytest.raises(StoreConflict, match="taken for dead"):
        finish(writer)
    assert keys(objects, "index/") == []


def test_a_file_that_fails_in_use_is_done_without_and_made_afresh(
    store: Store, objects: FakeObjects, tmp_path: Path
) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    (pack,), path = names(objects, "packs/"), tmp_path / "cache"
    with closing(Reachability(path, store.id, objects, workers=1)) as reachability:
        reachability._database.execute("DROP TABLE objects")
        reachability.look(keys(objects, "manifests/"))
        assert reachability.has_pack(PackId(pack))
        assert not path.exists()
        collector = Collector(objects, reachability, lag_s=1, sleep=lambda seconds: None, workers=1)
        assert collector.run().packs == 0
    assert needed(store, objects, path) == (1, 1)
    assert path.exists()


def test_what_cannot_be_asked_any_more_is_an_error_of_the_file(
    store: Store, objects: FakeObjects, tmp_path: Path
) -> None:
    with closing(Reachability(tmp_path / "cache", store.id, objects, workers=1)) as reachability:
        reachability.look([])
        reachability._database.execute("DROP TABLE temp.packs")
        reachability._database.execute("DROP TABLE objects")
        with pytest.raises(PrimaryIOError, match="made afresh"):
            reachability.has_pack(PackId("a" * 32))
        with pytest.raises(PrimaryIOError, match="made afresh"):
            reachability.forget_all_but([])
        with pytest.raises(PrimaryIOError, match="made afresh"):
            list(reachability.packs_of_index(["index/a"]))


def test_two_collectors_of_a_host_do_not_share_the_file(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)})
    path = tmp_path / "cache"
    with closing(Reachability(path, store.id, objects, workers=1)) as first:
        first.look(keys(objects, "manifests/"))
        inode = path.stat().st_ino
        assert needed(store, objects, path) == (1, 1)
        assert path.stat().st_ino == inode, "what another one uses is not made afresh"
        first.look(keys(objects, "manifests/"))
        assert first.has_pack(PackId(names(objects, "packs/")[0]))
    objects.calls.clear()
    assert needed(store, objects, path) == (1, 1)
    assert [key for call, key in objects.calls if call == "get"] == []


def test_void_manifests_are_no_points_and_are_read_once(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk": b"x"})
    void = f"manifests/{made.vm_id}/{'7' * 32}"
    objects.put(void, encode_void("8" * 32))
    assert len(objects.contents[void]) <= VOID_SIZE_MAX - SEAL_GROWTH
    for _ in range(2):
        assert store.point_counts() == {made.vm_id: 1}
        assert [len(vm.points) for vm in store.vms()] == [1]
        assert len(store.points(made.vm_id, with_damaged=True)) == 1
    assert [key for call, key in objects.calls if call == "get"].count(void) == 1
    assert min(len(objects.contents[key]) for key in keys(objects, "manifests/") if key != void) > VOID_SIZE_MAX


def claim_epochs(objects: FakeObjects) -> list[int]:
    return sorted(int(name) for name in names(objects, "claims/"))


def put_held(store: Store, epoch: int) -> None:
    put_claim(store.objects, Claim(VmId("a" * 32), epoch, ClaimState.HELD, DatastoreId("1" * 32), "host1", "vms", 10.0))


def test_all_but_the_newest_two_claims_go_and_a_put_of_one_that_went_is_noticed(
    store: Store, objects: FakeObjects
) -> None:
    for epoch in range(1, 6):
        put_held(store, epoch)
    objects.contents[f"claims/{'a' * 32}/notes"] = b"not ours"
    assert collect(store).claims == 3
    assert keys(objects, "claims/")[-1].endswith("notes")
    del objects.contents[f"claims/{'a' * 32}/notes"]
    assert claim_epochs(objects) == [4, 5]
    with pytest.raises(ClaimedElsewhere):
        put_held(store, 3)  # by one who has looked long ago
    assert claim_epochs(objects) == [3, 4, 5]
    assert collect(store).claims == 1
    assert collect(store).claims == 0


def test_a_claim_stays_until_two_newer_ones_were_seen_twice(store: Store, objects: FakeObjects) -> None:
    for epoch in (1, 2):
        put_held(store, epoch)
    waits = 0

    def sleep(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 1:
            put_held(store, 3)

    assert collect(store, sleep=sleep).claims == 0
    assert (claim_epochs(objects), waits > 0) == ([1, 2, 3], True)
    assert collect(store).claims == 1
