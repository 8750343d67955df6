"""One suite for every mover: what is copied can be read back, and what goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing
from store_points import KEY_SOURCE

from vmfs_stub.core.chunking import FrameRef, chunk_count
from vmfs_stub.core.errors import (
    CorruptFrame,
    MoverLost,
    PointNotFound,
    PrimaryIOError,
    StoreConflict,
    StoreError,
    StoreUnavailable,
)
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.core.origin import Origin
from vmfs_stub.mover import client
from vmfs_stub.mover.client import PARTS_AHEAD, ProcessMover, _Window, open_mover
from vmfs_stub.mover.lock import MoverLock
from vmfs_stub.mover.messages import MoverSettings
from vmfs_stub.mover.priority import NICE, NICEST
from vmfs_stub.mover.process import MoverProcess
from vmfs_stub.primary.aside_file import lay_out, make_nameless, mark, marks_offset
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.local_mover import LocalMover
from vmfs_stub.services.mover import FETCHES_AT_ONCE, Content, CopyOrder, Mover, Part, PointFile, PointOrder
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.fallback import Fallback, ReplicatedStore
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keys import CONDEMNED
from vmfs_stub.store.manifest import FileKind, StoredFile
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.replica import Replication, make_replica
from vmfs_stub.store.store import Store

CHUNK = 64 << 10
VM, PIN = VmId("1" * 32), Pin(PlaceholderId("3" * 32), "host", "vms", 1.0, "nonce")
NOISE = random.Random(3).randbytes(5 * CHUNK + 1000)


@dataclass
class Place:
    """A store, a file, and how to have a mover between them."""

    base: Path
    kind: str
    store: Store
    guests: GuestActivity = field(default_factory=GuestActivity)
    replica: Store | None = None

    def add_replica(self) -> Store:
        """For movers that are made later."""
        make_replica(self.store, open_objects(self.replica_at, create=True))
        self.replica = Store(open_objects(self.replica_at), self.store.description, self.store.key)
        return self.replica

    @property
    def replica_at(self) -> StoreAt:
        return StoreAt((self.base / "replica").as_uri(), retries_max=0, timeout_s=30, transfer_timeout_s=30)

    def begin_replication(self) -> Replication:
        assert self.replica is not None
        return Replication(self.store, self.replica, ReadBack(None, self.store.id, self.replica_at.url))

    @property
    def path(self) -> Path:
        return self.base / "disk.img"

    @property
    def lock_path(self) -> Path:
        return self.base / "mover.lock"

    def mover(self) -> AbstractAsyncContextManager[Mover]:
        return self.process() if self.kind == "process" else self._local()

    @asynccontextmanager
    async def _local(self) -> AsyncIterator[Mover]:
        threads = Threads(files_max=4, store_max=4, compute_max=2, store_timeout_s=30, transfer_timeout_s=30)
        index = ChunkIndex(self.base / "index.sqlite", self.store.id)
        try:
            replicated = None
            if self.replica is not None:
                replicated = ReplicatedStore(self.store, self.replica, Fallback(patience_s=30))
            yield LocalMover(
                files=FileCalls(),
                threads=threads,
                store=self.store,
                chunk_index=index,
                workers=2,
                reading=replicated,
                begin_replication=self.begin_replication,
            )
        finally:
            threads.close()
            index.close()

    def settings(self) -> MoverSettings:
        return MoverSettings(
            store=StoreAt((self.base / "store").as_uri(), retries_max=0, timeout_s=30, transfer_timeout_s=30),
            store_description=self.store.description,
            store_key=self.store.key,
            index_path=self.base / "index.sqlite",
            workers=2,
            files_threads=4,
            store_threads=4,
            slot_bytes=8 * CHUNK,
            replica=None if self.replica is None else self.replica_at,
            read_back_path=self.base / "replica.sqlite",
        )

    @asynccontextmanager
    async def process(self) -> AsyncIterator[ProcessMover]:
        with closing(MoverLock(self.lock_path)) as lock:
            async with open_mover(self.settings(), self.guests, lambda error: None, lock=lock) as mover:
                yield mover


@pytest.fixture(params=["local", "process", "process-encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind, _, is_encrypted = request.param.partition("-")
    yield make_place(tmp_path, kind, source=KEY_SOURCE if is_encrypted else None)


def make_place(base: Path, kind: str, *, source: KeySource | None = None) -> Place:
    objects = open_objects(StoreAt((base / "store").as_uri()), create=True)
    return Place(base, kind, Store.create(objects, chunk_size=CHUNK, source=source))


def order(number: int) -> PointOrder:
    return PointOrder(VM, point_id(number), "vm", "host", {"inventory": "directory"}, [PIN])


def point_id(number: int) -> PointId:
    return PointId(f"{number:032x}")


def entry(size: int) -> PointFile:
    return PointFile(StoredFile("disk.img", FileKind.FILE, size, 0o600, 0, 0, 1, 1, {"user.a": b"b"}), copy=0)


async def told(*parts: Part | Exception) -> AsyncIterator[Part]:
    for part in parts:
        await trio.lowlevel.checkpoint()
        if isinstance(part, Exception):
            raise part
        yield part


def data(first: int, end: int) -> Part:
    return Part(Extent(first, end), Content.DATA)


async def back_up(place: Place, mover: Mover, number: int, *parts: Part, verify: bool = True) -> list[int]:
    """A whole backup of the file; returns what was told of progress."""
    size, told_bytes = place.path.stat().st_size, list[int]()
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with mover.backup() as backup:
            async with backup.copying(verify=verify) as copying:
                await copying.copy(fd, CopyOrder(size, "disk"), told(*parts), told_bytes.append)
            counts = await backup.commit(order(number), [entry(size)])
            assert counts.chunks == chunk_count(size, CHUNK)
    finally:
        os.close(fd)
    return told_bytes


def refs_of(store: Store, number: int) -> list[FrameRef | None]:
    table = store.open_point(VM, point_id(number)).chunks(0)
    return table.locate(0, table.chunk_count)


def content_of(store: Store, number: int) -> bytes:
    size = store.open_point(VM, point_id(number)).manifest.files[0].size
    raws = [bytes(CHUNK) if ref is None else store.fetch([ref])[0] for ref in refs_of(store, number)]
    return b"".join(raws)[:size]


async def test_what_is_set_aside_is_copied_from_there(place: Place) -> None:
    """The disk has been changed since, and is shorter now; what has no mark is the disk's."""
    content, files = NOISE + bytes(CHUNK), FileCalls()
    size = len(content)
    aside_fd = make_nameless(files, place.base)
    lay_out(files, aside_fd, size=size, chunk_size=CHUNK)
    for chunk in (1, 3, 4, 5, 6):
        os.pwrite(aside_fd, content[chunk * CHUNK : (chunk + 1) * CHUNK], chunk * CHUNK)
        mark(files, aside_fd, Extent(chunk, chunk + 1), size=size)
    place.path.write_bytes(content[:CHUNK] + bytes(CHUNK) + content[2 * CHUNK : 3 * CHUNK] + b"cut")
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover:
            for number, is_short in enumerate((False, True), start=1):
                with pytest.raises(PrimaryIOError) if is_short else nullcontext(), single_error():
                    async with mover.backup() as backup:
                        async with backup.copying(verify=False) as copying:
                            parts = told(data(0, 2), data(2, chunk_count(size, CHUNK)))
                            await copying.copy(fd, CopyOrder(size, "disk"), parts, lambda _: None, aside_fd=aside_fd)
                        await backup.commit(order(number), [entry(size)])
                # A chunk that is neither on the disk nor set aside is none of zeros.
                os.pwrite(aside_fd, b"\0", marks_offset(size) + 5)
    finally:
        os.close(fd)
        os.close(aside_fd)
    assert content_of(place.store, 1) == content


