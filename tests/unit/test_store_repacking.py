"""Packs of which little is needed are copied and go; what is needed of them is found, whatever else happens meanwhile.

Beside collectors and backups of other hosts it is tried in tests/collection.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up, finish, new_id, stored_file, write_chunks

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import StoreConflict, StoreDenied, StoreFull, StoreUnavailable
from vmfs_stub.core.ids import PackId, PointId, VmId
from vmfs_stub.services.restore import restore_point
from vmfs_stub.services.scrub import ScrubReport, scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.services.verify import verify
from vmfs_stub.store import moved
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.collector import Collected, Collector
from vmfs_stub.store.condemned import Condemned, decode_condemned, encode_condemned
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keys import (
    CONDEMNED,
    FORGOTTEN,
    INDEX,
    LEASES,
    MOVED,
    PACKS,
    QUARANTINED,
    manifest_key,
    moved_of,
    pack_key,
)
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.mirrored_deletes import MirroredDeletes
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.quarantine import Quarantine, put_quarantine
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.repacking import Repacking
from vmfs_stub.store.replica import Replication, make_replica
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
DISK = random.Random(71).randbytes(8 * CHUNK)
KEPT = DISK[2 * CHUNK : 4 * CHUNK]
"""What a newer restore point has of it."""


@dataclass
class Rig:
    """A store with a pack of which a quarter is needed: by ``kept``, after the point that was made with it is gone."""

    source: KeySource | None = None
    objects: FakeObjects = field(default_factory=FakeObjects)

    def __post_init__(self) -> None:
        self.store = Store.create(self.objects, chunk_size=CHUNK, source=self.source)
        self.index = ChunkIndex(None, self.store.id)
        self.going = back_up(self.store, {"disk": DISK}, vm_name="old", index=self.index)
        self.kept = back_up(self.store, {"disk": KEPT}, vm_name="new", index=self.index)
        (self.pack,) = self.packs()
        self.store.forget(self.going.vm_id, self.going.point_id, host="host1", why="by hand")

    def packs(self) -> list[PackId]:
        return sorted(PackId(key.rpartition("/")[2]) for key in self.keys(PACKS))

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects.contents if key.startswith(prefix))

    def collect(
        self,
        *,
        sleep: Callable[[float], None] = lambda seconds: None,
        mirror: Callable[[PackId], None] = lambda pack_id: None,
        objects: ObjectStore | None = None,
        is_dry: bool = False,
    ) -> Collected:
        store = Store.open(self.objects, self.source)
        with closing(Reachability(None, store.id, store.objects, sealing=store.sealing, workers=1)) as reachability:
            collector = Collector(
                objects or store.objects,
                reachability,
                lag_s=1,
                sleep=sleep,
                workers=1,
                repacking=Repacking(store, mirror=mirror),
            )
            return collector.survey() if is_dry else collector.run()

    def scrub(self) -> ScrubReport:
        with closing(ScrubProgress(None, self.store.id)) as progress:
            return scrub(Store.open(self.objects, self.source), progress)

    def assert_whole(self, made: Manifest, content: bytes, place: Path) -> None:
        fresh = Store.open(self.objects, self.source)
        restore_point(fresh, fresh.open_point(made.vm_id, made.point_id), place)
        assert (place / "disk").read_bytes() == content

    def refs(self, made: Manifest) -> list[FrameRef]:
        table = self.store.open_point(made.vm_id, made.point_id).chunks(0)
        return [ref for ref in table.locate(0, table.chunk_count) if ref is not None]


@pytest.fixture(params=[None, KEY_SOURCE], ids=["plain", "encrypted"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.index.close()


def commit(writer: BackupWriter, segments: list[object], size: int) -> Manifest:
    return writer.commit(
        vm_id=VmId(new_id()),
        point_id=PointId(new_id()),
        vm_name="third",
        host="host2",
        files=[stored_file("disk", size, segments)],
        metadata={},
    )


def takes_over(rig: Rig) -> BackupWriter:
    """A backup of what the newer point has, by reference to its segment."""
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(rig.kept.vm_id, rig.kept.point_id).chunks(0)
    writer.reuse_segment(*table.segment(0), chunk_count=table.chunk_count)
    return writer


def refers_to_garbage(rig: Rig) -> tuple[BackupWriter, list[object]]:
    """A backup that met, by deduplication, what no point needs any more."""
    writer = rig.store.begin_backup(index=rig.index)
    entries = write_chunks(writer, DISK)
    finish(writer)
    assert {entry.pack_id for entry in entries if entry is not None} == {rig.pack}
    return writer, list(writer.add_file(entries))


def test_what_is_needed_stays_and_the_rest_goes(rig: Rig, tmp_path: Path) -> None:
    before = rig.objects.contents[pack_key(rig.pack)]
    dry = rig.collect(is_dry=True)
    assert (dry.packs, dry.repacked) == (1, 1)
    assert dry.bytes >= len(before)
    assert rig.packs() == [rig.pack]
    done = rig.collect()
    assert (done.packs, done.repacked) == (1, 1)
    assert done.copied_bytes == dry.copied_bytes == sum(ref.length for ref in rig.refs(rig.kept))
    (new,) = rig.packs()
    assert new != rig.pack
    assert len(rig.objects.contents[pack_key(new)]) < len(before) / 2
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")
    assert verify(Store.open(rig.objects, rig.source)).findings == ()
    report = rig.scrub()
    assert report.is_whole and report.damages == () and rig.keys(QUARANTINED) == []
    assert rig.keys(LEASES) == rig.keys(CONDEMNED) == []
    again = rig.collect()
    assert (again.packs, again.repacked, again.copied_bytes) == (0, 0, 0)
    assert rig.packs() == [new]


def test_a_backup_goes_on_with_what_was_moved(rig: Rig, tmp_path: Path) -> None:
    """It takes over the segment, whose pack is gone; and it refers to the copies, by deduplication."""
    rig.collect()
    again = commit(writer := takes_over(rig), [rig.kept.files[0].segments[0]], len(KEPT))
    assert writer.counts.new_chunks == 0
    rig.assert_whole(again, KEPT, tmp_path / "first")
    with closing(ChunkIndex(None, rig.store.id)) as index:
        deduplicated = back_up(rig.store, {"disk": KEPT}, index=index)
    assert {ref.pack_id for ref in rig.refs(deduplicated)} == set(rig.packs())
    rig.collect()
    rig.assert_whole(deduplicated, KEPT, tmp_path / "second")
    rig.assert_whole(rig.kept, KEPT, tmp_path / "third")


def test_the_index_names_it_no_more(rig: Rig) -> None:
    rig.collect()
    with closing(ChunkIndex(None, rig.store.id)) as index:
        writer = rig.store.begin_backup(index=index)
        writer.append(writer.encode(DISK))
        assert writer.counts.new_chunks == 6


def test_what_a_backup_needs_meanwhile_stays(rig: Rig, tmp_path: Path) -> None:
    """It is pending when the collector looks for the last time, and needs what was not moved."""
    made: list[Manifest] = []

    def sleep(seconds: float) -> None:
        if rig.keys(MOVED) and not made:
            hidden = {key: rig.objects.contents.pop(key) for key in rig.keys(CONDEMNED)}  # it read them just before
            writer, segments = refers_to_garbage(rig)
            made.append(commit(writer, segments, len(DISK)))
            rig.objects.contents |= hidden

    done = rig.collect(sleep=sleep)
    assert (done.packs, done.repacked) == (0, 0)
    assert rig.pack in rig.packs()
    rig.assert_whole(made[0], DISK, tmp_path / "out")


def test_a_backup_that_needs_what_was_not_moved_has_to_run_again(rig: Rig) -> None:
    """It begins before the last look, and is over after it."""
    begun: list[tuple[BackupWriter, list[object]]] = []

    def before(call: str, key: str) -> None:
        if (call, key) == ("delete", pack_key(rig.pack)):
            rig.objects.before = lambda call, key: None
            (listed,) = rig.keys(CONDEMNED)
            assert decode_condemned(rig.store.objects.get(listed), listed).retired == {rig.pack}
            writer, segments = begun[0]
            with pytest.raises(StoreConflict):
                commit(writer, segments, len(DISK))
            writer = takes_over(rig)  # needs only what was moved
            begun.append((writer, [commit(writer, [rig.kept.files[0].segments[0]], len(KEPT))]))

    def sleep(seconds: float) -> None:
        if not begun:
            begun.append(refers_to_garbage(rig))
            begun[0][0].renew_lease()
        begun[0][0].renew_lease()

    rig.objects.before = before
    assert rig.collect(sleep=sleep).repacked == 1
    assert len(begun) == 2
    back_up(rig.store, {"disk": DISK}, index=rig.index)  # again, and stored afresh


def test_what_is_gone_is_met_by_a_backup_that_began_before(rig: Rig) -> None:
    writer, segments = refers_to_garbage(rig)
    rig.collect(sleep=lambda seconds: writer.renew_lease())
    with pytest.raises(StoreConflict):
        commit(writer, segments, len(DISK))


@pytest.mark.parametrize("kind", ["damaged", "quarantined"])
def test_what_is_damaged_is_left_to_scrub(rig: Rig, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "damaged":
        pack, at = rig.objects.contents[pack_key(rig.pack)], rig.refs(rig.kept)[0].offset + 50
        rig.objects.contents[pack_key(rig.pack)] = pack[:at] + bytes([pack[at] ^ 1]) + pack[at + 1 :]
    else:
        put_quarantine(rig.store.objects, Quarantine(1.0, (), "seen"), rig.pack)
    assert rig.collect().repacked == 0
    assert rig.packs() == [rig.pack]
    assert rig.keys(MOVED) == []
    assert ("run scrub" in caplog.text) == (kind == "damaged")


@pytest.mark.parametrize("error", [StoreFull, StoreDenied])
def test_where_nothing_can_be_stored_it_stays_and_garbage_goes(rig: Rig, error: type[Exception]) -> None:
    garbage = "packs/ab/" + "ab" * 16
    rig.objects.contents[garbage] = b"of nobody"

    def refuse(call: str, key: str) -> None:
        if call == "put" and key.startswith(PACKS):
            raise error("no")

    rig.objects.before = refuse
    done = rig.collect()
    assert (done.packs, done.repacked) == (1, 0)
    assert rig.packs() == [rig.pack]
    assert rig.keys(LEASES) == []


def test_one_that_was_taken_for_dead_retires_nothing(rig: Rig, tmp_path: Path) -> None:
    """The next run goes on with its copies, where they are."""

    def take_for_dead(call: str, key: str) -> None:
        if call == "put" and key.startswith(MOVED):
            rig.objects.contents |= {lease.replace(LEASES, "dead/"): b"" for lease in rig.keys(LEASES)}

    rig.objects.before = take_for_dead
    assert rig.collect().repacked == 0
    rig.objects.before = lambda call, key: None
    assert rig.pack in rig.packs()
    done = rig.collect()
    assert (done.repacked, done.copied_bytes) == (1, 0)
    assert len(rig.keys(MOVED)) == 1
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


@pytest.mark.parametrize("why", ["gone", "condemned", "damaged"])
def test_copies_that_do_not_count_are_made_again(rig: Rig, why: str, tmp_path: Path) -> None:
    def die(seconds: float) -> None:
        if rig.keys(MOVED):
            raise StoreUnavailable("the host lost its power")

    with pytest.raises(StoreUnavailable):
        rig.collect(sleep=die)
    (copy,) = set(rig.packs()) - {rig.pack}
    if why == "gone":
        del rig.objects.contents[pack_key(copy)]
    elif why == "condemned":
        rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(frozenset({copy})), "of another one"))
    else:
        put_quarantine(rig.store.objects, Quarantine(1.0, (), "seen"), copy)
    done = rig.collect()
    assert done.repacked == 1
    assert done.copied_bytes > 0
    assert rig.pack not in rig.packs()
    rig.objects.contents.pop(pack_key(copy), None)
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_what_was_moved_is_not_moved_again(rig: Rig, tmp_path: Path) -> None:
    """Readers follow a few moves and no more."""
    rig.collect()
    (first,) = rig.packs()
    new = KEPT[:CHUNK]
    with closing(ChunkIndex(None, rig.store.id)) as index:
        newest = back_up(rig.store, {"disk": new + b"\1" * CHUNK}, index=index)
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    assert first in {ref.pack_id for ref in rig.refs(newest)}
    rig.collect()
    rig.assert_whole(newest, new + b"\1" * CHUNK, tmp_path / "out")


def test_what_is_noted_of_a_pack_goes_with_the_last_that_needs_it(rig: Rig) -> None:
    """Its name is on a list before: a backup that counts on the documents sees it, or is seen."""
    rig.collect()
    assert rig.keys(moved_of(rig.pack))
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    writer = takes_over(rig)
    listed: list[bool] = []

    def before(call: str, key: str) -> None:
        if call == "delete" and key.startswith(MOVED):
            lists = [decode_condemned(rig.store.objects.get(name), name) for name in rig.keys(CONDEMNED)]
            listed.append(any(rig.pack in found.packs for found in lists))

    rig.objects.before = before
    rig.collect(sleep=lambda seconds: writer.renew_lease())
    assert listed == [True]
    assert rig.packs() == rig.keys(MOVED) == []
    with pytest.raises(StoreConflict):
        commit(writer, [rig.kept.files[0].segments[0]], len(KEPT))


def test_what_was_needed_a_moment_ago_keeps_its_notes(rig: Rig) -> None:
    """Another collector removes the point between two looks: a backup under way may not have been warned yet."""
    rig.collect()
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    rig.objects.contents["packs/ab/" + "ab" * 16] = b"of nobody"  # for a last look
    (mark,) = rig.keys(FORGOTTEN)
    del rig.objects.contents[mark]

    def sleep(seconds: float) -> None:
        if rig.keys(CONDEMNED):
            rig.objects.contents.pop(manifest_key(rig.kept.vm_id, rig.kept.point_id), None)

    rig.collect(sleep=sleep)
    assert rig.keys(MOVED)
    rig.collect()
    assert rig.keys(MOVED) == []


def test_a_recall_reads_together_what_lies_together(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.collect()
    refs = rig.refs(rig.kept)
    fresh = Store.open(rig.objects, rig.source)
    rig.objects.calls.clear()
    assert b"".join(fresh.fetch(refs)) == KEPT
    (new,) = rig.packs()
    assert [key for call, key in rig.objects.calls if call == "get_range"] == [pack_key(rig.pack), pack_key(new)]
    monkeypatch.setattr(moved.MovedFrames, "place", lambda self, ref: None)
    assert b"".join(fresh.fetch(refs)) == KEPT, "and one by one, else"


def test_damage_of_a_copy_is_found_and_told(rig: Rig) -> None:
    rig.collect()
    (new,) = rig.packs()
    pack = rig.objects.contents[pack_key(new)]
    rig.objects.contents[pack_key(new)] = pack[:60] + bytes([pack[60] ^ 1]) + pack[61:]
    report = rig.scrub()
    assert not report.is_whole
    needs = [need for damage in report.damages for need in damage.needs]
    assert {need.point_id for need in needs} == {rig.kept.point_id}
    del rig.objects.contents[pack_key(new)]
    assert not rig.scrub().is_whole


# With a replica


@pytest.fixture
def there(rig: Rig, tmp_path: Path) -> Iterator[tuple[FakeObjects, Replication]]:
    objects = FakeObjects()
    make_replica(rig.store, objects)
    replica = Store.open(objects, rig.source)
    with closing(ReadBack(tmp_path / "read-back", rig.store.id, "file:///there")) as read_back:
        replication = Replication(rig.store, replica, read_back)
        manifest, (segment_id,) = replication.look(rig.kept.vm_id, rig.kept.point_id)
        replication.copy_pack(rig.pack)
        replication.put_segment(replication.read(segment_id))
        replication.put_manifest(rig.kept.vm_id, rig.kept.point_id, manifest)
        yield objects, replication


def test_the_replica_has_the_copies_before_the_pack_goes(
    rig: Rig, there: tuple[FakeObjects, Replication], tmp_path: Path
) -> None:
    objects, replication = there
    mirrored = MirroredDeletes(rig.store.objects, objects)
    assert rig.collect(mirror=replication.copy_moves, objects=mirrored).repacked == 1
    assert sorted(key for key in objects.contents if key.startswith(PACKS)) == rig.keys(PACKS)
    replica = Store.open(objects, rig.source)
    restore_point(replica, replica.open_point(rig.kept.vm_id, rig.kept.point_id), tmp_path / "out")
    assert (tmp_path / "out/disk").read_bytes() == KEPT


def test_without_the_replica_nothing_is_repacked(rig: Rig, there: tuple[FakeObjects, Replication]) -> None:
    objects, replication = there

    def away(call: str, key: str) -> None:
        raise StoreUnavailable("the replica is away")

    objects.before = away
    assert rig.collect(mirror=replication.copy_moves).repacked == 0
    assert rig.pack in rig.packs()


def test_a_replica_that_does_not_keep_the_copies_counts_as_none(
    rig: Rig, there: tuple[FakeObjects, Replication]
) -> None:
    objects, replication = there

    def forgets(call: str, key: str) -> None:
        if call == "get" and key.startswith(PACKS) and not key.endswith(rig.pack):
            objects.contents.pop(key, None)

    objects.before = forgets
    assert rig.collect(mirror=replication.copy_moves).repacked == 0
    assert rig.pack in rig.packs()
    assert rig.keys(INDEX)
