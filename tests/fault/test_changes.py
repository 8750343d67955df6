"""Incremental backups: what is read, and that a restore point is the file whatever happened since the last."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest
import trio

from tests.datastore_harness import CHUNK, Killed, Rig, Services, survives_kill, temporary_rig
from tests.model.contents import Contents
from tests.model.guest import Guest
from tests.store_fakes import FakeObjects, packs_condemned
from vmfs_stub.core.errors import InUse, PrimaryIOError, StoreConflict, StoreError, StoreUnavailable
from vmfs_stub.core.names import PRIVATE_DIR
from vmfs_stub.mount.syscalls import RENAME_EXCHANGE
from vmfs_stub.primary.changed_record import Seen
from vmfs_stub.services import copying
from vmfs_stub.services.backup_report import ArchiveSettings, BackupReport
from vmfs_stub.services.last_points import LastPoints
from vmfs_stub.store import chunk_table, manifest, segments
from vmfs_stub.store.keys import MANIFESTS, SEGMENTS
from vmfs_stub.store.store import Store

DISK, OTHER = "vm/disk.img", "vm/other.img"
SIZE = 40 * CHUNK + 100
ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
EIO = OSError(errno.EIO, os.strerror(errno.EIO))


def noise(size: int = SIZE, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@contextmanager
def rig_with_disk(*, head: int = 0) -> Iterator[Rig]:
    with temporary_rig(head=head) as rig:
        rig.make_disk(DISK, noise())
        yield rig


@asynccontextmanager
async def backed_up(rig: Rig) -> AsyncIterator[Services]:
    """The services in a life that begins with a backup."""
    async with rig.running() as services:
        await back_up(services)
        yield services


def point_bytes(rig: Rig, report: BackupReport, path: str = DISK) -> bytes:
    """What a restore point has of a file."""
    store, vm = Store(rig.objects, rig.store.description), rig.vm("vm")
    point = store.open_point(vm.id, report.point_id)
    (number,) = [n for n, stored in enumerate(point.manifest.files) if stored.path == path.removeprefix("vm/")]
    table, parts = point.chunks(number), bytearray()
    for at, ref in enumerate(table.locate(0, table.chunk_count)):
        parts += bytes(min(CHUNK, table.size - at * CHUNK)) if ref is None else store.fetch([ref])[0]
    return bytes(parts)


async def back_up(services: Services, *, archive: bool = False) -> int:
    """Back up, and see that the point is what the disk is; returns how much was read."""
    before = await content(services)
    report = await services.archive("vm", archive=archive)
    assert point_bytes(services.rig, report) == before
    assert await content(services) == before
    return report.read_bytes


async def content(services: Services, path: str = DISK) -> bytes:
    disk = await services.open(path)
    try:
        return bytes(await disk.read(0, SIZE * 2))
    finally:
        await services.disks.release(disk)


async def write(services: Services, *offsets: int, path: str = DISK, length: int = 10) -> None:
    disk = await services.open(path)
    try:
        for offset in offsets:
            await disk.write(offset, noise(length, seed=offset + 5))
    finally:
        await services.disks.release(disk)


def records(rig: Rig) -> list[str]:
    return sorted(path.name for path in (rig.backing / PRIVATE_DIR / "changes").iterdir() if path.name.isdecimal())


def maps(rig: Rig) -> list[str]:
    return sorted(path.name for path in (rig.runtime / "changes").iterdir())


# What is read


async def test_what_nobody_wrote_to_is_not_read_and_its_segments_are_taken_over() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            assert await back_up(services) == SIZE
            reads, segments = services.files.counts["archive.read"], set(rig.objects.contents)
            assert await back_up(services) == 0
            assert services.files.counts["archive.read"] == reads
            assert {key for key in set(rig.objects.contents) - segments if not key.startswith(MANIFESTS)} == set()
        async with rig.running() as services:
            assert await back_up(services) == 0
            assert maps(rig) == []


async def test_what_was_written_is_read_and_nothing_else() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, 3 * CHUNK, 7 * CHUNK - 5, SIZE - 30)
            assert await back_up(services) == 3 * CHUNK + 100
            assert await back_up(services) == 0


async def test_holes_are_not_read_when_they_are_cut_into_what_was_there() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await cut_and_grow(services)
            assert await back_up(services) <= CHUNK
            await cut_and_grow(services, to=SIZE + 3 * CHUNK)
            assert await back_up(services) <= CHUNK


async def cut_and_grow(services: Services, *, to: int = SIZE) -> None:
    disk = await services.open(DISK)
    try:
        await disk.truncate(5 * CHUNK + 7)
        await disk.truncate(to)
    finally:
        await services.disks.release(disk)


async def test_growing_and_the_end_that_moves() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, SIZE)
            assert await back_up(services) == 110
            await write(services, SIZE + 3 * CHUNK)
            await back_up(services)
            with rig.path_fd(DISK) as fd:
                await services.disks.truncate(fd, SIZE)
            await back_up(services)
            assert await back_up(services) == 0


async def test_small_files_are_read_and_nothing_is_kept_of_them() -> None:
    with temporary_rig() as rig:
        rig.settings = _with_min(rig, SIZE + 1)
        rig.make_disk(DISK, noise())
        async with rig.running() as services:
            assert [await back_up(services), await back_up(services)] == [SIZE, SIZE]
            assert (records(rig), maps(rig)) == ([], [])


def _with_min(rig: Rig, size: int) -> ArchiveSettings:
    return replace(rig.settings, placeholder_bytes_min=size)


async def test_whole_segments_are_taken_over_between_those_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (copying, chunk_table, segments, manifest):
        monkeypatch.setattr(module, "SEGMENT_CHUNKS", 8)
    with temporary_rig() as rig:
        rig.make_disk(DISK, bytes(8 * CHUNK) + noise())
        async with backed_up(rig) as services:
            await write(services, 20 * CHUNK)
            gets = len(rig.objects.calls)
            assert await back_up(services) == CHUNK
            put = [key for call, key in rig.objects.calls[gets:] if call == "put" and key.startswith(SEGMENTS)]
            assert len(put) == 1
            assert await back_up(services, archive=True) == 0


# What may have happened since


async def test_after_a_kill_the_map_is_still_there() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, 3 * CHUNK)
        with survives_kill():
            async with rig.running() as services:
                disk = await services.open(DISK)
                await disk.write(9 * CHUNK, b"x")
                services.files.kill()
                raise Killed
        async with rig.running() as services:
            assert await back_up(services) == 2 * CHUNK
            assert await back_up(services) == 0


async def test_after_a_power_loss_all_of_what_was_written_is_read_and_of_what_was_not_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The medium gives each name back by linking, which moves the change time.
    monkeypatch.setattr(Seen, "is_left_as", lambda self, st, until_ns: self.is_content_of(st))
    for seed in range(6):
        with rig_with_disk() as rig:
            rig.make_disk(OTHER, noise(seed=2))
            async with rig.running() as services:
                await back_up(services)
            rig.medium.commit(with_data=True)
            with survives_kill():
                async with rig.running() as services:
                    await write(services, 3 * CHUNK)
                    services.files.kill()
                    raise Killed
            rig.lose_power(random.Random(seed))
            async with rig.running() as services:
                assert await back_up(services) == SIZE
                assert await back_up(services) == 0


async def test_after_a_clean_end_what_changed_is_known_also_in_another_boot() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, 3 * CHUNK)
        rig.reboot()
        async with rig.running() as services:
            await write(services, 9 * CHUNK)
        async with rig.running() as services:
            assert await back_up(services) == 2 * CHUNK
        assert (len(records(rig)), maps(rig)) == (1, [])


async def test_an_owner_that_changes_through_the_mount_is_no_reason_to_read() -> None:
    """Hypervisors change it at every start."""
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            (rig.backing / DISK).chmod(0o640)
            await trio.sleep(0.02)
        async with rig.running() as services:
            assert await back_up(services) == 0
            (rig.backing / DISK).chmod(0o600)
        (rig.backing / DISK).chmod(0o640)
        async with rig.running() as services:
            assert await back_up(services) == SIZE, "this happened while no daemon ran"


@pytest.mark.parametrize("what", ["touched", "cut short", "emptied", "of zeros", "gone"])
async def test_what_befalls_the_note_of_the_clean_end_hides_nothing(what: str) -> None:
    """A power loss, a copy of the directory, or a change of the owner of all that is below it."""
    with rig_with_disk() as rig:
        async with backed_up(rig):
            pass
        path, stopped = rig.backing / DISK, rig.backing / PRIVATE_DIR / "changes/stopped"
        st = path.stat()
        await trio.sleep(0.02)
        with path.open("r+b") as file:
            file.write(b"behind")
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
        await trio.sleep(0.02)
        text = stopped.read_bytes()
        if what == "touched":
            os.utime(stopped)
        elif what == "gone":
            stopped.unlink()
        else:
            stopped.write_bytes({"cut short": text[:-1], "emptied": b"", "of zeros": bytes(len(text))}[what])
        async with rig.running() as services:
            assert await back_up(services) == SIZE


@pytest.mark.parametrize("keeps_mtime", [False, True])
@pytest.mark.parametrize("was_written", [False, True])
async def test_what_is_written_behind_the_mount_is_read(keeps_mtime: bool, was_written: bool) -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            if was_written:
                await write(services, CHUNK)
        path = rig.backing / DISK
        st = path.stat()
        with path.open("r+b") as file:
            file.seek(20 * CHUNK)
            file.write(b"behind")
        if keeps_mtime:
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
        async with rig.running() as services:
            assert await back_up(services) == SIZE


async def test_another_file_in_its_place_is_read() -> None:
    with rig_with_disk() as rig:
        rig.make_disk(OTHER, noise(seed=2))
        async with backed_up(rig) as services:
            guest = Guest(services)
            await guest.rename(DISK, OTHER, flags=RENAME_EXCHANGE)
            assert await back_up(services) == 0, "both are known, by whatever name"
            await guest.rename(OTHER, DISK)
            assert await back_up(services) == 0
            handle = await guest.create(OTHER, Contents(bytearray()))
            await guest.write(handle, 0, noise(seed=3))
            await guest.close(handle)
            await guest.rename(OTHER, DISK)
            assert await back_up(services) == SIZE
            assert len(records(rig)) == 1, "nothing is kept of those that are gone"
            await guest.end()


async def test_a_backup_that_fails_forgets_nothing() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            for site in ("store.pack.put", "store.pending.put", "store.manifest.put"):
                await write(services, 3 * CHUNK)
                services.files.fail(site, 1, StoreUnavailable("planted"))
                with pytest.raises(StoreError):
                    await services.archive("vm", archive=False)
                assert await back_up(services) == CHUNK
                assert await back_up(services) == 0


async def test_a_backup_that_is_interrupted_by_an_opening_forgets_nothing() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, 3 * CHUNK)
            disk = await services.open(DISK)
            with pytest.raises(InUse):
                await services.archive("vm", archive=False)
            await services.disks.release(disk)
            assert await back_up(services) == CHUNK


async def test_where_the_new_point_cannot_be_noted_the_file_is_read_again() -> None:
    for site in ("changes.create", "changes.write"):
        for error in (ENOSPC, EIO):
            with rig_with_disk() as rig:
                async with backed_up(rig) as services:
                    await write(services, 3 * CHUNK)
                    services.files.fail(site, 1, error)
                    assert await back_up(services) == CHUNK
                    await write(services, 9 * CHUNK)
                    assert await back_up(services) == SIZE
                    assert await back_up(services) == 0


# What cannot be noted


@pytest.mark.parametrize("site", ["changes.begin", "changes.allocate", "changes.map"])
async def test_without_room_for_the_map_the_guest_writes_on_and_everything_is_read(site: str) -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            services.files.fail(site, 1, ENOSPC)
            await write(services, 3 * CHUNK)
            assert (records(rig), maps(rig)) == ([], [])
            await write(services, 9 * CHUNK)
            assert await back_up(services) == SIZE
            assert await back_up(services) == 0


async def test_without_room_for_another_bit_the_guest_writes_on_also_after_a_kill() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            await back_up(services)
        with survives_kill():
            async with rig.running() as services:
                disk = await services.open(DISK)
                await disk.write(3 * CHUNK, b"x")
                disk.changes._live._allocated[:] = bytes(1)  # type: ignore[union-attr]
                services.files.fail("changes.allocate", 1, ENOSPC)
                await disk.write(9 * CHUNK, b"y")
                assert maps(rig) == []
                services.files.kill()
                raise Killed
        async with rig.running() as services:
            assert await back_up(services) == SIZE


async def test_a_guest_is_refused_only_where_nothing_can_be_forgotten() -> None:
    for site in ("changes.forget", "changes.sync"):
        with rig_with_disk() as rig:
            async with backed_up(rig) as services:
                disk = await services.open(DISK)
                services.files.fail(site, 1, EIO)
                with pytest.raises(OSError, match="Input/output"):
                    await disk.write(3 * CHUNK, b"x")
                await disk.write(3 * CHUNK, b"y")
                await services.disks.release(disk)
                assert await back_up(services) in (CHUNK, SIZE)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_after_a_failed_sync_everything_is_read_until_the_next_boot(is_killed: bool) -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            await back_up(services)
        with survives_kill():
            async with rig.running() as services:
                disk = await services.open(DISK)
                await disk.write(3 * CHUNK, b"x")
                services.files.fail("sync.file", 1, EIO)
                with pytest.raises(OSError, match="Input/output"):
                    await disk.sync(data_only=True)
                await services.disks.release(disk)
                assert [await back_up(services), await back_up(services)] == [SIZE, SIZE]
                if is_killed:
                    services.files.kill()
                    raise Killed
        async with rig.running() as services:
            assert [await back_up(services), await back_up(services)] == [SIZE, SIZE]
        rig.reboot()
        async with rig.running() as services:
            assert [await back_up(services), await back_up(services)] == [SIZE, 0]


async def test_after_a_sync_that_fails_in_a_backup_the_next_are_no_base() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            services.files.fail("archive.sync", 1, EIO)
            with pytest.raises(PrimaryIOError):
                await services.archive("vm", archive=False)
            assert [await back_up(services), await back_up(services)] == [SIZE, SIZE]


@pytest.mark.parametrize("fails", [False, True])
async def test_of_a_disk_whose_sync_failed_nothing_stays_when_it_is_archived(fails: bool) -> None:
    with rig_with_disk(head=CHUNK) as rig:
        async with rig.running() as services:
            if fails:
                services.files.fail("archive.sync", 1, EIO)
                with pytest.raises(PrimaryIOError):
                    await services.archive("vm")
        async with rig.running() as services:
            await services.archive("vm")
            disk = await services.open(DISK)
            assert disk.placeholder is not None
            assert disk.placeholder.next_absent(0) == (0 if fails else 1)
            await services.disks.release(disk)


# Last points that are of no use


async def test_a_point_that_is_gone_damaged_or_condemned_is_done_without() -> None:
    def gone(contents: dict[str, bytes]) -> None:
        for key in [key for key in contents if key.startswith(MANIFESTS)]:
            del contents[key]

    def damaged(contents: dict[str, bytes]) -> None:
        for key in [key for key in contents if key.startswith(MANIFESTS)]:
            contents[key] = contents[key][:-3]

    def without_segments(contents: dict[str, bytes]) -> None:
        for key in [key for key in contents if key.startswith(SEGMENTS)]:
            del contents[key]

    def with_damaged_segments(contents: dict[str, bytes]) -> None:
        for key in [key for key in contents if key.startswith(SEGMENTS)]:
            contents[key] = contents[key][:-1]

    for spoil in (gone, damaged, without_segments, with_damaged_segments):
        for archive in (False, True):
            with rig_with_disk() as rig:
                async with backed_up(rig) as services:
                    await write(services, 3 * CHUNK)
                    spoil(rig.objects.contents)
                    assert await back_up(services, archive=archive) == SIZE
                    assert await back_up(services) == 0


async def test_condemned_packs_fail_one_backup_and_not_the_next() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            with packs_condemned(rig.objects.contents):
                with pytest.raises(StoreConflict):
                    await services.archive("vm", archive=False)
                assert await back_up(services) == SIZE


async def test_another_store_has_nothing_to_take_over() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            await back_up(services)
        rig.objects = FakeObjects()
        rig.store = Store.create(rig.objects, chunk_size=CHUNK)
        async with rig.running() as services:
            assert await back_up(services) == SIZE
            assert await back_up(services) == 0


# Placeholders


async def test_of_a_placeholder_what_was_written_is_read_and_nothing_is_recalled() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            await services.archive("vm")
            await write(services, 3 * CHUNK, length=CHUNK)
            before = services.recall.counters.background_bytes
            report = await services.archive("vm", archive=False)
            assert report.read_bytes == CHUNK
            assert services.recall.counters.background_bytes == before
            assert point_bytes(rig, report) == await content(services)
        async with rig.running() as services:
            assert await back_up(services) == 0, "it was recalled by being looked at, and nobody wrote to it"
            await services.bring_back(DISK)
            assert not rig.is_placeholder(DISK)
            assert await back_up(services) == 0
        async with rig.running() as services:
            await write(services, 5 * CHUNK)
            assert await back_up(services, archive=True) == CHUNK


async def test_what_is_absent_is_where_the_placeholder_says_also_when_its_point_could_not_be_noted() -> None:
    """A map that is behind tells of an earlier point, which does not have what was written since."""
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            await write(services, 3 * CHUNK, 9 * CHUNK, length=2 * CHUNK)
            replace_point = LastPoints.replace
            LastPoints.replace = _nothing  # type: ignore[method-assign]
            try:
                await services.archive("vm")
            finally:
                LastPoints.replace = replace_point  # type: ignore[method-assign]
            report = await services.archive("vm", archive=False)
            assert point_bytes(rig, report) == await content(services)


async def _nothing(*args: object, **kwargs: object) -> None:
    await trio.lowlevel.checkpoint()


async def test_an_archive_is_certain_or_reads_everything() -> None:
    """Of a file whose owner changed it can be told only that the daemon saw it, and an archive wants to know."""
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            (rig.backing / DISK).chmod(0o640)
            assert await back_up(services, archive=True) == SIZE


# What is left


async def test_nothing_is_left_of_files_that_are_gone() -> None:
    with temporary_rig() as rig:
        for path in (DISK, OTHER, "vm/third.img"):
            rig.make_disk(path, noise())
        async with backed_up(rig) as services:
            await write(services, CHUNK, path=OTHER)
            guest = Guest(services)
            handle = await guest.open("vm/third.img", Contents(bytearray()))
            await guest.write(handle, 0, b"x")
            assert (len(records(rig)), len(maps(rig))) == (1, 2)
            await guest.unlink(OTHER)
            await guest.unlink("vm/third.img")
            await guest.close(handle)
            await guest.end()
            assert (len(records(rig)), len(maps(rig))) == (1, 0)
        (rig.backing / DISK).unlink()
        (rig.backing / PRIVATE_DIR / "changes/7.new").write_bytes(b"half")
        (rig.runtime / "changes/8.new").write_bytes(b"half")
        async with rig.running() as services:
            assert (records(rig), maps(rig)) == ([], [])
            assert services.recovered.findings == []


async def test_a_file_that_was_never_backed_up_costs_nothing() -> None:
    with rig_with_disk() as rig:
        async with rig.running() as services:
            await write(services, CHUNK)
            calls = {site for site in services.files.counts if site.startswith("changes.")}
            assert calls <= {"changes.list", "changes.open", "changes.clean_sync"}
            assert (records(rig), maps(rig)) == ([], [])


async def test_writes_after_the_first_make_no_file_call_more() -> None:
    with rig_with_disk() as rig:
        async with backed_up(rig) as services:
            disk = await services.open(DISK)
            await disk.write(0, b"x")
            before = services.files.counts.copy()
            for chunk in range(40):
                await disk.write(chunk * CHUNK, b"x")
            assert services.files.counts - before == {"write.data": 40}
            await services.disks.release(disk)
