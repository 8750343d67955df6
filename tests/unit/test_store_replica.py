"""A replica has what restore points need, read back, in an order that lets no copy count that is none."""

from __future__ import annotations

import random
import secrets
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up, new_id

from vmfs_stub.core.errors import (
    CorruptPack,
    Refused,
    StoreUnavailable,
    UnknownFormat,
    WrongStore,
)
from vmfs_stub.core.ids import PackId, PointId, VmId
from vmfs_stub.services.replication import CaughtUp, catch_up
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.verify import verify
from vmfs_stub.store import format as store_format
from vmfs_stub.store.collector import Collector
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keyring import add_key, look_at, remove_key
from vmfs_stub.store.keys import (
    FORGOTTEN,
    KEYS,
    MANIFESTS,
    MOVED,
    PACKS,
    REPLICA_KEY,
    SEGMENTS,
    STORE_KEY,
    forgotten_key,
    manifest_key,
)
from vmfs_stub.store.manifest import Manifest, encode_void
from vmfs_stub.store.mirrored_deletes import MirroredDeletes
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.replica import Replication, check_replica, lacking, make_replica
from vmfs_stub.store.store import Store
from vmfs_stub.store.versions import raise_version

CHUNK = 64 * 1024
DISK = random.Random(31).randbytes(9 * CHUNK + 17)


class Pair:
    """A store, and the objects of its replica."""

    def __init__(self, source: KeySource | None, path: Path) -> None:
        self.source = source
        self.here, self.there = FakeObjects(), FakeObjects()
        self.store = Store.create(self.here, chunk_size=CHUNK, source=source)
        make_replica(self.store, self.there)
        self.path = path

    @property
    def replica(self) -> Store:
        return Store(self.there, self.store.description, self.store.key)

    def run(self, *, again: bool = False) -> CaughtUp:
        """All that `replicate` does, in a process of its own."""
        threads = Threads(files_max=1, store_max=2, compute_max=1, store_timeout_s=60, transfer_timeout_s=60)
        with closing(threads), closing(ReadBack(self.path, self.store.id, "there")) as read_back:
            return trio.run(partial(catch_up, threads, Replication(self.store, self.replica, read_back, again=again)))

    def names(self, *kinds: str) -> dict[str, bytes]:
        """What the store has of these kinds."""
        return {key: data for key, data in self.here.contents.items() if key.startswith(kinds)}

    def assert_same(self) -> None:
        """The replica has what restore points need, the same bytes, and nothing else."""
        assert self.contents == self.names(STORE_KEY, KEYS, PACKS, SEGMENTS, MANIFESTS)

    @property
    def contents(self) -> dict[str, bytes]:
        """What the replica has, beside its mark."""
        return {key: data for key, data in self.there.contents.items() if key != REPLICA_KEY}

    def assert_restorable(self) -> None:
        """From the replica alone."""
        self.assert_restorable_count(len(self.names(MANIFESTS)))

    def assert_restorable_count(self, count: int) -> None:
        report = verify(Store.open(self.there, self.source))
        assert (report.findings, report.point_count) == ((), count)


