"""Backup jobs on one store: dedup, the order of a commit, jobs at once, and garbage collection in between."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import back_up, finish, new_id, stored_file, write_chunks

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    AlreadyExists,
    CorruptFrame,
    CorruptManifest,
    ObjectMissing,
    PointNotFound,
    StoreConflict,
    StoreDenied,
    StoreUnavailable,
    WrongStore,
)
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.store import manifest, packs
from vmfs_stub.store.backup_writer import EncodedBatch
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keys import STORE_KEY, dead_key, segment_key
from vmfs_stub.store.leases import decode_lease
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.manifest import encode_void
from vmfs_stub.store.objects import ASKED_AT_ONCE, asked
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
RANDOM = random.Random(5)


@pytest.fixture
def store(objects: FakeObjects, source: KeySource | None) -> Store:
    return Store.create(objects, source=source)


def _read(store: Store, vm_id: VmId, point_id: PointId, number: int = 0) -> bytes:
    table = store.open_point(vm_id, point_id).chunks(number)
    found = b""
    for index, ref in enumerate(table.locate(0, table.chunk_count)):
        found += bytes(min(CHUNK, table.size - index * CHUNK)) if ref is None else store.fetch([ref])[0]
    return found


def _keys(objects: FakeObjects, prefix: str) -> list[str]:
    return sorted(key for key in objects.contents if key.startswith(prefix))


def test_what_was_backed_up_is_read(store: Store) -> None:
    content = RANDOM.randbytes(3 * CHUNK) + bytes(2 * CHUNK) + b"tail"
    made = back_up(store, {"disk": content, "empty": b"", "zeros": bytes(3 * CHUNK)})
    assert _read(store, made.vm_id, made.point_id) == content
    assert _read(store, made.vm_id, made.point_id, 1) == b""
    assert _read(store, made.vm_id, made.point_id, 2) == bytes(3 * CHUNK)
    assert made.files[2].segments == (None,)
    (point,) = store.points(made.vm_id)
    assert (point.point_id, point.vm_name, point.file_count) == (made.point_id, "web1", 3)
    assert point.size_bytes == len(content) + 3 * CHUNK


def test_more_than_one_segment(store: Store) -> None:
    content = b"start" + bytes(4096 * CHUNK * 2 - 5) + b"end"
    made = back_up(store, {"disk": content})
    segments = made.files[0].segments
    assert [found is None for found in segments] == [False, True, False]
    table = store.open_point(made.vm_id, made.point_id).chunks(0)
    refs = table.locate(4095, table.chunk_count)
    assert refs[:-1] == [None] * 4097
    assert refs[-1] is not None
    assert store.fetch([refs[-1]]) == [b"end"]
    with pytest.raises(ValueError, match="chunks"):
        table.locate(0, table.chunk_count + 1)


def test_equal_chunks_are_stored_once_within_a_job_and_across_vms(objects: FakeObjects, store: Store) -> None:
    chunk = RANDOM.randbytes(CHUNK)
    back_up(store, {"disk": chunk * 10, "other": chunk})
    assert sum(len(objects.contents[key]) for key in _keys(objects, "packs/")) < 2 * CHUNK
    before = _keys(objects, "packs/")
    second = back_up(store, {"copy": chunk * 10}, vm_name="db")
    assert _keys(objects, "packs/") == before
    assert len(_keys(objects, "segments/")) == 3  # each backup writes its own where it takes over none
    assert _read(store, second.vm_id, second.point_id) == chunk * 10


def test_frames_fill_several_packs(objects: FakeObjects, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_SIZE", 3 * CHUNK)
    content = RANDOM.randbytes(20 * CHUNK)
    made = back_up(store, {"disk": content})
    assert len(_keys(objects, "packs/")) == 10
    assert _read(store, made.vm_id, made.point_id) == content
    listed = [
        ref for key in _keys(objects, "packs/") for ref in packs.read_footer(objects, key.split("/")[-1], store.sealing)
    ]  # type: ignore[arg-type]
    assert len(listed) == 20


def test_encode_from_several_threads(store: Store) -> None:
    content = RANDOM.randbytes(64 * CHUNK)
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    with ThreadPoolExecutor(4) as executor:
        batches = executor.map(
            writer.encode, [content[at : at + 4 * CHUNK] for at in range(0, len(content), 4 * CHUNK)]
        )
        entries = [entry for batch in batches for entry in writer.append(batch).entries]
    finish(writer)
    assert b"".join(store.fetch([ref])[0] for ref in entries if ref) == content
    assert writer.counts.new_chunks == 64
    assert writer.counts.new_bytes == len(content)


def test_the_callers_buffer_may_be_used_again(store: Store) -> None:
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    buffer = bytearray(RANDOM.randbytes(2 * CHUNK))
    content = bytes(buffer)
    batch = writer.encode(buffer)
    buffer[:] = bytes(len(buffer))
    entries = writer.append(batch).entries
    finish(writer)
    assert b"".join(store.fetch([ref])[0] for ref in entries if ref) == content
    assert writer.append(writer.encode(memoryview(content))).entries == entries


def test_order_of_a_commit(objects: FakeObjects, store: Store) -> None:
    pin = Pin(PlaceholderId(new_id()), "host1", "images", 1.0)
    order: list[str] = []
    objects.before = lambda call, key: order.append(
        f"{call} {key.split('/')[0]}{'.pending' * key.endswith('.pending')}"
    )
    back_up(store, {"disk": RANDOM.randbytes(CHUNK)}, pins=[pin])
    steps = [
        "put leases",
        "put packs",
        "put segments",
        "put pins",
        "put manifests.pending",
        "list condemned",
        "size packs",
        "size segments",
        "put manifests",
        "delete manifests.pending",
        "put index",
        "delete leases",
    ]
    assert [step for step in order if step in steps] == steps
    # the planted fault: the same check on a wrong order fails
    assert [step for step in reversed(order) if step in steps] != steps


def test_a_commit_before_every_pack_is_put_is_refused(store: Store) -> None:
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = write_chunks(writer, RANDOM.randbytes(CHUNK))
    with pytest.raises(RuntimeError, match="pack"):
        _commit(store, writer, entries)  # type: ignore[arg-type]
    finish(writer)
    _commit(store, writer, entries)  # type: ignore[arg-type]


def _commit(store: Store, writer, entries, vm_id: str | None = None, pins=()):  # type: ignore[no-untyped-def]
    segments = writer.add_file(entries)
    size = len(entries) * CHUNK
    return writer.commit(
        vm_id=VmId(vm_id or new_id()),
        point_id=PointId(new_id()),
        vm_name="web1",
        host="h",
        files=[stored_file("disk", size, segments)],
        metadata={},
        pins=pins,
    )


def test_a_manifest_that_nobody_could_read_is_not_written(objects: FakeObjects, store: Store) -> None:
    for stored in (stored_file("../x", 0), stored_file("disk", CHUNK, ())):
        writer = store.begin_backup(index=ChunkIndex(None, store.id))
        with pytest.raises(CorruptManifest):
            writer.commit(
                vm_id=VmId(new_id()), point_id=PointId(new_id()), vm_name="x", host="h", files=[stored], metadata={}
            )
    assert _keys(objects, "manifests/") == []


def test_a_manifest_that_is_too_large_or_out_of_bounds_for_readers_is_not_written(
    objects: FakeObjects, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packs are there, but nobody would get at them: a placeholder of such a point would be lost."""
    monkeypatch.setattr(manifest, "MANIFEST_SIZE_MAX", 4096)
    too_long = [stored_file(f"{number:0200}", 0) for number in range(20)]
    for files in (too_long, [stored_file("x", 0, mtime_ns=manifest.TIME_NS_END)], [stored_file("x", 0, uid=-1)]):
        writer = store.begin_backup(index=ChunkIndex(None, store.id))
        with pytest.raises(CorruptManifest):
            writer.commit(
                vm_id=VmId(new_id()), point_id=PointId(new_id()), vm_name="x", host="h", files=files, metadata={}
            )
    assert {key.split("/")[0] for key in objects.contents} - {"keys"} == {STORE_KEY, "leases"}


