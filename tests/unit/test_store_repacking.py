"""Packs of which little is needed are copied and go; what is needed of them is found, whatever else happens meanwhile.

Beside collectors and backups of other hosts it is tried in tests/collection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up, finish, new_id, stored_file, write_chunks

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptPack, StoreConflict, StoreDenied, StoreFull, StoreUnavailable, UnknownFormat
from vmfs_stub.core.ids import PackId, PointId, VmId
from vmfs_stub.services.restore import restore_point
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import PackDamage, ScrubProgress
from vmfs_stub.services.scrub_report import ScrubReport
from vmfs_stub.services.verify import verify
from vmfs_stub.store import condemned, documents, moved, reachability, retirement
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.collector import Collected, Collector
from vmfs_stub.store.condemned import (
    CONDEMNED_FORMAT,
    CONDEMNED_VERSION,
    Condemned,
    decode_condemned,
    encode_condemned,
)
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keys import (
    CONDEMNED,
    FORGOTTEN,
    INDEX,
    LEASES,
    MANIFESTS,
    MOVED,
    PACKS,
    PENDING_SUFFIX,
    QUARANTINED,
    SEGMENTS,
    manifest_key,
    moved_key,
    moved_of,
    pack_key,
    segment_key,
)
from vmfs_stub.store.leases import LEASE_DEAD_S
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.mirrored_deletes import MirroredDeletes
from vmfs_stub.store.moved import Move, encode_moved
from vmfs_stub.store.moving import moving
from vmfs_stub.store.objects import Buffer, ObjectStore
from vmfs_stub.store.packs import read_footer
from vmfs_stub.store.quarantine import Quarantine, put_quarantine
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.repacking import Mirror, Repacking
from vmfs_stub.store.replica import Replication, make_replica
from vmfs_stub.store.retrying import RetryingObjects
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
        mirror: Mirror | None = None,
        objects: ObjectStore | None = None,
        clock: Callable[[], float] = time.monotonic,
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
                repacking=Repacking(store, mirror=mirror, clock=clock),
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


def test_a_writer_that_does_not_know_of_retired_packs_refuses(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would refer to all of them; any other list it reads as before."""
    writer, segments = refers_to_garbage(rig)
    lists: list[str] = []

    def before(call: str, key: str) -> None:
        if (call, key) == ("delete", pack_key(rig.pack)):
            rig.objects.before = lambda call, key: None
            lists.extend(rig.keys(CONDEMNED))
            with monkeypatch.context() as patch, pytest.raises(UnknownFormat, match="use a newer vmfs-stub"):
                patch.setattr(condemned, "LIST_FEATURES_KNOWN", frozenset())
                commit(writer, segments, len(DISK))

    rig.objects.before = before
    rig.collect(sleep=lambda seconds: writer.renew_lease())
    assert len(lists) == 1
    assert b"retired" not in encode_condemned(Condemned(frozenset({rig.pack})), "nonce")


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


def test_what_is_sound_of_a_damaged_pack_is_copied_once() -> None:
    """However many runs meet the damage before scrub does: copies are in packs of which all counts as needed."""
    data = random.Random(1).randbytes(16 * CHUNK)
    rig = Rig()
    with closing(ChunkIndex(None, rig.store.id)) as index:
        old = back_up(rig.store, {"disk": data}, index=index)
        keeps = back_up(rig.store, {"disk": data[:CHUNK] + data[9 * CHUNK : 10 * CHUNK]}, index=index)
    rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
    sound, bad = rig.refs(keeps)
    pack, at = rig.objects.contents[pack_key(bad.pack_id)], bad.offset + 50
    rig.objects.contents[pack_key(bad.pack_id)] = pack[:at] + bytes([pack[at] ^ 1]) + pack[at + 1 :]
    for day in range(3):
        other = random.Random(100 + day).randbytes(8 * CHUNK)
        with closing(ChunkIndex(None, rig.store.id)) as index:
            gone = back_up(rig.store, {"disk": other}, index=index)
            back_up(rig.store, {"disk": other[:CHUNK]}, index=index)
        rig.store.forget(gone.vm_id, gone.point_id, host="host1", why="by hand")
        assert rig.collect().repacked == (2 if day == 0 else 1)
        footers = [ref for name in rig.packs() for ref in read_footer(rig.store.objects, name)]
        assert sum(ref.chunk_id == sound.chunk_id for ref in footers) == 2
    assert bad.pack_id in rig.packs()