@pytest.fixture(params=[None, KEY_SOURCE], ids=["plain", "encrypted"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(request.param, tmp_path / "replica.sqlite")


def calls(objects: FakeObjects, call: str, *kinds: str) -> list[str]:
    return [key for done, key in objects.calls if done == call and key.startswith(kinds)]


def altered(data: bytes) -> bytes:
    return data[:50] + bytes([data[50] ^ 1]) + data[51:]


def test_it_is_the_same_byte_for_byte(pair: Pair) -> None:
    first = back_up(pair.store, {"disk.raw": DISK + bytes(CHUNK), "nvram": b"vars"})
    back_up(pair.store, {"disk.raw": DISK[::-1]}, vm_id=first.vm_id)
    back_up(pair.store, {"disk.raw": DISK}, vm_name="other")
    done = pair.run()
    assert (done.points, done.failures) == (3, {})
    assert done.bytes == sum(map(len, pair.names(PACKS).values()))
    pair.assert_same()
    pair.assert_restorable()


def test_what_is_there_is_not_copied_again(pair: Pair) -> None:
    first = back_up(pair.store, {"disk.raw": DISK})
    pair.run()
    back_up(pair.store, {"disk.raw": DISK + b"more"}, vm_id=first.vm_id)
    pair.there.calls.clear()
    done = pair.run()
    assert done.points == 1
    assert len(calls(pair.there, "put", PACKS)) == 1
    # What this host has read back it does not read again, to see that it is there is enough.
    assert set(calls(pair.there, "get", PACKS)) == set(calls(pair.there, "put", PACKS))
    pair.assert_same()
    pair.there.calls.clear()
    pair.here.calls.clear()
    assert pair.run().points == 0
    looks = {("get", STORE_KEY), ("get", "keys"), ("size", "versions"), ("size", REPLICA_KEY)}
    assert {(call, key.split("/")[0]) for call, key in pair.there.calls} <= looks
    assert calls(pair.here, "get", PACKS, SEGMENTS) == []


def test_another_host_reads_back_what_it_finds(pair: Pair) -> None:
    first = back_up(pair.store, {"disk.raw": DISK})
    pair.run()
    back_up(pair.store, {"disk.raw": DISK + b"more"}, vm_id=first.vm_id)
    pair.path = pair.path.with_name("other.sqlite")
    pair.there.calls.clear()
    pair.run()
    assert set(pair.names(PACKS)) <= set(calls(pair.there, "get", PACKS))
    assert len(calls(pair.there, "put", PACKS)) == 1


@pytest.mark.parametrize("kind", [PACKS, SEGMENTS, MANIFESTS])
@pytest.mark.parametrize("call", ["put", "get"])
@pytest.mark.parametrize("side", ["here", "there"])
def test_a_run_that_is_cut_short_claims_nothing_and_goes_on(pair: Pair, kind: str, call: str, side: str) -> None:
    back_up(pair.store, {"a": DISK, "b": DISK[: CHUNK + 3]})
    failing: FakeObjects = getattr(pair, side)

    def fail(done: str, key: str) -> None:
        if done == call and key.startswith(kind):
            raise StoreUnavailable("planted")

    failing.before = fail
    if (side, call) == ("here", "put"):
        pair.run()  # nothing is written there
    else:
        with pytest.raises(StoreUnavailable):
            pair.run()
        assert not [key for key in pair.there.contents if key.startswith(MANIFESTS)] or call == "get"
    failing.before = lambda done, key: None
    pair.run()
    pair.assert_same()


def test_order_of_puts(pair: Pair) -> None:
    """Every pack read back before a segment names it, every segment before the manifest does."""
    back_up(pair.store, {"a": DISK, "b": DISK[::-1]})
    pair.there.calls.clear()
    pair.run()
    done = [(call, key.split("/")[0]) for call, key in pair.there.calls if not key.startswith((STORE_KEY, KEYS))]
    segment = done.index(("put", "segments"))
    assert ("put", "packs") in done[:segment]
    assert done[:segment].count(("get", "packs")) >= 2 * done[:segment].count(("put", "packs"))
    assert done[-2:] == [("put", "manifests"), ("get", "manifests")]
    assert ("put", "segments") not in done[done.index(("put", "manifests")) :]


def test_a_replica_that_does_not_keep_what_is_put(pair: Pair) -> None:
    back_up(pair.store, {"disk.raw": DISK})
    (key,) = pair.names(PACKS)

    def spoil(call: str, name: str) -> None:
        if call == "get" and name == key and key in pair.there.contents:
            pair.there.contents[key] = altered(pair.there.contents[key])

    pair.there.before = spoil
    done = pair.run()
    (error,) = done.failures.values()
    assert isinstance(error, CorruptPack)
    assert not [name for name in pair.there.contents if name.startswith((SEGMENTS, MANIFESTS))]


@pytest.mark.parametrize("kind", [PACKS, SEGMENTS])
def test_a_damaged_copy_is_replaced(pair: Pair, kind: str) -> None:
    """As one that a run has left that was cut short before it read it back."""
    back_up(pair.store, {"disk.raw": DISK})
    for key, data in pair.names(kind).items():
        pair.there.contents[key] = altered(data)
    if kind == SEGMENTS:
        (key,) = pair.names(SEGMENTS)
        del pair.there.contents[key]  # one that is there is not looked at again: scrub of the replica does
    pair.run()
    pair.assert_same()


def test_what_is_damaged_in_the_store_is_not_copied_as_if_it_were_whole(pair: Pair) -> None:
    manifest = back_up(pair.store, {"disk.raw": DISK})
    whole = back_up(pair.store, {"disk.raw": DISK[::-1]}, vm_id=manifest.vm_id)
    (segment_id,) = manifest.files[0].segments
    assert segment_id is not None
    (pack_id,) = pair.store.segments.load(segment_id).packs
    key = f"{PACKS}{pack_id[:2]}/{pack_id}"
    pair.here.contents[key] = altered(pair.here.contents[key])
    done = pair.run()
    assert isinstance(done.failures[manifest.vm_id], CorruptPack)
    # The other point of that VM is there all the same.
    assert lacking(pair.store, pair.replica, manifest.vm_id) == [manifest.point_id]
    assert manifest_key(whole.vm_id, whole.point_id) in pair.there.contents


def test_what_was_repaired_is_copied_with_where_it_is(pair: Pair) -> None:
    manifest = back_up(pair.store, {"disk.raw": DISK})
    (key,) = pair.names(PACKS)
    sound = pair.here.contents[key]
    pair.here.contents[key] = altered(sound)
    with closing(ScrubProgress(None, pair.store.id)) as progress:
        scrub(pair.store, progress)
    back_up(pair.store, {"disk.raw": DISK})  # stored afresh
    with closing(ScrubProgress(None, pair.store.id)) as progress:
        assert scrub(pair.store, progress).is_whole
    assert pair.names(MOVED)
    assert pair.run().failures == {}
    assert pair.contents == pair.names(STORE_KEY, KEYS, PACKS, SEGMENTS, MANIFESTS, MOVED)
    pair.assert_restorable()
    # Also where the pack is gone altogether, and to a replica that has nothing yet.
    del pair.here.contents[key]
    pair.there.contents.clear()
    make_replica(pair.store, pair.there)
    done = pair.run()
    assert set(done.failures) == {manifest.vm_id}  # what scrub did not copy is lost, and said to be


def test_a_copy_in_the_replica_outlives_the_one_in_the_store(pair: Pair) -> None:
    first = back_up(pair.store, {"disk.raw": DISK})
    pair.run()
    for key, data in pair.names(PACKS).items():
        pair.here.contents[key] = altered(data)
    pair.path.unlink()
    back_up(pair.store, {"disk.raw": DISK + b"x"}, vm_id=first.vm_id)
    assert pair.run().failures == {}
    pair.assert_restorable()


def test_void_and_forgotten_points_are_none(pair: Pair) -> None:
    manifest = back_up(pair.store, {"disk.raw": DISK})
    void = PointId(new_id())
    pair.store.objects.put(manifest_key(manifest.vm_id, void), encode_void(new_id()))
    forgotten = back_up(pair.store, {"disk.raw": DISK}, vm_id=manifest.vm_id)
    pair.store.forget(forgotten.vm_id, forgotten.point_id, host="host1", why="by hand")
    pair.run()
    assert {key for key in pair.there.contents if key.startswith(MANIFESTS)} == {
        manifest_key(manifest.vm_id, manifest.point_id)
    }
    assert forgotten_key(forgotten.vm_id, forgotten.point_id) not in pair.there.contents
    assert lacking(pair.store, pair.replica, manifest.vm_id) == []


def test_the_newest_comes_first(pair: Pair) -> None:
    vm_id = new_id()
    points = [back_up(pair.store, {"d": bytes([at + 1])}, vm_id=vm_id).point_id for at in range(4)]
    assert lacking(pair.store, pair.replica, VmId(vm_id)) == points[::-1]


def test_a_point_that_garbage_collection_removes_meanwhile(pair: Pair) -> None:
    manifest = back_up(pair.store, {"disk.raw": DISK})
    key = manifest_key(manifest.vm_id, manifest.point_id)

    def collect(call: str, name: str) -> None:
        if (call, name) == ("put", key):
            pair.here.contents.pop(key, None)  # and it deletes it here before this one puts it

    pair.there.before = collect
    assert pair.run().points == 0
    assert key not in pair.there.contents


def test_another_store_is_refused(pair: Pair) -> None:
    back_up(pair.store, {"disk.raw": DISK})
    other = FakeObjects()
    Store.create(other, chunk_size=CHUNK)
    before = dict(other.contents)
    with pytest.raises(WrongStore):
        make_replica(pair.store, other)
    pair.there = other
    with pytest.raises(WrongStore):
        pair.run()
    assert other.contents == before
    pair.there = FakeObjects()
    with pytest.raises(StoreUnavailable, match="no replica"):
        pair.run()
    assert pair.there.contents == {}
    with pytest.raises(StoreUnavailable):
        check_replica(pair.there, pair.store.description)


def test_the_store_itself_is_no_replica_of_it_nor_is_one_that_became_the_store(pair: Pair) -> None:
    back_up(pair.store, {"disk.raw": DISK})
    pair.run()
    del pair.there.contents[REPLICA_KEY]  # as who makes it the store does, while a host goes on with the old one
    for objects in (pair.there, pair.here):  # under another URL, say
        pair.there, kept = objects, dict(objects.contents)
        with pytest.raises(WrongStore, match="no mark of a replica"):
            check_replica(objects, pair.store.description)
        with pytest.raises(WrongStore, match="no mark of a replica"):
            make_replica(pair.store, objects)
        with pytest.raises(WrongStore, match="no mark of a replica"):
            pair.run()
        assert objects.contents == kept


def test_a_store_that_was_replaced_changes_nothing_in_the_replica(pair: Pair) -> None:
    back_up(pair.store, {"disk.raw": DISK})
    pair.run()
    kept = dict(pair.there.contents)
    pair.here.contents.clear()
    with pytest.raises(StoreUnavailable, match="see that what belongs there is mounted"):
        pair.run()
    Store.create(pair.here, chunk_size=CHUNK, source=pair.source)
    with pytest.raises(WrongStore):
        pair.run()
    assert pair.there.contents == kept


def test_keys_come_and_go_with_the_store() -> None:
    pair = Pair(KEY_SOURCE, Path("/nonexistent/replica.sqlite"))
    other = KeySource(KEY_SOURCE.kind, "another", secrets.token_bytes(32))
    added = add_key(pair.here, look_at(pair.here), KEY_SOURCE, other)
    pair.run()
    assert Store.open(pair.there, other).key == pair.store.key
    remove_key(pair.here, look_at(pair.here), KEY_SOURCE, added.key_id)
    pair.run()
    assert {key for key in pair.there.contents if key.startswith(KEYS)} == set(pair.names(KEYS))
    # A listing that shows nothing removes nothing.
    listed = pair.here.list
    pair.here.list = lambda prefix: iter(()) if prefix == KEYS else listed(prefix)  # type: ignore[method-assign]
    pair.run()
    assert {key for key in pair.there.contents if key.startswith(KEYS)} == set(pair.names(KEYS))


def test_a_store_that_was_raised_raises_its_replica(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_format, "STORE_VERSION", 2)
    pair.run()
    assert pair.names("versions/") == {}
    raise_version(pair.here, pair.store.description, 2)
    pair.run()
    monkeypatch.undo()
    with pytest.raises(UnknownFormat):
        Store.open(pair.there, pair.source)


def test_read_back_belongs_to_one_place(tmp_path: Path) -> None:
    path, pack_id = tmp_path / "replica.sqlite", PackId(new_id())
    store_id = Store.create(FakeObjects()).id
    with closing(ReadBack(path, store_id, "file:///a")) as known:
        known.add(pack_id)
        assert known.has(pack_id)
    with closing(ReadBack(path, store_id, "file:///a")) as known:
        assert known.has(pack_id)
    with closing(ReadBack(path, store_id, "file:///b")) as known:
        assert not known.has(pack_id)
    path.write_bytes(b"not a database at all" * 100)
    with closing(ReadBack(path, store_id, "file:///a")) as known:
        assert not known.has(pack_id)
        known.add(pack_id)
    known.add(pack_id)  # closed, or on a disk that fails: it is read once more, no worse
    assert not known.has(pack_id)


# Garbage collection, and repair


def test_a_replica_takes_no_backups_and_no_garbage_is_collected_in_it(pair: Pair) -> None:
    back_up(pair.store, {"disk": DISK})
    pair.run()
    pair.there.contents["packs/aa/" + "a" * 32] = b"on its way"
    kept = dict(pair.there.contents)
    opened = Store.open(pair.there, pair.source)
    with pytest.raises(Refused):
        back_up(opened, {"disk": DISK})
    reachability = Reachability(None, opened.id, opened.objects, sealing=opened.sealing)
    with closing(reachability), pytest.raises(Refused):
        Collector(opened.objects, reachability, lag_s=0, sleep=lambda seconds: None).run()
    assert pair.there.contents == kept
    del pair.there.contents[REPLICA_KEY]  # it is made the store
    back_up(opened, {"disk": DISK})


@pytest.mark.parametrize("kind", [PACKS, SEGMENTS, MANIFESTS])
def test_all_of_it_is_read_back_again_and_mended(pair: Pair, kind: str) -> None:
    back_up(pair.store, {"disk": DISK})
    back_up(pair.store, {"disk": DISK[::-1]})
    pair.run()
    for key in pair.names(kind):
        pair.there.contents[key] = altered(pair.there.contents[key])
    assert pair.run().points == 0
    pair.there.calls.clear()
    assert pair.run(again=True).failures == {}
    pair.assert_same()
    assert set(pair.names(PACKS)) <= set(calls(pair.there, "get", PACKS))


def collect(pair: Pair) -> MirroredDeletes:
    mirrored = MirroredDeletes(pair.store.objects, pair.there)
    with closing(Reachability(None, pair.store.id, pair.store.objects, sealing=pair.store.sealing)) as reachability:
        Collector(mirrored, reachability, lag_s=0, sleep=lambda seconds: None).run()
    return mirrored


def forget(pair: Pair, manifest: Manifest) -> None:
    pair.store.forget(manifest.vm_id, manifest.point_id, host="host1", why="by hand")


def test_garbage_goes_from_both(pair: Pair) -> None:
    going = back_up(pair.store, {"disk": DISK})
    back_up(pair.store, {"disk": DISK[::-1]})
    pair.run()
    forget(pair, going)
    assert collect(pair).left == 0
    assert len(pair.names(MANIFESTS)) == len(pair.names(PACKS)) == 1
    pair.assert_same()
    pair.assert_restorable()


def test_a_replica_that_is_away_keeps_whole_points_and_is_collected_later(pair: Pair) -> None:
    going, staying = back_up(pair.store, {"disk": DISK}), back_up(pair.store, {"disk": DISK[::-1]})
    pair.run()
    forget(pair, going)
    kept = dict(pair.there.contents)

    def refuse(call: str, key: str) -> None:
        raise StoreUnavailable("away")

    pair.there.before = refuse
    pair.there.calls.clear()
    mirrored = collect(pair)
    assert mirrored.left == 3
    assert isinstance(mirrored.problem, StoreUnavailable)
    assert len([call for call, _ in pair.there.calls if call == "delete"]) == 1  # it was asked once
    pair.there.before = lambda call, key: None
    assert pair.there.contents == kept
    assert set(pair.names(MANIFESTS)) == {manifest_key(staying.vm_id, staying.point_id)}
    # The mark is what remembers that the copy of the manifest is still to go.
    assert set(pair.names(FORGOTTEN)) == {forgotten_key(going.vm_id, going.point_id)}
    assert collect(pair).left == 0
    assert pair.names(FORGOTTEN) == {}
    assert {key for key in pair.there.contents if key.startswith(MANIFESTS)} == set(pair.names(MANIFESTS))
    assert verify(Store.open(pair.there, pair.source)).findings == ()


@pytest.mark.parametrize("count", [1, 2])
def test_what_the_store_has_lost_keeps_what_it_needs_in_the_replica(pair: Pair, count: int) -> None:
    """In the store all that it needs is garbage then; in the replica it can be read, until somebody forgets it."""
    lost = [back_up(pair.store, {"disk": DISK[number:]}) for number in range(count)]
    going = back_up(pair.store, {"disk": DISK[::-1]})
    pair.run()
    keys = sorted(manifest_key(manifest.vm_id, manifest.point_id) for manifest in lost)
    for key in keys:
        del pair.here.contents[key]
    forget(pair, going)
    mirrored = collect(pair)
    assert pair.names(MANIFESTS, PACKS) == {}
    assert (mirrored.left > 0, f"delete {keys[0]} there" in str(mirrored.problem)) == (True, True)
    assert ("1 others" in str(mirrored.problem)) == (count == 2)
    assert {key for key in pair.there.contents if key.startswith(MANIFESTS)} == set(keys)
    pair.assert_restorable_count(count)
    back_up(pair.store, {"disk": DISK})  # or there would be nothing left in the store to collect
    for manifest in lost:
        pair.store.stored.put(forgotten_key(manifest.vm_id, manifest.point_id), b"", if_absent=False)
    assert collect(pair).problem is None
    assert {key for key in pair.there.contents if key.startswith(MANIFESTS)} == set()


def test_a_store_that_lost_everything_empties_no_replica(pair: Pair) -> None:
    back_up(pair.store, {"disk": DISK})
    pair.run()
    kept = dict(pair.there.contents)
    pair.here.contents = {key: data for key, data in pair.here.contents.items() if key.startswith((STORE_KEY, KEYS))}
    collect(pair)
    assert pair.there.contents == kept


def scrubbed(pair: Pair) -> bool:
    with closing(ScrubProgress(None, pair.store.id)) as progress:
        return scrub(Store.open(pair.here, pair.source), progress, replica=pair.replica).is_whole


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("kind", [PACKS, SEGMENTS])
def test_scrub_repairs_from_the_replica(pair: Pair, kind: str, is_lost: bool) -> None:
    back_up(pair.store, {"disk": DISK})
    pair.run()
    for key, data in pair.names(kind).items():
        if is_lost:
            del pair.here.contents[key]
        else:
            pair.here.contents[key] = altered(data)
    assert scrubbed(pair)
    assert verify(Store.open(pair.here, pair.source)).findings == ()


def with_damaged_manifest(pair: Pair) -> tuple[Manifest, str, dict[str, bytes]]:
    """A replicated point of which the store's manifest is damaged: it, its key, and what the store had before."""
    manifest = back_up(pair.store, {"disk": DISK})
    pair.run()
    before = dict(pair.here.contents)
    key = manifest_key(manifest.vm_id, manifest.point_id)
    pair.here.contents[key] = altered(pair.here.contents[key])
    return manifest, key, before


def test_scrub_replaces_a_damaged_manifest(pair: Pair) -> None:
    _, _, before = with_damaged_manifest(pair)
    assert scrubbed(pair)
    assert pair.here.contents == before


@pytest.mark.parametrize("when", ["size", "put"], ids=["before it is looked for", "before it is put"])
def test_scrub_brings_back_no_manifest_that_was_deleted(pair: Pair, when: str) -> None:
    """It would name what is gone, and no garbage could be collected any more."""
    manifest, key, _ = with_damaged_manifest(pair)

    def before(call: str, name: str) -> None:
        if (call, name) == (when, key):
            pair.here.before = lambda call, name: None
            forget(pair, manifest)
            collect(pair)
            assert pair.names(MANIFESTS) == pair.names(PACKS) == {}

    pair.here.before = before
    assert scrubbed(pair)
    assert pair.names(MANIFESTS) == {}
    collect(pair)


def test_a_store_that_goes_is_away_and_no_point_is_missing(pair: Pair) -> None:
    """Its mount is gone in the midst: that is nothing that is wrong with a VM."""
    manifest = back_up(pair.store, {"disk": DISK})
    key = manifest_key(manifest.vm_id, manifest.point_id)

    def gone(call: str, name: str) -> None:
        if (call, name) == ("get", key):
            pair.here.contents.clear()

    pair.here.before = gone
    with pytest.raises(StoreUnavailable):
        pair.run()


def test_a_replica_that_goes_takes_no_manifest_with_it(pair: Pair) -> None:
    """Another medium is mounted there: that tells nothing of what was deleted."""
    _, key, before = with_damaged_manifest(pair)

    def gone(call: str, name: str) -> None:
        if (call, name) == ("size", key):
            pair.there.contents.clear()

    pair.there.before = gone
    scrubbed(pair)
    assert pair.here.contents == before


def test_scrub_believes_no_copy_unseen(pair: Pair) -> None:
    back_up(pair.store, {"disk": DISK})
    pair.run()
    for objects in (pair.here, pair.there):
        objects.contents = {
            key: altered(data) if key.startswith((PACKS, SEGMENTS, MANIFESTS)) else data
            for key, data in objects.contents.items()
        }
    assert not scrubbed(pair)


def test_scrub_does_without_a_replica_that_is_away(pair: Pair) -> None:
    back_up(pair.store, {"disk": DISK})
    pair.run()
    (key,) = pair.names(PACKS)
    pair.here.contents[key] = altered(pair.here.contents[key])

    def refuse(call: str, name: str) -> None:
        raise StoreUnavailable("away")

    pair.there.before = refuse
    assert not scrubbed(pair)
    pair.there.before = lambda call, name: None
    assert scrubbed(pair)