@pytest.mark.parametrize("how", ["gone", "condemned"])
@pytest.mark.parametrize("what", ["pack", "segment"])
def test_reused_objects_that_are_being_collected_fail_the_commit(
    objects: FakeObjects, store: Store, how: str, what: str
) -> None:
    content = RANDOM.randbytes(2 * CHUNK)
    index = ChunkIndex(None, store.id)
    first = back_up(store, {"disk": content}, index=index)
    writer = store.begin_backup(index=index)
    entries = write_chunks(writer, content)
    assert writer.counts.reused_chunks == 2
    pin = Pin(PlaceholderId(new_id()), "host1", "images", 1.0)
    segments = writer.add_file(entries)
    key = _keys(objects, f"{what}s/")[0]
    if what == "segment":
        taken = store.open_point(first.vm_id, first.point_id).chunks(0)
        segment_id, segment = taken.segment(0)
        assert segment_id is not None
        key = segment_key(segment_id)
        writer.reuse_segment(segment_id, segment, chunk_count=2)
    if how == "gone":
        del objects.contents[key]
    else:
        names = {f"{what}s": frozenset([key.split("/")[-1]])}
        objects.put("condemned/" + "c" * 32, encode_condemned(Condemned(**names), "nonce"))  # type: ignore[arg-type]
    with pytest.raises(StoreConflict, match="run the job again"):
        writer.commit(
            vm_id=first.vm_id,
            point_id=PointId(new_id()),
            vm_name="web1",
            host="h",
            files=[stored_file("disk", len(content), segments)],
            metadata={},
            pins=[pin],
        )
    assert len(_keys(objects, "manifests/")) == 1
    assert _keys(objects, "pins/") == []
    if what == "pack":  # run again: the chunks are stored afresh
        again = back_up(store, {"disk": content}, index=index)
        assert _read(store, again.vm_id, again.point_id) == content