@pytest.mark.parametrize("error", [StoreFull, StoreDenied])
def test_where_nothing_can_be_stored_it_stays_and_garbage_goes(
    rig: Rig, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    garbage = "packs/ab/" + "ab" * 16
    rig.objects.contents[garbage] = b"of nobody"

    def refuse(call: str, key: str) -> None:
        if call == "put" and key.startswith(PACKS):
            raise error("there is no room")

    rig.objects.before = refuse
    done = rig.collect()
    assert (done.packs, done.repacked) == (1, 0)
    assert rig.packs() == [rig.pack]
    assert rig.keys(LEASES) == []
    assert "packs that are mostly garbage stay as they are: there is no room" in caplog.text


def test_a_list_that_cannot_be_read_is_in_the_way_of_repacking_alone(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a newer version, or damaged: which packs are about to go is not known."""
    garbage, listed = "packs/ab/" + "ab" * 16, CONDEMNED + new_id()
    rig.objects.contents[garbage] = b"of nobody"
    for data in (b"?", documents.encode(CONDEMNED_FORMAT, CONDEMNED_VERSION + 1, {})):
        rig.store.objects.put(listed, data, if_absent=False)
        caplog.clear()
        assert rig.collect(is_dry=True).packs == 1
        assert "which packs are mostly garbage cannot be told" in caplog.text
    assert rig.collect().repacked == 0
    assert "packs that are mostly garbage stay as they are" in caplog.text
    assert rig.packs() == [rig.pack]
    assert listed in rig.keys(CONDEMNED)


def test_what_is_no_list_of_ours_is_in_the_way_of_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.objects.contents[f"{CONDEMNED}README"] = b"of an operator"
    assert rig.collect().repacked == 1
    assert "list" not in caplog.text
    assert rig.keys(CONDEMNED) == [f"{CONDEMNED}README"]


def test_one_that_was_taken_for_dead_retires_nothing(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next run goes on with its copies, where they are."""

    def take_for_dead(call: str, key: str) -> None:
        if call == "put" and key.startswith(MOVED):
            rig.objects.contents |= {lease.replace(LEASES, "dead/"): b"" for lease in rig.keys(LEASES)}

    rig.objects.before = take_for_dead
    assert rig.collect().repacked == 0
    assert "packs that are mostly garbage stay as they are: this job stood still" in caplog.text
    rig.objects.before = lambda call, key: None
    assert rig.pack in rig.packs()
    done = rig.collect()
    assert (done.repacked, done.copied_bytes) == (1, 0)
    assert len(rig.keys(MOVED)) == 1
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_a_pack_that_another_collector_has_retired_is_no_damage(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def before(call: str, key: str) -> None:
        if (call, key) == ("get_range", pack_key(rig.pack)):
            rig.objects.before = lambda call, key: None
            assert rig.collect().repacked == 1

    rig.objects.before = before
    assert rig.collect().repacked == 0
    assert f"pack {rig.pack} is gone: another collector was quicker" in caplog.text
    assert "run scrub" not in caplog.text


@pytest.mark.parametrize("why", ["gone", "condemned", "quarantined", "damaged"])
def test_copies_that_do_not_count_are_made_again(
    rig: Rig, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def die(seconds: float) -> None:
        if rig.keys(MOVED):
            raise Killed

    with pytest.raises(Killed):
        rig.collect(sleep=die)
    (copy,) = set(rig.packs()) - {rig.pack}
    if why == "gone":
        del rig.objects.contents[pack_key(copy)]
    elif why == "condemned":
        rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(frozenset({copy})), "of another one"))
    elif why == "quarantined":
        put_quarantine(rig.store.objects, Quarantine(1.0, (), "seen"), copy)
    else:
        rig.objects.contents[pack_key(copy)] = damaged(rig.objects.contents[pack_key(copy)])
    done = rig.collect()
    assert ("what was moved is moved again" in caplog.text) == (why == "damaged")
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


@pytest.mark.parametrize("is_there", [True, False], ids=["damaged", "gone"])
def test_damage_of_a_copy_is_found_and_told(rig: Rig, is_there: bool) -> None:
    rig.collect()
    (new,) = rig.packs()
    sound = rig.objects.contents.pop(pack_key(new))
    if is_there:
        rig.objects.contents[pack_key(new)] = damaged(sound)
    report = rig.scrub()
    assert not report.is_whole
    needs = [need for damage in report.damages for need in damage.needs]
    assert {need.point_id for need in needs} == {rig.kept.point_id}


# What others do meanwhile


class Killed(BaseException):
    """Whoever makes the call does nothing more."""


def test_a_pack_that_frames_were_moved_to_is_not_retired(rig: Rig, tmp_path: Path) -> None:
    """Little is needed of it when it is chosen, as far as listings show; by way of another pack all of it is."""
    rig.collect()
    (copy,) = rig.packs()
    with closing(ChunkIndex(None, rig.store.id)) as index:
        newest = back_up(rig.store, {"disk": KEPT[:CHUNK]}, index=index)
    assert {ref.pack_id for ref in rig.refs(newest)} == {copy}
    writer = takes_over(rig)
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    made: list[Manifest] = []
    lists: list[str] = []
    plain_list = rig.objects.list
    rig.objects.list = lambda prefix: iter(()) if prefix == MOVED and len(lists) < 2 else plain_list(prefix)  # type: ignore[method-assign]

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith(CONDEMNED):
            lists.append(key)
            if len(lists) == 1:
                made.append(commit(writer, [rig.kept.files[0].segments[0]], len(KEPT)))

    rig.objects.before = before
    done = rig.collect(sleep=lambda seconds: writer.renew_lease())
    assert (len(lists), done.repacked) == (2, 0)
    assert done.copied_bytes > 0, "it was chosen"
    rig.assert_whole(newest, KEPT[:CHUNK], tmp_path / "newest")
    rig.assert_whole(made[0], KEPT, tmp_path / "made")


def test_a_document_that_came_after_the_last_look_does_not_count(rig: Rig) -> None:
    """A collector does not know of it, and is about to delete the pack that it names."""
    other = DISK[5 * CHUNK : 6 * CHUNK]
    late = back_up(rig.store, {"disk": other}, vm_name="late", index=rig.index)
    refs = rig.refs(late)
    with closing(ChunkIndex(None, rig.store.id)) as empty:
        mover = rig.store.begin_moves(index=empty)
        (new,) = write_chunks(mover, other)
        finish(mover)
    assert new is not None
    writer = rig.store.begin_backup(index=rig.index)
    entries = write_chunks(writer, other)
    finish(writer)
    segments = list(writer.add_file(entries))
    rig.store.forget(late.vm_id, late.point_id, host="host1", why="by hand")

    def both_live(seconds: float) -> None:
        writer.renew_lease()
        mover.renew_lease()

    assert rig.collect(sleep=both_live).repacked == 1
    assert rig.pack not in rig.packs() and new.pack_id in rig.packs()

    def die(call: str, key: str) -> None:
        if (call, key) == ("delete", pack_key(new.pack_id)):
            raise Killed

    def collector_was_quick(call: str, key: str) -> None:
        if (call, key) == ("list", moved_of(rig.pack)):
            rig.objects.before = die
            with pytest.raises(Killed):
                rig.collect(sleep=lambda seconds: writer.renew_lease())
            rig.objects.before = lambda call, key: None
            moves = [Move(refs[0].offset, new.pack_id, new.offset, new.length)]
            rig.store.objects.put(moved_key(rig.pack, "ab" * 16), encode_moved(moves, rig.pack, "ab" * 16))

    rig.objects.before = collector_was_quick
    with pytest.raises(StoreConflict):
        commit(writer, segments, CHUNK)


def test_a_document_that_went_before_the_lists_were_read_does_not_count(rig: Rig) -> None:
    rig.collect()
    writer = takes_over(rig)
    seen: list[str] = []

    def before(call: str, key: str) -> None:
        if (call, key) == ("list", moved_of(rig.pack)):
            seen.append(key)
        if (call, key) == ("list", CONDEMNED) and seen:
            for document in rig.keys(MOVED):  # by one that took its last look before, and whose list has gone
                del rig.objects.contents[document]

    rig.objects.before = before
    with pytest.raises(StoreConflict):
        commit(writer, [rig.kept.files[0].segments[0]], len(KEPT))
    assert rig.keys(MOVED) == []


def test_a_list_stays_until_what_is_noted_of_its_packs_is_gone(rig: Rig) -> None:
    """Its collector may yet delete that; another one sees that a backup needs it, which must not."""
    writer = rig.store.begin_backup(index=rig.index)
    entries = write_chunks(writer, KEPT)
    finish(writer)
    segments = list(writer.add_file(entries))
    rig.collect(sleep=lambda seconds: writer.renew_lease())
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    with closing(ChunkIndex(None, rig.store.id)) as index:
        back_up(rig.store, {"disk": KEPT}, index=index)  # so that the copies stay

    def die(call: str, key: str) -> None:
        if call == "delete" and key.startswith(MOVED):
            raise Killed

    rig.objects.before = die
    with pytest.raises(Killed):
        rig.collect(sleep=lambda seconds: writer.renew_lease())
    (listed,) = rig.keys(CONDEMNED)

    def other_collector(call: str, key: str) -> None:
        if (call, key) == ("list", CONDEMNED):
            rig.objects.before = lambda call, key: None
            rig.collect(sleep=lambda seconds: writer.renew_lease())
            assert rig.keys(MOVED), "it has seen what is pending"

    rig.objects.before = other_collector
    with pytest.raises(StoreConflict):
        commit(writer, segments, len(KEPT))
    assert listed in rig.keys(CONDEMNED)
    rig.collect()
    assert rig.keys(MOVED) == rig.keys(CONDEMNED) == []


@pytest.mark.parametrize("when", [("put", CONDEMNED), ("delete", PACKS)], ids=["before the last look", "after it"])
def test_what_is_noted_after_the_list_was_made_is_for_the_next_run(rig: Rig, when: tuple[str, str]) -> None:
    """Another collector may have deleted the list, since nothing was noted then; so a backup may count on it."""
    rig.collect()
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    late = moved_key(rig.pack, "ab" * 16)

    def before(call: str, key: str) -> None:
        if call == when[0] and key.startswith(when[1]) and late not in rig.objects.contents:
            rig.store.objects.put(late, encode_moved([Move(0, PackId("cd" * 16), 0, 100)], rig.pack, "ab" * 16))

    rig.objects.before = before
    rig.collect()
    assert rig.keys(MOVED) == [late]
    rig.objects.before = lambda call, key: None
    rig.collect()
    assert rig.keys(MOVED) == []


def test_copies_that_have_gone_meanwhile_do_not_count(rig: Rig, tmp_path: Path) -> None:
    """Another collector took its last look when nothing needed the pack; by now a backup does."""

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith(CONDEMNED) and rig.keys(MOVED):
            (copy,) = set(rig.packs()) - {rig.pack}
            del rig.objects.contents[pack_key(copy)]

    rig.objects.before = before
    assert rig.collect().repacked == 0
    assert rig.packs() == [rig.pack]
    rig.objects.before = lambda call, key: None
    assert rig.collect().repacked == 1
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_copies_that_were_found_damaged_meanwhile_do_not_count(rig: Rig, tmp_path: Path) -> None:
    """Scrub has put them in quarantine; the pack is the only place where the frames are sound."""

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith(CONDEMNED) and rig.keys(MOVED):
            (copy,) = set(rig.packs()) - {rig.pack}
            rig.objects.contents[pack_key(copy)] = damaged(rig.objects.contents[pack_key(copy)])
            rig.scrub()
            assert rig.keys(QUARANTINED)

    rig.objects.before = before
    assert rig.collect().repacked == 0
    rig.objects.before = lambda call, key: None
    assert rig.pack in rig.packs()
    assert rig.collect().repacked == 1
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_no_document_is_put_again_that_collectors_have_deleted(rig: Rig, tmp_path: Path) -> None:
    """The answer is lost, and the mover taken for dead; another collector, which stood still, has yet to delete it."""
    deleted: list[str] = []

    def put(key: str, data: Buffer, *, if_absent: bool = True) -> None:
        plain_put(key, data, if_absent=if_absent)
        if key.startswith(MOVED) and not deleted:
            raise StoreUnavailable("the answer was lost")

    def collectors(seconds: float) -> None:
        deleted.extend(rig.keys(MOVED))
        for key in deleted:
            del rig.objects.contents[key]

    plain_put = rig.objects.put
    rig.objects.put = put  # type: ignore[method-assign]
    refs = rig.refs(rig.kept)
    store = Store.open(RetryingObjects(rig.objects, sleep=collectors), rig.source)
    with moving(store) as job:
        told = job.finish({rig.pack: [job.write(ref, raw) for ref, raw in zip(refs, store.fetch(refs), strict=True)]})
    assert len(deleted) == 1
    assert [*told[rig.pack]] == rig.keys(MOVED)
    assert not set(deleted) & set(rig.keys(MOVED))
    del rig.objects.contents[pack_key(rig.pack)]
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_a_damaged_segment_is_met_before_the_manifest(rig: Rig) -> None:
    """What it needs of a pack that is gone cannot be told; nothing of the backup stays."""
    rig.collect()
    writer = takes_over(rig)
    key = segment_key(rig.kept.files[0].segments[0])
    rig.objects.contents[key] = rig.objects.contents[key][:-1] + b"\1"
    with pytest.raises(StoreConflict):
        commit(writer, [rig.kept.files[0].segments[0]], len(KEPT))
    assert not [key for key in rig.objects.contents if key.endswith(PENDING_SUFFIX)]


def test_a_commit_reads_each_segment_once(rig: Rig) -> None:
    """However many packs are gone that it names."""
    data = random.Random(5).randbytes(20 * 4 * CHUNK)
    parts = [data[at : at + 4 * CHUNK] for at in range(0, len(data), 4 * CHUNK)]
    with closing(ChunkIndex(None, rig.store.id)) as index:
        olds = [back_up(rig.store, {"disk": part}, index=index) for part in parts]
        newest = back_up(rig.store, {"disk": b"".join(part[:CHUNK] for part in parts)}, index=index)
    for old in olds:
        rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
    assert rig.collect().repacked == 21
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(newest.vm_id, newest.point_id).chunks(0)
    writer.reuse_segment(*table.segment(0), chunk_count=table.chunk_count)
    rig.objects.calls.clear()
    commit(writer, list(newest.files[0].segments), 20 * CHUNK)
    assert len([key for call, key in rig.objects.calls if call == "get" and key.startswith(SEGMENTS)]) == 1


def test_a_pack_on_the_list_of_a_dead_collector_comes_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is needed of it: as long as it is there the list stays, and fails backups."""
    rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(retired=frozenset({rig.pack})), "dead"))
    writer, segments = refers_to_garbage(rig)
    (listed,) = rig.keys(CONDEMNED)
    data = rig.objects.contents.pop(listed)
    made = commit(writer, segments, len(DISK))
    rig.objects.contents[listed] = data
    monkeypatch.setattr(retirement, "CANDIDATES_MAX", 1)
    assert rig.collect().repacked == 1
    assert rig.keys(CONDEMNED) == []
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(made.vm_id, made.point_id).chunks(0)
    writer.reuse_segment(*table.segment(0), chunk_count=table.chunk_count)
    commit(writer, list(made.files[0].segments), len(DISK))


@pytest.mark.parametrize("why", ["quarantined", "many documents"])
def test_what_is_in_the_way_of_others_is_none_of_a_pack_on_an_old_list(rig: Rig, why: str, tmp_path: Path) -> None:
    """The list would stay for ever: a backup has needed what is on it, and all others would fail."""
    if why == "quarantined":
        put_quarantine(rig.store.objects, Quarantine(1.0, (), "seen"), rig.pack)
    else:
        for number in range(retirement.MOVED_BEFORE_MAX + 1):
            key = moved_key(rig.pack, f"{number:032x}")
            rig.store.objects.put(key, encode_moved([Move(0, PackId("ab" * 16), 0, 9)], rig.pack, f"{number:032x}"))
    assert rig.collect().repacked == 0
    rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(retired=frozenset({rig.pack})), "dead"))
    assert rig.collect().repacked == 1
    assert rig.keys(CONDEMNED) == []
    rig.assert_whole(rig.kept, KEPT, tmp_path / "before")
    again = commit(takes_over(rig), [rig.kept.files[0].segments[0]], len(KEPT))
    rig.assert_whole(again, KEPT, tmp_path / "after")


def test_what_is_sound_of_a_damaged_pack_on_an_old_list_can_be_used(rig: Rig, tmp_path: Path) -> None:
    """The list stays with the pack, since a frame is lost; a backup that needs another one need not fail for that."""
    content = DISK[6 * CHUNK : 7 * CHUNK]
    other = back_up(rig.store, {"disk": content}, index=rig.index)
    pack, at = rig.objects.contents[pack_key(rig.pack)], rig.refs(rig.kept)[0].offset + 50
    rig.objects.contents[pack_key(rig.pack)] = pack[:at] + bytes([pack[at] ^ 1]) + pack[at + 1 :]
    rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(retired=frozenset({rig.pack})), "dead"))
    assert rig.collect().repacked == 0
    assert rig.keys(CONDEMNED) and rig.pack in rig.packs()
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(other.vm_id, other.point_id).chunks(0)
    writer.reuse_segment(*table.segment(0), chunk_count=table.chunk_count)
    rig.assert_whole(commit(writer, list(other.files[0].segments), CHUNK), content, tmp_path / "out")


@pytest.mark.parametrize("is_killed", [False, True], ids=["at once", "by the next collector"])
def test_a_pack_that_was_retired_is_in_quarantine_no_more(rig: Rig, is_killed: bool) -> None:
    """Or a backup would take it for one that was lost, and of which nothing is to be had but what was repaired.

    It is under way, and refers to more than what was needed when the pack went: to what a point had that is gone.
    """
    put_quarantine(rig.store.objects, Quarantine(1.0, (), "seen"), rig.pack)
    rig.store.objects.put(CONDEMNED + new_id(), encode_condemned(Condemned(retired=frozenset({rig.pack})), "dead"))
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(rig.going.vm_id, rig.going.point_id).chunks(0)
    writer.reuse(entries := table.entries(0, table.chunk_count))
    segments = writer.begin_file()
    for segment in (*segments.extend(entries), *segments.close()):
        writer.put_segment(segment)

    def die(call: str, key: str) -> None:
        if call == "delete" and key.startswith(QUARANTINED):
            raise Killed

    if is_killed:
        rig.objects.before = die
        with pytest.raises(Killed):
            rig.collect(sleep=lambda seconds: writer.renew_lease())
        rig.objects.before = lambda call, key: None
        assert rig.keys(QUARANTINED)
    rig.collect(sleep=lambda seconds: writer.renew_lease())
    assert rig.pack not in rig.packs()
    assert rig.keys(CONDEMNED) == rig.keys(QUARANTINED) == []
    with pytest.raises(StoreConflict):
        commit(writer, list(segments.ids), len(DISK))
    assert rig.scrub().damages == ()


def test_the_lease_lives_as_long_as_the_copying_takes() -> None:
    """Reading back, and a document for each pack, take long on a store that is far away."""
    rig = Rig()
    data = random.Random(5).randbytes(100 * 3 * CHUNK)
    parts = [data[at : at + 3 * CHUNK] for at in range(0, len(data), 3 * CHUNK)]
    with closing(ChunkIndex(None, rig.store.id)) as index:
        for part in parts:
            old = back_up(rig.store, {"disk": part}, index=index)
            rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
        back_up(rig.store, {"disk": b"".join(part[:CHUNK] for part in parts)}, index=index)
    now_s, renewed_s = 0.0, [0.0]

    def before(call: str, key: str) -> None:
        nonlocal now_s
        now_s += 0.5
        if key.startswith(LEASES) and call in ("put", "delete"):
            renewed_s.append(now_s)

    rig.objects.before = before
    assert rig.collect(clock=lambda: now_s).repacked == 101
    gaps = [later - earlier for earlier, later in pairwise(renewed_s[1:])]
    assert len(gaps) > 3
    assert max(gaps) < LEASE_DEAD_S / 2


# Many packs, and what is in the way of some


def test_garbage_goes_before_anything_is_copied(rig: Rig) -> None:
    garbage = "packs/ab/" + "ab" * 16
    rig.objects.contents[garbage] = b"of nobody"

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith((PACKS, LEASES)):
            assert garbage not in rig.objects.contents
            raise StoreUnavailable("the store is away")

    rig.objects.before = before
    done = rig.collect()
    assert (done.packs, done.repacked) == (1, 0)


def test_a_segment_that_cannot_be_read_is_in_the_way_of_its_own_packs_alone(rig: Rig) -> None:
    data = random.Random(6).randbytes(8 * CHUNK)
    with closing(ChunkIndex(None, rig.store.id)) as index:
        old = back_up(rig.store, {"disk": data}, index=index)
        back_up(rig.store, {"disk": data[:CHUNK]}, index=index)
    rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
    key = segment_key(rig.kept.files[0].segments[0])

    def sleep(seconds: float) -> None:
        if seconds == 1 and not rig.keys(CONDEMNED):  # after the first look, which has kept what it names
            rig.objects.contents[key] = rig.objects.contents[key][:-1] + b"\1"

    assert rig.collect(sleep=sleep).repacked == 1
    assert rig.pack in rig.packs()


def test_what_is_pending_and_never_will_be_committed_is_in_the_way_of_nothing(rig: Rig, tmp_path: Path) -> None:
    """It takes over a segment that has just been deleted, and stands still before it finds out."""
    writer = rig.store.begin_backup(index=rig.index)
    table = rig.store.open_point(rig.going.vm_id, rig.going.point_id).chunks(0)
    writer.reuse_segment(*table.segment(0), chunk_count=table.chunk_count)

    def stand_still(call: str, key: str) -> None:
        if (call, key) == ("list", CONDEMNED):
            raise Killed

    def before(call: str, key: str) -> None:
        if (call, key) == ("delete", pack_key(rig.pack)):
            assert [name for name in rig.keys(MANIFESTS) if name.endswith(PENDING_SUFFIX)]
        if call == "list" and key == PACKS and segment_key(rig.going.files[0].segments[0]) not in rig.objects.contents:
            rig.objects.before = stand_still
            with pytest.raises(Killed):
                commit(writer, list(rig.going.files[0].segments), len(DISK))
            rig.objects.before = lambda call, key: None

    rig.objects.before = before
    assert rig.collect(sleep=lambda seconds: writer.renew_lease()).repacked == 1
    assert [name for name in rig.keys(MANIFESTS) if name.endswith(PENDING_SUFFIX)]
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


def test_what_is_not_held_in_memory_is_for_another_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(6).randbytes(8 * CHUNK)
    with closing(ChunkIndex(None, rig.store.id)) as index:
        old = back_up(rig.store, {"disk": data}, index=index)
        back_up(rig.store, {"disk": data[: 2 * CHUNK]}, index=index)
    rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
    monkeypatch.setattr(retirement, "FRAMES_AT_ONCE", 2)
    assert [rig.collect().repacked for _ in range(3)] == [1, 1, 0]


def test_likely_packs_are_dealt_with_batch_by_batch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are in doubt there is one batch in a run, of which each has the same chance."""
    monkeypatch.setattr(retirement, "PACKS_AT_ONCE", 1)
    monkeypatch.setattr(reachability, "PART_SIZE", CHUNK)
    datas = [random.Random(seed).randbytes(8 * CHUNK) for seed in range(4)]
    with closing(ChunkIndex(None, rig.store.id)) as index:
        olds = [back_up(rig.store, {"disk": data}, index=index) for data in datas]
        back_up(rig.store, {"disk": b"".join(data[:CHUNK] for data in datas[:2])}, index=index)
        for data in datas[2:]:
            for at in range(0, 8 * CHUNK, 2 * CHUNK):  # all of it is needed, by one segment a quarter
                back_up(rig.store, {"disk": data[at : at + 2 * CHUNK]}, index=index)
    for old in olds:
        rig.store.forget(old.vm_id, old.point_id, host="host1", why="by hand")
    assert rig.collect().repacked == 3, "the likely ones, and the first of the doubtful ones is not worth it"


def test_a_row_that_was_damaged_after_the_look_is_read_again(rig: Rig) -> None:
    """What a segment names is kept in a file: were it believed, less would seem to be needed than is."""
    rig.collect()  # the first point goes
    store = rig.store
    with closing(Reachability(None, store.id, store.objects, sealing=store.sealing, workers=1)) as known:
        known.look([key for key in rig.objects.contents if key.startswith(MANIFESTS)])
        known._database.execute("UPDATE objects SET named = x'' WHERE key LIKE 'segments/%'")
        found = [ref for _, refs in known.references({rig.pack}) for ref in refs or ()]
    assert len(found) == 2


# What scrub says of it


def copy_only(rig: Rig) -> None:
    """What is needed of the pack is moved, and the pack stays, since the replica is away."""

    def away(pack_id: PackId, documents: object) -> None:
        raise StoreUnavailable("away")

    rig.collect(mirror=away)
    assert rig.pack in rig.packs() and rig.keys(MOVED)


def without_the_pack(rig: Rig) -> None:
    """It was lost, not retired: of what is needed of it a part was moved."""
    copy_only(rig)
    back_up(rig.store, {"disk": DISK}, index=rig.index)
    del rig.objects.contents[pack_key(rig.pack)]


def test_scrub_tells_a_lost_pack_from_a_retired_one(rig: Rig) -> None:
    without_the_pack(rig)
    report = rig.scrub()
    assert not report.is_whole
    (damage,) = report.damages
    assert (damage.key, damage.frame_count, damage.repaired_count) == (pack_key(rig.pack), 6, 0)
    assert rig.keys(QUARANTINED)


def test_a_pack_that_was_retired_when_a_point_had_gone_is_not_marked(rig: Rig) -> None:
    """Some of it was moved when the round began, and the point needed more of it."""
    copy_only(rig)
    more = back_up(rig.store, {"disk": DISK}, index=rig.index)

    def before(call: str, key: str) -> None:
        if (call, key) == ("list", PACKS):  # it has been over manifests and segments
            rig.objects.before = lambda call, key: None
            rig.store.forget(more.vm_id, more.point_id, host="host1", why="by hand")
            assert rig.collect().repacked == 1

    rig.objects.before = before
    assert rig.scrub().damages == ()
    assert rig.pack not in rig.packs()
    assert rig.keys(QUARANTINED) == []


def test_a_pack_that_was_retired_after_it_was_found_damaged_is_not_marked_again(rig: Rig) -> None:
    """All that is needed of it is elsewhere; backups would take it for one of which perhaps nothing else is."""
    rig.collect()
    with closing(ScrubProgress(None, rig.store.id)) as progress:
        progress.passed(rig.pack, PackDamage(rig.pack, "seen", None))
        report = scrub(Store.open(rig.objects, rig.source), progress)
    assert report.is_whole
    assert [(damage.frame_count, damage.repaired_count) for damage in report.damages] == [(2, 2)]
    assert rig.keys(QUARANTINED) == []


def test_what_nothing_needs_of_a_retired_pack_may_lead_nowhere(rig: Rig) -> None:
    moves = [Move(0, PackId("ab" * 16), 0, 100)]
    rig.store.objects.put(moved_key(rig.pack, "cd" * 16), encode_moved(moves, rig.pack, "cd" * 16))
    assert rig.collect().repacked == 1
    assert rig.scrub().damages == ()
    assert rig.keys(QUARANTINED) == []


def damaged(pack: bytes) -> bytes:
    return pack[:60] + bytes([pack[60] ^ 1]) + pack[61:]


@pytest.mark.parametrize("is_first", [True, False], ids=["the copy comes after it", "the copy comes before it"])
def test_scrub_reads_copies_from_the_medium(is_first: bool) -> None:
    """Who needs a copy is known by way of the pack that is gone, whichever is dealt with first."""
    while True:
        rig = Rig()
        rig.collect()
        (copy,) = rig.packs()
        if (rig.pack[:2] < copy[:2]) is is_first:
            break
    bad = damaged(rig.objects.contents[pack_key(copy)])

    def drop_cache(key: str) -> None:
        if key == pack_key(copy):
            rig.objects.contents[key] = bad

    rig.objects.drop_cache = drop_cache  # type: ignore[attr-defined]
    report = rig.scrub()
    assert not report.is_whole
    assert {need.point_id for damage in report.damages for need in damage.needs} == {rig.kept.point_id}


def test_scrub_goes_back_to_what_was_moved_to_a_damaged_pack(rig: Rig) -> None:
    """It was stopped after the pack that is gone, which was sound elsewhere then."""
    rig.collect()
    (copy,) = rig.packs()
    with closing(ScrubProgress(None, rig.store.id)) as progress:
        progress.passed(PackId("0" * 32) if copy < rig.pack else rig.pack, None)
        rig.objects.contents[pack_key(copy)] = damaged(rig.objects.contents[pack_key(copy)])
        assert not scrub(Store.open(rig.objects, rig.source), progress).is_whole


def test_places_that_lead_nowhere_hide_no_good_one(rig: Rig, tmp_path: Path) -> None:
    rig.collect()
    for number in range(moved.PLACES_MAX + 1):
        moves = [Move(ref.offset, PackId(f"{number:032x}"), 0, ref.length) for ref in rig.refs(rig.kept)]
        key = moved_key(rig.pack, f"{number:032x}")
        rig.store.objects.put(key, encode_moved(moves, rig.pack, f"{number:032x}"))
    rig.objects.contents = dict(sorted(rig.objects.contents.items()))
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")


# With a replica


def replicated(replication: Replication, made: Manifest) -> None:
    """What a run does with one point."""
    manifest, segments = replication.look(made.vm_id, made.point_id)
    for segment_id in replication.missing(segments):
        copy = replication.read(segment_id)
        for pack_id in replication.lacks(copy.segment.packs):
            replication.copy_pack(pack_id)
        replication.put_segment(copy)
    replication.put_manifest(made.vm_id, made.point_id, manifest)


@contextmanager
def with_replica(rig: Rig, tmp_path: Path) -> Iterator[tuple[FakeObjects, Replication]]:
    """A new one, which has the newer point."""
    objects = FakeObjects()
    make_replica(rig.store, objects)
    replica = Store.open(objects, rig.source)
    with closing(ReadBack(tmp_path / "read-back", rig.store.id, "file:///there")) as read_back:
        replication = Replication(rig.store, replica, read_back)
        replicated(replication, rig.kept)
        yield objects, replication


@pytest.fixture
def there(rig: Rig, tmp_path: Path) -> Iterator[tuple[FakeObjects, Replication]]:
    with with_replica(rig, tmp_path) as made:
        yield made


def test_a_replica_that_is_made_later_gets_the_copies(rig: Rig, tmp_path: Path) -> None:
    rig.collect()
    with with_replica(rig, tmp_path) as (objects, _):
        replica = Store.open(objects, rig.source)
        restore_point(replica, replica.open_point(rig.kept.vm_id, rig.kept.point_id), tmp_path / "out")
    assert (tmp_path / "out/disk").read_bytes() == KEPT


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


def test_what_was_retired_without_the_replica_goes_from_there_with_what_is_noted_of_it(
    rig: Rig, there: tuple[FakeObjects, Replication]
) -> None:
    """By a host that does not know of it; so its points need the pack there, until they are forgotten."""
    objects, replication = there
    assert rig.collect().repacked == 1
    mirrored = MirroredDeletes(rig.store.objects, objects)
    rig.collect(mirror=replication.copy_moves, objects=mirrored)
    assert pack_key(rig.pack) in objects.contents
    rig.store.forget(rig.kept.vm_id, rig.kept.point_id, host="host1", why="by hand")
    rig.collect(mirror=replication.copy_moves, objects=mirrored)
    assert not [key for key in objects.contents if key.startswith(PACKS)]


def test_without_the_replica_nothing_is_repacked(
    rig: Rig, there: tuple[FakeObjects, Replication], caplog: pytest.LogCaptureFixture
) -> None:
    objects, replication = there

    def away(call: str, key: str) -> None:
        raise StoreUnavailable("the replica is away")

    objects.before = away
    assert rig.collect(mirror=replication.copy_moves).repacked == 0
    assert rig.pack in rig.packs()
    told = f"pack {rig.pack} stays, the replica does not have what was moved of it: the replica is away"
    assert told in caplog.text


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


def test_no_listing_decides_what_the_replica_gets(
    rig: Rig, there: tuple[FakeObjects, Replication], tmp_path: Path
) -> None:
    """It may not show yet what was just put."""
    objects, replication = there
    hidden: set[str] = set()
    plain_list, plain_put = rig.objects.list, rig.objects.put

    def put(key: str, data: Buffer, *, if_absent: bool = True) -> None:
        plain_put(key, data, if_absent=if_absent)
        hidden.add(key)

    rig.objects.put = put  # type: ignore[method-assign]
    rig.objects.list = lambda prefix: (each for each in plain_list(prefix) if each.key not in hidden)  # type: ignore[method-assign]
    mirrored = MirroredDeletes(rig.store.objects, objects)
    done = rig.collect(mirror=replication.copy_moves, objects=mirrored, sleep=lambda seconds: hidden.clear())
    assert done.repacked == 1
    replica = Store.open(objects, rig.source)
    restore_point(replica, replica.open_point(rig.kept.vm_id, rig.kept.point_id), tmp_path / "out")
    assert (tmp_path / "out/disk").read_bytes() == KEPT


@pytest.mark.parametrize("is_there", [True, False], ids=["and is about to go", "and has gone"])
def test_a_point_that_needs_more_than_the_collector_saw_is_whole_in_the_replica(
    rig: Rig, there: tuple[FakeObjects, Replication], is_there: bool, tmp_path: Path
) -> None:
    """It counts on what another one has moved.  The replica was seen to have the pack, which goes from there, too."""
    objects, replication = there
    begun, segments = refers_to_garbage(rig)
    refs = rig.refs(rig.going)
    made: list[Manifest] = []
    moved_by: list[str] = []

    def sleep(seconds: float) -> None:
        begun.renew_lease()
        if rig.keys(CONDEMNED) and rig.keys(MOVED) and not moved_by:
            moved_by.append("another one")
            with moving(rig.store) as job:
                raws = rig.store.fetch(refs)
                job.finish({rig.pack: [job.write(ref, raw) for ref, raw in zip(refs, raws, strict=True)]})

    def before(call: str, key: str) -> None:
        if (call, key) == ("delete", pack_key(rig.pack)):
            rig.objects.before = lambda call, key: None
            made.append(commit(begun, segments, len(DISK)))
            if is_there:
                replicated(replication, made[0])

    rig.objects.before = before
    mirrored = MirroredDeletes(rig.store.objects, objects)
    assert rig.collect(mirror=replication.copy_moves, objects=mirrored, sleep=sleep).repacked == 1
    if not is_there:
        replicated(replication, made[0])
    rig.assert_whole(made[0], DISK, tmp_path / "store")
    replica = Store.open(objects, rig.source)
    restore_point(replica, replica.open_point(made[0].vm_id, made[0].point_id), tmp_path / "replica")
    assert (tmp_path / "replica/disk").read_bytes() == DISK


def test_what_was_moved_in_the_store_and_not_in_the_replica_does_not_count_there(
    rig: Rig, there: tuple[FakeObjects, Replication]
) -> None:
    """The pack is on a list; that the replica has it yet says nothing."""
    objects, replication = there
    copy_only(rig)
    segment = replication.read(rig.kept.files[0].segments[0])
    rig.store.objects.put(
        CONDEMNED + new_id(), encode_condemned(Condemned(retired=frozenset({rig.pack})), "of another")
    )
    plain_put = objects.put

    def put(key: str, data: Buffer, *, if_absent: bool = True) -> None:
        plain_put(key, b"?" if key.startswith(MOVED) else data, if_absent=if_absent)

    objects.put = put  # type: ignore[method-assign]
    with pytest.raises(CorruptPack, match="what was moved of it is not in the replica"):
        replication.put_segment(segment)
    objects.put = plain_put  # type: ignore[method-assign]
    replication.put_segment(segment)


def test_a_document_that_leads_nowhere_is_not_asked_of_the_replica(
    rig: Rig, there: tuple[FakeObjects, Replication]
) -> None:
    objects, replication = there
    moves = [Move(ref.offset, PackId("ab" * 16), 0, ref.length) for ref in rig.refs(rig.kept)]
    rig.store.objects.put(moved_key(rig.pack, "cd" * 16), encode_moved(moves, rig.pack, "cd" * 16))
    mirrored = MirroredDeletes(rig.store.objects, objects)
    assert rig.collect(mirror=replication.copy_moves, objects=mirrored).repacked == 1


def test_what_takes_the_place_of_the_replica_is_none(rig: Rig, there: tuple[FakeObjects, Replication]) -> None:
    """Another medium is mounted there after the copies were made."""
    objects, replication = there

    def before(call: str, key: str) -> None:
        if call == "put" and key.startswith(CONDEMNED):
            objects.contents.clear()

    rig.objects.before = before
    assert rig.collect(mirror=replication.copy_moves).repacked == 0
    assert rig.pack in rig.packs()


def test_copies_do_not_pile_up_where_the_replica_is_away(rig: Rig) -> None:
    def away(pack_id: PackId, documents: object) -> None:
        raise StoreUnavailable("away")

    counts = []
    for _ in range(3):
        assert rig.collect(mirror=away).repacked == 0
        counts.append((len(rig.packs()), len(rig.keys(MOVED))))
    assert counts == [(2, 1)] * 3
    assert rig.collect().repacked == 1


def test_a_copy_is_repaired_from_the_replica(rig: Rig, there: tuple[FakeObjects, Replication], tmp_path: Path) -> None:
    objects, replication = there
    mirrored = MirroredDeletes(rig.store.objects, objects)
    assert rig.collect(mirror=replication.copy_moves, objects=mirrored).repacked == 1
    (copy,) = rig.packs()
    rig.objects.contents[pack_key(copy)] = damaged(rig.objects.contents[pack_key(copy)])
    with closing(ScrubProgress(None, rig.store.id)) as progress:
        report = scrub(Store.open(rig.objects, rig.source), progress, replica=Store.open(objects, rig.source))
    assert report.is_whole
    assert [damage.repaired_count for damage in report.damages if damage.frame_count] == [1]
    rig.assert_whole(rig.kept, KEPT, tmp_path / "out")
