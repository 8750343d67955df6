"""Scrub finds each kind of damage, names who needs it, keeps to its rate, and goes on where it was stopped."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up, new_id

from vmfs_stub.core.errors import StoreDenied, StoreUnavailable, UnknownFormat
from vmfs_stub.core.ids import ChunkId, PackId, PlaceholderId, PointId
from vmfs_stub.services.rate import Rate
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.services.scrub_report import Damage, Need, ScrubReport
from vmfs_stub.store import frames
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.format import FRAME_HEADER
from vmfs_stub.store.keys import pack_key, segment_key
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.packs import OpenPack
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.store import Store

RANDOM = random.Random(12)
CHUNK = 64 * 1024
FRAME = CHUNK + FRAME_HEADER.size
DISK = RANDOM.randbytes(5 * CHUNK + 17)


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects, chunk_size=CHUNK)


def scrubbed(store: Store, path: Path | None = None, *, restart: bool = False, rate: Rate | None = None) -> ScrubReport:
    with closing(ScrubProgress(path, store.id, restart=restart)) as progress:
        return scrub(Store.open(store.objects), progress, rate=rate)


def keys(objects: FakeObjects, prefix: str) -> list[str]:
    return sorted(key for key in objects.contents if key.startswith(prefix))


def flip(objects: FakeObjects, key: str, at: int) -> None:
    data = bytearray(objects.contents[key])
    data[at] ^= 1
    objects.contents[key] = bytes(data)


def places(damage: Damage) -> list[tuple[str, str, int]]:
    return [(need.vm_name, need.path, need.chunk_count) for need in damage.needs]


def pin() -> Pin:
    return Pin(PlaceholderId(new_id()), "host1", "vms", 1.0, new_id())


def test_a_whole_store_is_whole(store: Store, objects: FakeObjects) -> None:
    first = back_up(store, {"disk.raw": DISK + bytes(CHUNK), "empty": b""})
    back_up(store, {"disk.raw": DISK}, vm_id=first.vm_id)
    done: list[int] = []
    with closing(ScrubProgress(None, store.id)) as progress:
        report = scrub(store, progress, advance=done.append)
    assert report.is_whole
    assert (report.point_count, report.segment_count, report.pack_count, report.damages) == (2, 2, 2, ())
    assert sum(done) == sum(len(objects.contents[key]) for key in keys(objects, "packs/"))
    assert report.read_bytes > 5 * CHUNK


@pytest.mark.parametrize(
    ("spoil", "chunk_count", "repaired_count"),
    [
        (lambda pack: pack[:100] + bytes([pack[100] ^ 1]) + pack[101:], 1, 0),
        (lambda pack: pack[: 2 * FRAME] + bytes(2 * FRAME) + pack[4 * FRAME :], 2, 0),
        (lambda pack: pack[: len(pack) // 2], 4, 2),
        (lambda pack: b"", 6, 0),
        (lambda pack: None, 6, 0),
    ],
    ids=["bit", "two frames", "truncated", "emptied", "missing"],
)
def test_damage_of_a_pack_is_found_and_who_needs_it(
    store: Store, objects: FakeObjects, spoil: Callable[[bytes], bytes | None], chunk_count: int, repaired_count: int
) -> None:
    back_up(store, {"disk.raw": DISK, "other": DISK[:CHUNK]}, vm_name="a-vm")
    (key,) = keys(objects, "packs/")
    back_up(store, {"own": RANDOM.randbytes(CHUNK)}, vm_name="whole")
    spoilt = spoil(objects.contents.pop(key))
    if spoilt is not None:
        objects.contents[key] = spoilt
    report = scrubbed(store)
    (damage,) = report.damages
    assert not report.is_whole
    assert damage.key == key
    assert ("a-vm", "disk.raw", chunk_count) in places(damage)
    assert {need.vm_name for need in damage.needs} == {"a-vm"}
    assert (damage.frame_count, damage.repaired_count) == (chunk_count + repaired_count, repaired_count)


def test_pinned_points_are_named_first(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK}, vm_name="a-vm")
    pinned = back_up(store, {"disk.raw": DISK}, vm_name="z-vm", pins=[pin(), pin()])
    for key in keys(objects, "packs/"):
        flip(objects, key, FRAME + 50)
    (first, *_) = scrubbed(store).damages
    assert first.needs[0] == Need(pinned.vm_id, "z-vm", pinned.point_id, 2, "disk.raw", 1)


def test_a_damaged_segment_costs_its_chunks(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})
    (key,) = keys(objects, "segments/")
    for spoil in (lambda: flip(objects, key, 60), lambda: objects.contents.pop(key)):
        spoil()
        (damage,) = scrubbed(store).damages
        assert (damage.key, places(damage)) == (key, [("web1", "disk.raw", 6)])


def test_a_damaged_manifest_costs_the_point(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk.raw": DISK})
    back_up(store, {"disk.raw": DISK}, vm_id=made.vm_id)
    key = f"manifests/{made.vm_id}/{made.point_id}"
    flip(objects, key, 60)
    (damage,) = scrubbed(store).damages
    assert damage.key == key
    assert damage.needs == (Need(made.vm_id, "web1", made.point_id, 0, "", 0),)


def test_a_forgotten_point_counts_while_it_is_there(store: Store, objects: FakeObjects) -> None:
    """A placeholder may depend on it."""
    made = back_up(store, {"disk.raw": DISK})
    store.forget(made.vm_id, made.point_id, host="host", why="by hand")
    flip(objects, keys(objects, "packs/")[0], 100)
    assert not scrubbed(store).is_whole


def test_damage_that_nobody_needs_is_told_and_no_failure(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk.raw": DISK})
    del objects.contents[f"manifests/{made.vm_id}/{made.point_id}"]
    (key,) = keys(objects, "packs/")
    flip(objects, key, 100)
    report = scrubbed(store)
    assert report.is_whole
    assert [(damage.key, damage.needs) for damage in report.damages] == [(key, ())]


def test_what_is_deleted_while_it_looks_is_nobodys(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk.raw": DISK})

    def collect(call: str, key: str) -> None:
        if key.startswith("packs/"):
            for gone in (*keys(objects, "packs/"), f"manifests/{made.vm_id}/{made.point_id}"):
                objects.contents.pop(gone, None)

    objects.before = collect
    report = scrubbed(store)
    assert report.is_whole
    assert report.damages == ()


def three_points(store: Store) -> list[Manifest]:
    return [back_up(store, {"disk.raw": RANDOM.randbytes(CHUNK)}) for _ in range(3)]


def test_one_that_was_stopped_goes_on_where_it_was(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    three_points(store)
    first, second, _ = keys(objects, "packs/")
    flip(objects, first, 100)

    def stop(call: str, key: str) -> None:
        if key == second:
            raise StoreUnavailable(key)

    objects.before = stop
    with closing(ScrubProgress(tmp_path / "scrub", store.id)) as progress, pytest.raises(StoreUnavailable):
        scrub(store, progress, workers=1)
    objects.before = lambda call, key: None
    report = scrubbed(store, tmp_path / "scrub")
    assert report.pack_count == 2
    assert [damage.key for damage in report.damages] == [first], "what was found before is not lost"
    report = scrubbed(store, tmp_path / "scrub")
    assert (report.pack_count, report.is_whole) == (3, False), "a new round"


def test_a_restart_begins_anew(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    three_points(store)
    first, *_, last = keys(objects, "packs/")
    with closing(ScrubProgress(tmp_path / "scrub", store.id)) as progress:
        progress.passed(PackId(last.rpartition("/")[2]), None)
    assert scrubbed(store, tmp_path / "scrub", restart=True).pack_count == 3
    with closing(ScrubProgress(tmp_path / "scrub", store.id)) as progress:
        progress.passed(PackId(first.rpartition("/")[2]), None)
    assert scrubbed(store, tmp_path / "scrub").pack_count == 2


def test_packs_that_are_gone_since_are_no_loss(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    three_points(store)
    first, second, _ = keys(objects, "packs/")
    with closing(ScrubProgress(tmp_path / "scrub", store.id)) as progress:
        progress.passed(PackId(first.rpartition("/")[2]), None)
    for key in (first, second, *keys(objects, "manifests/")):
        objects.contents.pop(key)
    assert scrubbed(store, tmp_path / "scrub").damages == ()


@pytest.mark.parametrize("found", [b"not a database at all" * 300, b""])
def test_a_file_that_is_damaged_is_made_afresh(store: Store, tmp_path: Path, found: bytes) -> None:
    three_points(store)
    (tmp_path / "scrub").write_bytes(found)
    assert scrubbed(store, tmp_path / "scrub").pack_count == 3


def test_a_file_of_another_store_is_not_used(store: Store, objects: FakeObjects, tmp_path: Path) -> None:
    three_points(store)
    other = Store.create(FakeObjects(), chunk_size=CHUNK)
    with closing(ScrubProgress(tmp_path / "scrub", other.id)) as progress:
        progress.passed(PackId("f" * 32), None)
    assert scrubbed(store, tmp_path / "scrub").pack_count == 3
    with closing(sqlite3.connect(tmp_path / "scrub")) as database:
        assert database.execute("SELECT id FROM store").fetchone() == (store.id,)


def test_the_rate_is_kept(store: Store) -> None:
    """All that is read takes as long as it has to, by a clock that only sleeping moves on."""
    back_up(store, {"disk.raw": RANDOM.randbytes(300 * CHUNK)})
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    rate = Rate(1 << 20, clock=lambda: now, sleep=sleep)
    with closing(ScrubProgress(None, store.id)) as progress:
        report = scrub(store, progress, rate=rate, workers=1)
    last_read_s = 8
    assert report.read_bytes / (1 << 20) - last_read_s < now <= report.read_bytes / (1 << 20)
    assert now > 5


def test_a_store_that_does_not_answer_is_no_damage(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})

    def fail(call: str, key: str) -> None:
        if call == "get_range":
            raise StoreUnavailable(key)

    objects.before = fail
    with pytest.raises(StoreUnavailable):
        scrubbed(store)


def test_what_a_newer_version_wrote_is_not_judged(store: Store, objects: FakeObjects) -> None:
    made = back_up(store, {"disk.raw": DISK})
    from vmfs_stub.store import documents

    key = f"manifests/{made.vm_id}/{made.point_id}"
    objects.contents[key] = documents.encode("vmfs-stub manifest", 99, {})
    with pytest.raises(UnknownFormat):
        scrubbed(store)


def test_a_point_that_is_void_is_none(store: Store, objects: FakeObjects) -> None:
    from vmfs_stub.store.manifest import encode_void

    made = back_up(store, {"disk.raw": DISK})
    objects.contents[f"manifests/{made.vm_id}/{PointId(new_id())}"] = encode_void("nonce")
    assert scrubbed(store).point_count == 1


def test_what_came_wrong_once_is_no_damage(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})
    (key,) = keys(objects, "packs/")
    whole = objects.contents[key]
    reads = 0

    def spoil_first(call: str, asked: str) -> None:
        nonlocal reads
        if (call, asked) == ("get_range", key):
            reads += 1
            objects.contents[key] = whole[:-50] + b"?" * 50 if reads == 1 else whole

    objects.before = spoil_first
    assert scrubbed(store).damages == ()
    assert keys(objects, "quarantined/") == []
    assert reads > 2


def test_more_damage_than_is_looked_into_at_once(
    store: Store, objects: FakeObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmfs_stub.services.scrub.DAMAGED_AT_ONCE", 2)
    monkeypatch.setattr("vmfs_stub.services.scrub.DAMAGES_MAX", 4)
    monkeypatch.setattr("vmfs_stub.services.scrub_report.NEEDS_MAX", 1)
    for _ in range(5):
        content = RANDOM.randbytes(CHUNK)
        back_up(store, {"disk.raw": content, "same": content})
    for key in keys(objects, "packs/"):
        flip(objects, key, 100)
    report = scrubbed(store)
    assert [(len(damage.needs), damage.need_count) for damage in report.damages] == [(1, 2)] * 4
    assert report.more_damages == 1
    assert len(keys(objects, "quarantined/")) == 5


def test_damage_of_every_kind_is_told_together(store: Store, objects: FakeObjects) -> None:
    first, second, third = [back_up(store, {"disk.raw": RANDOM.randbytes(CHUNK)}) for _ in range(3)]
    flip(objects, f"manifests/{first.vm_id}/{first.point_id}", 30)
    (segment_id,) = second.files[0].segments
    assert segment_id is not None
    flip(objects, segment_key(segment_id), 30)
    (other_id,) = third.files[0].segments
    assert other_id is not None
    (pack_id,) = store.segments.load(other_id).packs
    flip(objects, pack_key(pack_id), 100)
    found = {damage.key.split("/")[0]: [need.point_id for need in damage.needs] for damage in scrubbed(store).damages}
    assert found == {
        "manifests": [first.point_id],
        "segments": [second.point_id],
        "packs": [third.point_id],
    }


def test_a_host_that_may_not_write_is_told_all_the_same(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})
    flip(objects, keys(objects, "packs/")[0], 100)

    def refuse(call: str, key: str) -> None:
        if call == "put":
            raise StoreDenied(key)

    objects.before = refuse
    assert places(scrubbed(store).damages[0]) == [("web1", "disk.raw", 1)]


def forged_pack(objects: FakeObjects, chunk_id: ChunkId, raw: bytes) -> str:
    """A pack that says of a frame that it is another chunk; all its checksums fit."""
    pack = OpenPack(PackId(new_id()))
    pack.add(frames.encode(memoryview(raw), chunk_id, into=memoryview(bytearray(FRAME))))
    key = pack_key(pack.pack_id)
    objects.contents[key] = bytes(pack.seal().data)
    return key


def test_a_frame_that_is_whole_but_another_chunk_is_found(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK})
    key = forged_pack(objects, ChunkId(blake3(DISK[:CHUNK]).digest()), DISK[CHUNK : 2 * CHUNK])
    (damage,) = scrubbed(store).damages
    assert damage.key == key
    assert "another chunk" in damage.problem


def test_a_copy_that_is_another_chunk_is_no_repair(store: Store, objects: FakeObjects) -> None:
    back_up(store, {"disk.raw": DISK[:CHUNK]})
    (key,) = keys(objects, "packs/")
    flip(objects, key, 100)
    forged_pack(objects, ChunkId(blake3(DISK[:CHUNK]).digest()), DISK[CHUNK : 2 * CHUNK])
    assert not scrubbed(store).is_whole
    assert keys(objects, "moved/") == []


def test_of_an_encrypted_store() -> None:
    """What is damaged is found, repaired from the copy that another host stored, and read by its key."""
    store = Store.create(objects := FakeObjects(), chunk_size=CHUNK, source=KEY_SOURCE)
    made = back_up(store, {"disk.raw": DISK}, vm_name="a-vm")
    with closing(ScrubProgress(None, store.id)) as progress:
        assert scrub(store, progress).is_whole
    (key,) = keys(objects, "packs/")
    index = ChunkIndex(None, store.id)
    copied = objects.contents.pop(key)
    for each in keys(objects, "index/"):
        del objects.contents[each]
    back_up(store, {"disk.raw": DISK}, index=index)  # knows nothing of the first one
    objects.contents[key] = copied
    flip(objects, key, 100)
    with closing(ScrubProgress(None, store.id)) as progress:
        report = scrub(store, progress)
    assert report.is_whole
    assert [(damage.key, damage.frame_count, damage.repaired_count) for damage in report.damages] == [(key, 1, 1)]
    table = Store.open(objects, KEY_SOURCE).open_point(made.vm_id, made.point_id).chunks(0)
    refs = [ref for ref in table.locate(0, table.chunk_count) if ref is not None]
    assert b"".join(Store.open(objects, KEY_SOURCE).fetch(refs)) == DISK