async def test_a_file_is_copied_as_it_is_told(place: Place) -> None:
    place.path.write_bytes(NOISE + bytes(3 * CHUNK) + NOISE)
    size = place.path.stat().st_size
    async with place.mover() as mover:
        zeros = Part(Extent(6, 8), Content.ZEROS)
        progress = await back_up(place, mover, 1, data(0, 6), zeros, data(8, chunk_count(size, CHUNK)))
        assert sum(progress) == size
    assert content_of(place.store, 1) == place.path.read_bytes()
    assert [pin.placeholder_id for pin in place.store.pins(VM, point_id(1))] == [PIN.placeholder_id]


async def test_restore_points_are_brought_into_the_replica(place: Place) -> None:
    place.path.write_bytes(NOISE)
    replica = place.add_replica()
    async with place.mover() as mover:
        for number in (1, 2):
            await back_up(place, mover, number, data(0, 6))
        copied = list[int]()
        await mover.replicate(VM, [point_id(1), point_id(2)], copied.append)
        assert sum(copied) == sum(info.size for info in replica.stored.list("packs/"))
        assert [content_of(replica, number) for number in (1, 2)] == [NOISE, NOISE]
        with pytest.raises(PointNotFound):
            await mover.replicate(VM, [point_id(3)], copied.append)
        # What comes back comes from there, if need be.
        refs = [ref for ref in refs_of(replica, 1) if ref is not None]
        shutil.rmtree(place.base / "store/packs")
        async with mover.fetch(refs[:2]) as raws:
            assert b"".join(bytes(raw) for raw in raws) == NOISE[: 2 * CHUNK]
        shutil.rmtree(place.base / "replica")
        with pytest.raises(StoreError):
            await mover.replicate(VM, [point_id(2)], copied.append)