def test_a_store_that_fails_at_any_call_leaves_no_half_point(
    objects: FakeObjects, store: Store, source: KeySource | None
) -> None:
    """Fail the 1st, 2nd, 3rd… call until a backup completes: a listed point is always whole."""
    content = RANDOM.randbytes(2 * CHUNK)
    vm_id = new_id()
    for nth in range(100):
        remaining = [nth]

        def fail(call: str, key: str, remaining: list[int] = remaining) -> None:
            remaining[0] -= 1
            if remaining[0] == -1:
                raise StoreUnavailable(f"{call} {key}")

        objects.before = fail
        try:
            back_up(store, {"disk": content}, vm_id=vm_id)
            completed = True
        except StoreUnavailable:
            completed = False
        objects.before = lambda call, key: None
        for point in Store.open(objects, source).points(VmId(vm_id), with_damaged=True):
            assert _read(Store.open(objects, source), VmId(vm_id), point.point_id) == content
        if completed:
            break
    assert completed
    assert nth > 8


def test_two_jobs_at_once(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    store = Store.create(objects)
    index = ChunkIndex(tmp_path / "index.sqlite", store.id)
    shared = RANDOM.randbytes(20 * CHUNK)
    contents = [shared + RANDOM.randbytes(5 * CHUNK) for _ in range(4)]
    start = threading.Barrier(4)

    def job(content: bytes) -> tuple[VmId, PointId]:
        start.wait()
        made = back_up(store, {"disk": content}, index=index)
        return made.vm_id, made.point_id

    with ThreadPoolExecutor(4) as executor:
        made = list(executor.map(job, contents))
    for (vm_id, point_id), content in zip(made, contents, strict=True):
        assert _read(store, vm_id, point_id) == content
    index.close()
    objects.close()


def test_what_a_dead_writer_puts_is_not_used_by_the_next_job(objects: FakeObjects, store: Store) -> None:
    """It may be a late try, of a pack that one collector has deleted by now and another one is about to."""
    with closing(ChunkIndex(None, store.id)) as index:
        writer = store.begin_backup(index=index)
        objects.put(dead_key(writer.writer_id), b"")
        write_chunks(writer, bytes(range(256)) * 1024)
        with pytest.raises(StoreConflict, match="taken for dead"):
            finish(writer)
        again = store.begin_backup(index=index)
        write_chunks(again, bytes(range(256)) * 1024)
        assert again.counts.new_chunks > 0


def test_read_back_finds_what_the_medium_lost(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    store = Store.create(objects)
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = [ref for ref in write_chunks(writer, RANDOM.randbytes(40 * CHUNK)) if ref]
    finish(writer)
    writer.read_back(entries[::-1] + entries)
    (pack,) = [tmp_path / "store" / info.key for info in objects.list("packs/")]
    with pack.open("r+b") as opened:
        opened.seek(entries[17].offset + 1000)
        opened.write(b"damage")
    with pytest.raises(CorruptFrame, match=f"{entries[17].offset}"):
        writer.read_back(entries)
    writer.read_back(entries[:17])
    pack.unlink()
    with pytest.raises(ObjectMissing):
        writer.read_back(entries)
    objects.close()


def test_read_back_holds_little_of_what_compresses_well(objects: FakeObjects, store: Store) -> None:
    fetched: list[int] = []

    def fetch(refs: Sequence[FrameRef]) -> list[bytes]:
        raws = store.fetch(refs)
        fetched.append(sum(map(len, raws)))
        return raws

    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = []
    for first in range(0, 512, 64):
        entries += write_chunks(writer, b"".join(bytes([first % 251 + 1, each]) * (CHUNK // 2) for each in range(64)))
    finish(writer)
    writer._fetch = fetch
    writer.read_back([ref for ref in entries if ref])
    assert sum(fetched) == 512 * CHUNK
    assert max(fetched) <= 8 << 20 < sum(fetched)


def test_equal_segments_of_one_backup_are_put_once_and_of_two_under_two_names(
    objects: FakeObjects, store: Store
) -> None:
    content, index = RANDOM.randbytes(CHUNK), ChunkIndex(None, store.id)
    for number in (1, 2):
        objects.calls.clear()
        back_up(store, {"disk": content, "copy": content}, index=index)
        assert len([key for call, key in objects.calls if call == "put" and key.startswith("segments/")]) == 1
        assert len(_keys(objects, "segments/")) == number
    assert len({key.split("/")[-1][:64] for key in _keys(objects, "segments/")}) == 1


def test_a_backup_that_was_taken_for_dead_makes_no_point(objects: FakeObjects, store: Store) -> None:
    """Of its manifest and the collector's void one the first counts."""
    pin, vm_id = Pin(PlaceholderId(new_id()), "host1", "images", 1.0), VmId(new_id())

    def collect(call: str, key: str) -> None:
        if (call, key[:10]) == ("put", "manifests/") and not key.endswith(".pending"):
            objects.contents[key] = store.sealing.seal(encode_void("nonce"), key)

    objects.before = collect
    with pytest.raises(StoreConflict, match="taken for dead"):
        back_up(store, {"disk": RANDOM.randbytes(CHUNK)}, vm_id=vm_id, pins=[pin])
    objects.before = lambda call, key: None
    assert _keys(objects, "pins/") == []
    (void,) = _keys(objects, "manifests/")
    assert store.vms() == store.points(vm_id, with_damaged=True) == []
    with pytest.raises(PointNotFound, match="never ended"):
        store.open_point(vm_id, PointId(void.split("/")[-1]))


def test_a_backup_that_was_found_dead_before_it_had_anything_pending_commits_nothing(
    objects: FakeObjects, store: Store
) -> None:
    """It put a segment again that was deleted, and another collector was still about to delete that name."""
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    refs = write_chunks(writer, RANDOM.randbytes(CHUNK))
    finish(writer)
    objects.put(dead_key(writer.writer_id), b"")
    with pytest.raises(StoreConflict, match="taken for dead"):
        _commit(store, writer, refs)  # type: ignore[arg-type]
    assert _keys(objects, "manifests/") == []


def test_a_lease_is_there_while_a_backup_is_under_way(objects: FakeObjects, store: Store) -> None:
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    counters = []
    for _ in range(3):
        (key,) = _keys(objects, "leases/")
        counters.append(decode_lease(store.objects.get(key), key).counter)
        writer.renew_lease()
    assert counters == [0, 1, 2]
    refs = write_chunks(writer, RANDOM.randbytes(CHUNK))
    finish(writer)
    _commit(store, writer, refs)  # type: ignore[arg-type]
    assert {ref.pack_id[-16:] for ref in refs if ref} == {key.removeprefix("leases/")}
    assert _keys(objects, "leases/") == []


def test_a_lease_that_cannot_be_renewed_or_removed_fails_nothing(objects: FakeObjects, store: Store) -> None:
    writer = store.begin_backup(index=ChunkIndex(None, store.id))

    def refuse(call: str, key: str) -> None:
        if key.startswith("leases/"):
            raise StoreDenied("planted")

    objects.before = refuse
    writer.renew_lease()
    refs = write_chunks(writer, RANDOM.randbytes(CHUNK))
    finish(writer)
    _commit(store, writer, refs)  # type: ignore[arg-type]
    (key,) = _keys(objects, "leases/")
    objects.before = lambda call, key: None
    assert decode_lease(store.objects.get(key), key).counter == 0


def test_pins(store: Store) -> None:
    pin, other = (Pin(PlaceholderId(new_id()), "host1", "images", 1.0, nonce=new_id()) for _ in range(2))
    point = back_up(store, {"disk": b"x"}, pins=[pin, other])
    vm_id, point_id = point.vm_id, point.point_id
    assert {found.placeholder_id: found for found in store.pins(vm_id, point_id)} == {
        each.placeholder_id: each for each in (pin, other)
    }
    store.remove_pin(vm_id, point_id, other.placeholder_id)
    assert store.pins(vm_id, point_id) == [pin]
    for _ in range(2):  # what is gone already is fine
        store.remove_pin(vm_id, point_id, pin.placeholder_id)
    assert store.pins(vm_id, point_id) == []


def test_one_store_per_place(objects: FakeObjects) -> None:
    with pytest.raises(ObjectMissing):
        Store.open(objects)
    first = Store.open_or_create(objects)
    with pytest.raises(AlreadyExists):
        Store.create(objects)
    assert Store.open_or_create(objects).id == Store.open(objects).id == first.id


def test_another_store_in_its_place_is_told_from_a_race_with_garbage_collection(store: Store) -> None:
    store.check()
    other = Store.create(FakeObjects())
    moved = Store(other.objects, store.description, store.key)
    with pytest.raises(WrongStore, match=f"{other.id} lies where {store.id}"):
        moved.check()
    assert not issubclass(WrongStore, StoreConflict)


def test_a_damaged_manifest_hides_no_other_point(objects: FakeObjects, store: Store, source: KeySource | None) -> None:
    first = back_up(store, {"disk": b"x"})
    second = back_up(store, {"disk": b"y"}, vm_id=first.vm_id, vm_name="renamed")
    key = f"manifests/{first.vm_id}/{first.point_id}"
    objects.contents[key] = objects.contents[key][:-5]
    fresh = Store.open(objects, source)
    assert [point.point_id for point in fresh.points(first.vm_id)] == [second.point_id]
    assert {point.damaged is None for point in fresh.points(first.vm_id, with_damaged=True)} == {True, False}
    (vm,) = fresh.vms()
    assert (vm.name, len(vm.points)) == ("renamed", 2)
    with pytest.raises(CorruptManifest, match=key):
        fresh.open_point(first.vm_id, first.point_id)


def test_a_manifest_under_another_name_is_refused(objects: FakeObjects, store: Store) -> None:
    made = back_up(store, {"disk": b"x"})
    other = PointId(new_id())
    whole = objects.contents[f"manifests/{made.vm_id}/{made.point_id}"]
    objects.contents[f"manifests/{made.vm_id}/{other}"] = whole
    with pytest.raises(CorruptManifest, match=r"is another one|another restore point"):
        store.open_point(made.vm_id, other)
    with pytest.raises(PointNotFound):
        store.open_point(made.vm_id, PointId(new_id()))


def test_pending_and_foreign_files_are_not_points(objects: FakeObjects, store: Store) -> None:
    vm_id, point_id = new_id(), new_id()
    objects.contents[f"manifests/{vm_id}/{point_id}.pending"] = b"x"
    objects.contents["manifests/README"] = b"x"
    objects.contents[f"manifests/{vm_id}/lost+found"] = b"x"
    assert store.vms() == []
    assert store.points(VmId(vm_id), with_damaged=True) == []


def test_fetch_reads_once_and_refuses_what_is_not_one_pack(objects: FakeObjects, store: Store) -> None:
    made = back_up(store, {"disk": RANDOM.randbytes(8 * CHUNK)})
    refs = [ref for ref in store.open_point(made.vm_id, made.point_id).chunks(0).locate(0, 8) if ref]
    objects.calls.clear()
    assert len(store.fetch(refs[::2])) == 4
    assert len(objects.calls) == 1
    assert store.fetch([]) == []
    with pytest.raises(ValueError, match="ascending"):
        store.fetch(refs[::-1])


def test_batches_of_references_and_zeros_reuse_and_are_checked(objects: FakeObjects, store: Store) -> None:
    """A caller that knows what is unchanged hands in references; they count as used at the commit."""
    content = RANDOM.randbytes(2 * CHUNK)
    first = back_up(store, {"disk": content})
    refs = store.open_point(first.vm_id, first.point_id).chunks(0).locate(0, 2)
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = writer.append(EncodedBatch((*refs, None))).entries
    entries += write_chunks(writer, RANDOM.randbytes(3 * CHUNK), batch_chunks=1)
    finish(writer)
    made = _commit(store, writer, entries)
    assert _read(store, made.vm_id, made.point_id)[: 3 * CHUNK] == content + bytes(CHUNK)
    (pack_id,) = {ref.pack_id for ref in refs if ref}
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    entries = writer.append(EncodedBatch(tuple(refs))).entries
    del objects.contents[f"packs/{pack_id[:2]}/{pack_id}"]
    with pytest.raises(StoreConflict):
        _commit(store, writer, entries)


def test_many_are_asked_for_at_a_time() -> None:
    """A commit asks for each pack of a disk; of a store that is far away every answer takes its time."""
    together = threading.Barrier(ASKED_AT_ONCE, timeout=20)

    def answer(number: int) -> int:
        if number < ASKED_AT_ONCE:  # one by one, which shows that it is far away
            time.sleep(0.002)
        else:
            together.wait()
        return number * 2

    def fail(number: int) -> int:
        raise StoreUnavailable("it is away")

    assert asked(answer, range(2 * ASKED_AT_ONCE)) == [2 * number for number in range(2 * ASKED_AT_ONCE)]
    assert asked(lambda number: number, range(3)) == [0, 1, 2]
    with pytest.raises(StoreUnavailable):
        asked(fail, range(ASKED_AT_ONCE + 1))


def test_a_store_that_answers_at_once_is_not_asked_in_threads() -> None:
    threads = asked(lambda number: threading.get_ident(), range(10 * ASKED_AT_ONCE))
    assert threads == [threading.get_ident()] * 10 * ASKED_AT_ONCE