async def test_replicating_can_be_given_up(place: Place) -> None:
    place.path.write_bytes(NOISE)
    replica = place.add_replica()
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        with trio.move_on_after(0.001):
            await mover.replicate(VM, [point_id(1)], lambda count: None)
        await mover.replicate(VM, [point_id(1)], lambda count: None)
        assert content_of(replica, 1) == NOISE


@pytest.mark.parametrize("verify", [False, True])
async def test_what_the_store_has_already_is_taken_over(place: Place, verify: bool) -> None:
    place.path.write_bytes(NOISE)
    size = len(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        place.path.write_bytes(b"x" * CHUNK + bytes(size - CHUNK))  # as in a placeholder: the rest is absent
        origin = Origin(place.store.id, VM, point_id(1), 0, size, CHUNK)
        await back_up(place, mover, 2, data(0, 1), Part(Extent(1, 6), Content.STORED, origin), verify=verify)
    assert content_of(place.store, 2) == b"x" * CHUNK + NOISE[CHUNK:]
    assert refs_of(place.store, 2)[1:] == refs_of(place.store, 1)[1:]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("first", [0, 1], ids=["a whole segment", "a part of one"])
async def test_what_is_condemned_and_nowhere_else_is_stored_afresh(place: Place, verify: bool, first: int) -> None:
    """The list of a collector that died stays as long as what is on it is needed, here by the first point."""
    place.path.write_bytes(NOISE)
    size = len(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        packs = frozenset(ref.pack_id for ref in refs_of(place.store, 1) if ref is not None)
        place.store.objects.put(CONDEMNED + "c" * 32, encode_condemned(Condemned(packs), "nonce"))
        place.path.write_bytes(b"x" * CHUNK * first + bytes(size - CHUNK * first))
        origin = Origin(place.store.id, VM, point_id(1), 0, size, CHUNK)
        parts = [*([data(0, first)] if first else []), Part(Extent(first, 6), Content.STORED, origin)]
        with pytest.raises(StoreConflict):  # it is known by deduplication as yet
            await back_up(place, mover, 2, *parts, verify=verify)
        progress = await back_up(place, mover, 2, *parts, verify=verify)
        assert sum(progress) == size
    assert content_of(place.store, 2) == b"x" * CHUNK * first + NOISE[CHUNK * first :]
    assert packs.isdisjoint(ref.pack_id for ref in refs_of(place.store, 2) if ref is not None)


async def test_a_segment_that_is_condemned_is_not_taken_over(place: Place) -> None:
    """Of a collector that died, as above; what it refers to is needed by others, and on no list."""
    place.path.write_bytes(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        segments = frozenset(one for one in place.store.open_point(VM, point_id(1)).manifest.files[0].segments if one)
        place.store.objects.put(CONDEMNED + "c" * 32, encode_condemned(Condemned(segments=segments), "nonce"))
        origin = Origin(place.store.id, VM, point_id(1), 0, len(NOISE), CHUNK)
        await back_up(place, mover, 2, Part(Extent(0, 6), Content.STORED, origin), verify=False)
    assert segments.isdisjoint(place.store.open_point(VM, point_id(2)).manifest.files[0].segments)
    assert refs_of(place.store, 2) == refs_of(place.store, 1)


async def test_parts_that_are_stored_do_not_hold_up_those_that_are_to_be_read() -> None:
    """Of a disk that has changed here and there several places are read at once; but the mover is not told of all."""
    window = _Window()
    with trio.fail_after(5):
        for _ in range(PARTS_AHEAD // 2):
            await window.enter(100 << 30)
            await window.enter(CHUNK)
    for dealt_with, is_room in ((1, False), (100 << 30, True), (CHUNK - 2, False), (1, True), (1 << 40, True)):
        window.dealt_with(dealt_with)
        with trio.move_on_after(0.01) as scope:
            await window.enter(CHUNK)
        assert scope.cancelled_caught != is_room


async def test_only_what_is_to_be_released_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path, "local")
    place.path.write_bytes(NOISE)
    read: list[int] = []
    read_back = BackupWriter.read_back

    def noted(self: BackupWriter, refs: Sequence[FrameRef]) -> None:
        read.append(len(refs))
        read_back(self, refs)

    monkeypatch.setattr(BackupWriter, "read_back", noted)
    async with place.mover() as mover:
        for number, verify in enumerate((False, True, True)):
            await back_up(place, mover, number, data(0, 6), verify=verify)
    assert read == [6, 6]  # stored by the first of them, and met again by both


async def test_several_files_and_entries_without_contents(place: Place) -> None:
    place.path.write_bytes(NOISE)
    files = [PointFile(StoredFile("d", FileKind.DIRECTORY, 0, 0o700, 0, 0, 1, 1))]
    files += [
        PointFile(StoredFile(f"d/{n}", FileKind.FILE, len(NOISE), 0o600, 0, 0, 1, 1), copy=n % 2) for n in range(150)
    ]
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover, mover.backup() as backup:
            async with backup.copying(verify=False) as copying:
                zeros = Part(Extent(0, 6), Content.ZEROS)
                for part in (data(0, 6), zeros):
                    await copying.copy(fd, CopyOrder(len(NOISE), "disk"), told(part), lambda count: None)
            await backup.commit(order(1), files)
    finally:
        os.close(fd)
    manifest = place.store.open_point(VM, point_id(1)).manifest
    assert [stored.path for stored in manifest.files] == [file.stored.path for file in files]
    assert manifest.files[1].segments == manifest.files[3].segments != manifest.files[2].segments == (None,)


async def test_parts_that_fail_leave_no_point_and_no_open_file(place: Place) -> None:
    place.path.write_bytes(NOISE)
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover:
            with pytest.raises(PrimaryIOError, match="planted"), single_error():
                async with mover.backup() as backup, backup.copying(verify=True) as copying:
                    parts = told(data(0, 2), PrimaryIOError("planted"))
                    await copying.copy(fd, CopyOrder(len(NOISE), "disk"), parts, lambda count: None)
            assert _holders(place.path) == {os.getpid()}
            await back_up(place, mover, 2, data(0, 6))
    finally:
        os.close(fd)
    assert place.store.point_counts() == {VM: 1}


async def test_a_file_that_is_shorter_than_told_is_an_error_of_the_file(place: Place) -> None:
    place.path.write_bytes(NOISE)
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover:
            with pytest.raises(PrimaryIOError, match="disk: reading it for the backup failed"), single_error():
                async with mover.backup() as backup, backup.copying(verify=True) as copying:
                    parts = told(data(0, 9))
                    await copying.copy(fd, CopyOrder(9 * CHUNK, "disk"), parts, lambda count: None)
    finally:
        os.close(fd)


async def test_a_backup_that_is_given_up_makes_nothing(place: Place) -> None:
    place.path.write_bytes(NOISE)
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover:
            with trio.CancelScope() as scope:
                async with mover.backup() as backup, backup.copying(verify=True) as copying:

                    async def endless() -> AsyncIterator[Part]:
                        yield data(0, 2)
                        scope.cancel()
                        await trio.sleep_forever()

                    await copying.copy(fd, CopyOrder(len(NOISE), "disk"), endless(), lambda count: None)
            assert scope.cancelled_caught
            assert _holders(place.path) == {os.getpid()}
    finally:
        os.close(fd)
    assert place.store.point_counts() == {}


async def test_a_backup_that_is_given_up_ends_its_lease(tmp_path: Path) -> None:
    """Else garbage collection would have to wait for it, and to mark its writer as dead for ever."""
    place = make_place(tmp_path, "process")
    async with place.process() as mover:
        async with mover.backup():
            assert len(list(place.store.objects.list("leases/"))) == 1
        with trio.fail_after(10):
            while list(place.store.objects.list("leases/")):  # noqa: ASYNC110
                await trio.sleep(0.02)  # the store is changed by another process


async def test_a_commit_that_is_given_up_leaves_no_pins(place: Place) -> None:
    """One that is over when it is given up has made its pins, which its owner removes; none comes after that."""
    place.path.write_bytes(NOISE)
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.mover() as mover:
            for number, delay_s in enumerate((0, 0.001, 0.004)):
                with trio.CancelScope() as scope:
                    async with mover.backup() as backup:
                        async with backup.copying(verify=False) as copying:
                            await copying.copy(fd, CopyOrder(len(NOISE), "disk"), told(data(0, 6)), lambda count: None)
                        scope.deadline = trio.current_time() + delay_s
                        await backup.commit(order(number), [entry(len(NOISE))])
                        scope.deadline = float("inf")
                place.store.remove_pin(VM, point_id(number), PIN.placeholder_id)
                if scope.cancelled_caught:
                    with trio.fail_after(30):
                        await _settled(place)
                        assert place.store.pins(VM, point_id(number)) == []
    finally:
        os.close(fd)


async def _settled(place: Place) -> None:
    """A commit that nobody waits for any more goes on by itself; it is over when nothing is pending."""
    for _ in range(20):
        await trio.sleep(0.02)
        while [info for info in place.store.objects.list("manifests/") if info.key.endswith(".pending")]:  # noqa: ASYNC110
            await trio.sleep(0.02)  # the store is changed by a thread, or another process


async def test_fetches_bring_verified_bytes(place: Place) -> None:
    place.path.write_bytes(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        refs = [ref for ref in refs_of(place.store, 1) if ref is not None]

        async def fetch(first: int) -> None:
            async with mover.fetch(refs[first : first + 2]) as raws:
                await trio.sleep(0.01)
                assert b"".join(bytes(raw) for raw in raws) == NOISE[first * CHUNK : (first + 2) * CHUNK]

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(fetch, number % 4)


async def test_a_fetch_of_what_is_damaged_or_gone_says_so(place: Place) -> None:
    place.path.write_bytes(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        refs = [ref for ref in refs_of(place.store, 1) if ref is not None]
        (pack,) = (place.base / "store/packs").rglob("*/*")
        damaged = bytearray(pack.read_bytes())
        damaged[refs[0].offset + 100] ^= 1
        pack.write_bytes(damaged)
        with pytest.raises(CorruptFrame):
            async with mover.fetch(refs[:1]):
                raise AssertionError("damaged bytes were handed out")
        async with mover.fetch(refs[1:2]) as raws:
            assert bytes(raws[0]) == NOISE[CHUNK : 2 * CHUNK]
        pack.unlink()
        with pytest.raises(StoreError):
            async with mover.fetch(refs[1:2]):
                raise AssertionError("bytes that are gone were handed out")


async def test_fetches_that_are_given_up_spoil_no_later_one(place: Place) -> None:
    place.path.write_bytes(NOISE)
    async with place.mover() as mover:
        await back_up(place, mover, 1, data(0, 6))
        refs = [ref for ref in refs_of(place.store, 1) if ref is not None]
        for number in range(30):
            with trio.move_on_after(0.0005 * (number % 5)):
                async with mover.fetch(refs[:2]):
                    await trio.sleep_forever()
            async with mover.fetch(refs[2:3]) as raws:
                assert bytes(raws[0]) == NOISE[2 * CHUNK : 3 * CHUNK]


def _descriptors() -> int:
    """How many this process has."""
    gc.collect()  # what earlier tests left is given back now, not in between
    return len(list(Path("/proc/self/fd").iterdir()))


def _holders(path: Path) -> set[int]:
    """Processes that have the file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(client, "PINGS_UNANSWERED_MAX", 100)  # a start on a busy machine is silent for a second


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_process_that_dies_or_hangs_fails_what_it_did_and_is_replaced(
    tmp_path: Path, impatient: None, number: signal.Signals
) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    fd = os.open(place.path, os.O_RDWR)
    try:
        async with place.process() as mover:
            await mover.wait_started()
            first = mover.pid
            assert first is not None
            with trio.fail_after(20), pytest.raises(MoverLost, match=f"process {first}"), single_error():
                async with mover.backup() as backup, backup.copying(verify=True) as copying:
                    for _ in range(3):
                        await copying.copy(fd, CopyOrder(len(NOISE), "disk"), told(data(0, 6)), lambda count: None)
                        os.kill(first, number)
            assert _holders(place.path) == {os.getpid()}
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            await back_up(place, mover, 2, data(0, 6))
            assert mover.pid != first
    finally:
        os.close(fd)
    assert content_of(place.store, 2) == NOISE


async def test_what_stores_do_not_answer_is_counted_beyond_the_process_that_met_it(
    tmp_path: Path, impatient: None
) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    away, there = tmp_path / "away", tmp_path / "store/manifests"
    async with place.process() as mover:
        await back_up(place, mover, 1, data(0, 6))
        assert mover.store_errors() == {}
        counts = [0]
        for number in (2, 3):
            there.rename(away)
            there.touch()
            with pytest.raises(StoreUnavailable), single_error():
                await back_up(place, mover, number, data(0, 6))
            there.unlink()
            away.rename(there)
            with trio.fail_after(10):
                while sum(mover.store_errors().values()) == counts[-1]:  # noqa: ASYNC110 - nobody is told
                    await trio.sleep(0.02)
            counts.append(sum(mover.store_errors().values()))
            await trio.sleep(0.2)  # more answers, which count nothing twice
            assert sum(mover.store_errors().values()) == counts[-1]
            first = mover.life()
            os.kill(first.process.pid, signal.SIGKILL)
            with trio.fail_after(10):
                while mover.life() is first:  # noqa: ASYNC110 - nobody is told
                    await trio.sleep(0.02)
        assert {place for place, _ in mover.store_errors()} == {"store"}
    assert counts[1] > 0
    assert counts[2] == 2 * counts[1]


async def test_a_mover_of_an_earlier_daemon_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path, "process")
    async with place.process() as earlier:
        with closing(MoverLock(place.lock_path)) as late:
            assert not late.take(), "the one that was started has the lock before it is asked for"
        await earlier.wait_earlier_gone()
    with closing(MoverLock(place.lock_path)) as left:
        assert left.take(), "it has gone, and the lock with it"
        monkeypatch.setattr(client, "EARLIER_WAIT_S", 0.2)
        async with place.process() as mover:
            for _ in range(2):
                with trio.fail_after(5), pytest.raises(MoverLost, match="earlier daemon"):
                    await mover.wait_earlier_gone()
            fcntl.flock(left.fd, fcntl.LOCK_UN)
            await mover.wait_earlier_gone()
            with closing(MoverLock(place.lock_path)) as late:
                assert not late.take()


def test_a_lock_that_cannot_be_opened_says_which(tmp_path: Path) -> None:
    with pytest.raises(PrimaryIOError, match=r"mover\.lock: No such file or directory"):
        MoverLock(tmp_path / "missing" / "mover.lock")


async def test_the_lock_is_held_until_the_mover_has_gone(tmp_path: Path) -> None:
    place = make_place(tmp_path, "process")
    lock = MoverLock(place.lock_path)
    with closing(MoverLock(place.lock_path)) as next_daemons:
        async with open_mover(place.settings(), place.guests, lambda error: None, lock=lock):
            lock.close()  # as if the daemon were gone already
            assert not next_daemons.take()
        assert next_daemons.take()


async def test_a_process_that_was_killed_and_has_not_gone_is_told_of(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path, "process")
    hangs = True
    has_gone = MoverProcess.has_gone
    monkeypatch.setattr(MoverProcess, "has_gone", lambda process: not hangs and has_gone(process))
    async with place.process() as mover:
        await mover.wait_earlier_gone()
        pid = mover.life().process.pid
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(10):
            while mover.pid == pid:
                await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(MoverLost, match=f"process {pid}.* hangs"):
            await mover.wait_earlier_gone()
        hangs = False
        await mover.wait_earlier_gone()


@pytest.mark.parametrize("call", ["os.memfd_create", "socket.socketpair", "subprocess.Popen"])
async def test_a_process_that_cannot_be_started_fails_jobs_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as planted:
        planted.setattr(call, refuse)
        async with place.process() as mover:
            descriptors = _descriptors()
            with pytest.raises(MoverLost, match="could not be started: Too many open files"):
                await back_up(place, mover, 1, data(0, 6))
            for _ in range(FETCHES_AT_ONCE + 1):
                with pytest.raises(MoverLost):
                    async with mover.fetch([]):
                        raise AssertionError("bytes came from nowhere")
            assert _descriptors() == descriptors
            planted.undo()
            await back_up(place, mover, 2, data(0, 6))
    assert content_of(place.store, 2) == NOISE


async def test_fetches_of_a_process_that_dies_leave_room_for_later_ones(tmp_path: Path) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    async with place.process() as mover:
        await back_up(place, mover, 1, data(0, 6))
        refs = [ref for ref in refs_of(place.store, 1) if ref is not None]
        lost = 0

        async def fetch() -> None:
            nonlocal lost
            try:
                async with mover.fetch(refs[:1]) as raws:
                    await trio.sleep(0.01)
                    assert bytes(raws[0]) == NOISE[:CHUNK]
            except MoverLost:
                lost += 1

        for _ in range(3):
            pid = mover.life().process.pid
            os.kill(pid, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                for _ in range(2 * FETCHES_AT_ONCE + 1):
                    nursery.start_soon(fetch)
                await trio.testing.wait_all_tasks_blocked()
                os.kill(pid, signal.SIGKILL)
        assert lost == 3 * FETCHES_AT_ONCE


async def test_memory_of_slots_is_given_back_and_used_again(tmp_path: Path, impatient: None) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    async with place.process() as mover:
        await back_up(place, mover, 1, data(0, 6))
        refs = [ref for ref in refs_of(place.store, 1) if ref is not None]
        life, nothing = mover.life(), bytes(8 * CHUNK)
        for _ in range(3):
            async with mover.fetch(refs[1:3]) as raws:
                assert b"".join(map(bytes, raws)) == NOISE[CHUNK : 3 * CHUNK]
            with trio.fail_after(10):
                while any(life.slots.read(slot, [8 * CHUNK])[0] != nothing for slot in range(FETCHES_AT_ONCE)):  # noqa: ASYNC110
                    await trio.sleep(0.02)  # nobody is told


def _niceness(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()}


async def test_a_process_gives_way_but_while_somebody_waits_for_it(tmp_path: Path) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    async with place.process() as mover:
        await back_up(place, mover, 1, data(0, 6))
        pid = mover.life().process.pid
        assert _niceness(pid) == {NICEST}
        with mover.hurried():
            assert _niceness(pid) == {NICE}
            with mover.hurried():
                pass
            assert _niceness(pid) == {NICE}
        assert _niceness(pid) == {NICEST}
        os.kill(pid, signal.SIGKILL)
        with mover.hurried(), pytest.raises(MoverLost):
            await back_up(place, mover, 2, data(0, 6))


async def test_who_gives_up_a_backup_waits_for_a_process_that_is_hurried(tmp_path: Path) -> None:
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    async with place.process() as mover:
        pid, seen = mover.life().process.pid, set()

        async def look() -> None:
            while True:
                seen.update(_niceness(pid))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            async with mover.backup():
                assert _niceness(pid) == {NICEST}
                nursery.start_soon(look)
            nursery.cancel_scope.cancel()
        assert NICE in seen
        assert _niceness(pid) == {NICEST}


async def test_a_process_that_answers_late_is_hurried_first(tmp_path: Path, impatient: None) -> None:
    place = make_place(tmp_path, "process")
    async with place.process() as mover:
        await mover.wait_started()
        pid = mover.life().process.pid
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(10):
            while _niceness(pid) != {NICE}:  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.001)
            os.kill(pid, signal.SIGCONT)
            while _niceness(pid) != {NICEST}:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert mover.life().process.pid == pid


async def test_a_file_for_which_no_descriptor_is_left_fails_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came as an error that nobody knew."""
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)

    def refuse(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with place.process() as mover:
        await mover.wait_started()
        with monkeypatch.context() as planted:
            planted.setattr(os, "dup", refuse)
            with pytest.raises(PrimaryIOError, match="Too many open files"):
                await back_up(place, mover, 1, data(0, 6))
        await back_up(place, mover, 2, data(0, 6))
    assert content_of(place.store, 2) == NOISE
