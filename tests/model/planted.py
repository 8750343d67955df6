"""Faults that the design rules out, each as a patch of the product; the list grows with every bug that was found."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import trio

from tests import datastore_harness
from tests.datastore_harness import BLOCK
from tests.model.life import Life
from tests.store_fakes import FakeObjects
from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import CorruptMap, MapFrozen
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import block_count
from vmfs_stub.mount.entries import Entry
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.primary import placeholder as primary_placeholder
from vmfs_stub.primary.changed_map import ChangedMap
from vmfs_stub.primary.changed_record import Seen
from vmfs_stub.primary.claim_notes import ClaimNotes
from vmfs_stub.primary.durable_map import DurableMap, MapHeader, MapState
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import InodeIdentity
from vmfs_stub.primary.placeholder import PlaceholderMaps, PrivateState
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.primary.volatile_map import VolatileMap
from vmfs_stub.services import recovery, removals
from vmfs_stub.services.changes import Changes, DiskChanges
from vmfs_stub.services.changes_left import ChangesLeft
from vmfs_stub.services.claims import Claims
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_parts import DiskParts
from vmfs_stub.services.last_points import LastPoints
from vmfs_stub.services.locks import SharedSync
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.set_aside import SetAside
from vmfs_stub.services.sources import Source
from vmfs_stub.store.keys import MANIFESTS, PENDING_SUFFIX
from vmfs_stub.store.objects import Buffer

P = ParamSpec("P")
T = TypeVar("T")
Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
Runs, Raws = Sequence[Extent], Sequence[bytes | None]


# Bits and data


def set_bits_before_data(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    async def fill(self: Placeholder, first_chunk: int, raws: Raws, *, paced: bool) -> None:
        end_chunk = first_chunk + len(raws)
        async with self._locks.hold(first_chunk, end_chunk):
            if self.ended:
                return
            live = self.maps.live
            runs = list(live.absent_runs(first_chunk * self.chunk_blocks, end_chunk * self.chunk_blocks))
            for run in runs:
                live.set_resident(run.start, run.end)
            await trio.sleep(0.001)
            await self._threads.files(write_runs, self, runs, first_chunk, raws, live.archived_limit, paced)

    patch.setattr(Placeholder, "fill", fill)


def make_bits_durable_before_data(patch: Patch) -> None:
    def sync(self: PlaceholderMaps, files: FileCalls, fd: int, pages: dict[int, bytes], header: MapHeader) -> None:
        self.durable.update(pages, header)

    patch.setattr(PlaceholderMaps, "sync", sync)


def fill_over_writes(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    def all_of_it(self: Placeholder, runs: Runs, first_chunk: int, raws: Raws, limit: int, paced: bool) -> None:
        first, end = first_chunk * self.chunk_blocks, (first_chunk + len(raws)) * self.chunk_blocks
        write_runs(self, [Extent(first, min(end, block_count(limit)))], first_chunk, raws, limit, paced)

    patch.setattr(Placeholder, "_write_runs", all_of_it)


def fill_beyond_limit(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    def beyond(self: Placeholder, runs: Runs, first_chunk: int, raws: Raws, limit: int, paced: bool) -> None:
        write_runs(self, runs, first_chunk, raws, min(self.maps.record.size, os.fstat(self._fd).st_size), paced)

    patch.setattr(Placeholder, "_write_runs", beyond)


def forget_the_limit(patch: Patch) -> None:
    patch.setattr(VolatileMap, "lower_archived_limit", lambda self, size: None)


def punch_what_is_here(patch: Patch) -> None:
    punch = Placeholder._punch

    def all_between(self: Placeholder, runs: Sequence[Extent], limit: int) -> None:
        punch(self, [Extent(0, max(run.end for run in runs))], limit)

    patch.setattr(Placeholder, "_punch", all_between)


def share_the_running_sync(patch: Patch) -> None:
    async def call(self: SharedSync) -> None:
        if self._running:
            await self._waiters.park()
            return
        self._running = True
        try:
            await self._run()
        finally:
            self._running = False
            self._waiters.unpark_all()

    patch.setattr(SharedSync, "__call__", call)


def acknowledge_syncs_at_once(patch: Patch) -> None:
    async def sync(self: Disk, *, data_only: bool) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(Disk, "sync", sync)


def use_an_old_map(patch: Patch) -> None:
    """What was resident after the last archive counts as resident after the next."""
    load_pages = DurableMap.load_pages
    of_inode: dict[int, list[bytes]] = {}

    def old(self: DurableMap, *, label: str) -> Iterator[bytes]:
        pages, ino = list(load_pages(self, label=label)), self.header.identity.ino
        before = of_inode.get(ino, pages)
        of_inode[ino] = pages
        return iter(before if len(before) == len(pages) else pages)

    patch.setattr(DurableMap, "load_pages", old)


def forget_bits_at_close(patch: Patch) -> None:
    patch.setattr(VolatileMap, "take_dirty", lambda self: {})


def start_from_the_durable_map(patch: Patch) -> None:
    """After a kill, as after a reboot."""
    open_volatile = VolatileMap.open

    def missing(*args: Any, **kwargs: Any) -> VolatileMap:
        opened = open_volatile(*args, **kwargs)
        opened.close(discard=True)
        raise CorruptMap("planted")

    patch.setattr(VolatileMap, "open", missing)
    update = DurableMap.update

    def not_live(self: DurableMap, pages: Mapping[int, bytes], header: MapHeader) -> None:
        update(self, pages, replace(header, live=None))

    patch.setattr(DurableMap, "update", not_live)


def take_whole_chunks_as_replaced(patch: Patch) -> None:
    """A write marks every block that it touches."""
    write = Placeholder.write

    async def careless(self: Placeholder, offset: int, data: bytes) -> int | None:
        if not self.ended:
            self.maps.live.set_resident(offset // BLOCK, block_count(offset + len(data)))
        return await write(self, offset, data)

    patch.setattr(Placeholder, "write", careless)
    patch.setattr("vmfs_stub.services.disk.blocks_merged", lambda *args, **kwargs: [])


# Claims


def write_without_a_claim(patch: Patch) -> None:
    async def claimed(self: Disk) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(Disk, "_claimed", claimed)


def fill_before_the_claim(patch: Patch) -> None:
    async def require(self: Claims, record: PlaceholderRecord) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(Claims, "require", require)


def keep_the_note(patch: Patch) -> None:
    """A restart believes that the VM is held which was set free."""
    patch.setattr(ClaimNotes, "remove", lambda self, store_id, vm_id: None)


# Syncs


def copy_what_is_not_synced(patch: Patch) -> None:
    """What was written before an archive, or recalled during it, is never made durable by it."""
    _leave_out(patch, "archive.sync")


def _leave_out(patch: Patch, left_out: str) -> None:
    call = Life.call

    def skipping(self: Life, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if site == left_out:
            return None
        return call(self, site, function, *args, **kwargs)

    patch.setattr(Life, "call", skipping)


def forget_a_failed_sync(patch: Patch) -> None:
    def freeze(self: Placeholder, cause: OSError) -> MapFrozen:
        return MapFrozen("planted")

    patch.setattr(Placeholder, "freeze", freeze)


def graduate_before_data_is_durable(patch: Patch) -> None:
    graduate = Placeholder.graduate

    async def early(self: Placeholder) -> bool:
        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        self.sync, before = nothing, self.sync  # type: ignore[assignment]
        try:
            return await graduate(self)
        finally:
            self.sync = before

    patch.setattr(Placeholder, "graduate", early)


# Pins, records, names


def pin_after_manifest(patch: Patch) -> None:
    put = FakeObjects.put
    waiting: list[tuple[str, bytes]] = []

    def late(self: FakeObjects, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        if key.startswith("pins/"):
            waiting.append((key, bytes(data)))
            return
        put(self, key, data, if_absent=if_absent)
        if key.startswith(MANIFESTS) and not key.endswith(PENDING_SUFFIX):
            while waiting:
                put(self, *waiting.pop())

    patch.setattr(FakeObjects, "put", late)


def unpin_before_the_removal_is_durable(patch: Patch) -> None:
    _leave_out(patch, "remove.sync")
    patch.setattr(recovery.Recovery, "_sync_removals", lambda self: None)


def remove_the_map_before_the_record(patch: Patch) -> None:
    remove_record = Placeholder._remove_record

    def late(self: Placeholder) -> None:
        path = self.maps.durable.path
        self._files.call("map.remove", path.unlink)
        remove_record(self)

    patch.setattr(Placeholder, "_remove_record", late)


def accept_copies(patch: Patch) -> None:
    for module in (primary_placeholder, recovery):
        patch.setattr(module, "check_identity", lambda *args, **kwargs: None)


def start_while_threads_of_a_dead_daemon_write(patch: Patch) -> None:
    def unlocked(path: object, *, backing: object) -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    patch.setattr(datastore_harness, "take_lock", unlocked)


def leave_replaced_maps(patch: Patch) -> None:
    patch.setattr(primary_placeholder, "_end_replaced", lambda *args, **kwargs: None)


# What was found once


def join_a_recall_and_look_no_more(patch: Patch) -> None:
    """A recall of an earlier opening of the disk is taken for one's own."""

    def same(self: Placeholder, other: object) -> bool:
        return isinstance(other, Placeholder) and other.maps.record == self.maps.record

    async def once(self: DiskParts, placeholder: Placeholder, at: int, end: int, size: int) -> int:
        stop = next((chunk for chunk in range(at + 1, end) if placeholder.is_wholly_absent(chunk, size=size)), end)
        if absent := placeholder.absent_chunks(at * self._chunk_size, (stop - at) * self._chunk_size):
            await self._recall.recall_chunks(placeholder, absent, demand=False)
        return stop

    patch.setattr(DiskParts, "_recall_mixed", once)
    patch.setattr(Placeholder, "__eq__", same)
    patch.setattr(Placeholder, "__hash__", lambda self: hash(self.maps.record))


def punch_behind_the_limit(patch: Patch) -> None:
    """What a power loss left there of a guest's write, and was read since, is not to go at the next start."""
    punch = Placeholder._punch
    patch.setattr(Placeholder, "_punch", lambda self, runs, limit: punch(self, runs, 1 << 62))


def note_removals_of_what_is_only_prepared(patch: Patch) -> None:
    """Whether its record is durable is not known then, and after a crash nobody can tell."""
    set_state = Placeholder.set_state

    async def any_state(self: Placeholder, state: MapState, *, only_from: Collection[MapState] = ()) -> None:
        await set_state(
            self, state, only_from=only_from if state != MapState.REMOVED and only_from else tuple(MapState)
        )

    def mark(files: FileCalls, private: PrivateState, record: PlaceholderRecord, *, label: str) -> MapState:
        durable = primary_placeholder.open_durable(files, private, record, label=label)
        before = durable.header.state
        durable.set_state(MapState.REMOVED)
        durable.close()
        return before

    patch.setattr(Placeholder, "set_state", any_state)
    patch.setattr(removals, "mark_removed", mark)


def forget_what_a_failed_archive_was_to_replace(patch: Patch) -> None:
    for module in (primary_placeholder, removals):
        patch.setattr(module, "open_replaced", lambda *args, **kwargs: None)


def look_at_each_name_alone(patch: Patch) -> None:
    """Of two names that go at once, each leaves the last word to the other."""
    removal = Filesystem._removal

    @contextlib.asynccontextmanager
    async def alone(self: Filesystem, target: Entry) -> AsyncIterator[None]:
        if os.fstat(target.fd).st_nlink != 1:
            yield
            return
        async with removal(self, target):
            yield

    patch.setattr(Filesystem, "_removal", alone)


# What changed since a backup


def mark_after_the_first_write(patch: Patch) -> None:
    """That what is known of a file is of no use any more is not durable when the file is written to."""
    _leave_out(patch, "changes.sync")


def keep_the_record_of_what_is_written(patch: Patch) -> None:
    _leave_out(patch, "changes.forget")


def note_after_the_write(patch: Patch) -> None:
    note, write = DiskChanges.changing, Disk.write

    async def late(self: Disk, offset: int, data: bytes) -> int:
        written = await write(self, offset, data)
        note(self.changes, offset, len(data))
        return written

    patch.setattr(DiskChanges, "changing", lambda self, offset, length: note(self, 0, 0))
    patch.setattr(DiskChanges, "changing_from", lambda self, offset: note(self, offset, 1 << 62))
    patch.setattr(Disk, "write", late)


def note_no_truncation(patch: Patch) -> None:
    patch.setattr(DiskChanges, "changing_from", lambda self, offset: self.changing(0, 0))


def begin_anew_before_the_backup_is_made(patch: Patch) -> None:
    """Which forgets what changed, when the backup fails."""
    changed = LastPoints.changed

    async def taken(self: LastPoints, sources: Sequence[Source]) -> list[Changed | None]:
        found = await changed(self, sources)
        for source, since in zip(sources, found, strict=True):
            if since is not None:
                source.disk.changes.rebase(since.origin, source.st)
        return found

    patch.setattr(LastPoints, "changed", taken)


def end_cleanly_without_the_bits(patch: Patch) -> None:
    lay_down = Changes._lay_down

    def forgetful(self: Changes, ino: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ChangedMap, "changed", lambda self: Changed.nothing(self.origin))
            lay_down(self, ino)

    patch.setattr(Changes, "_lay_down", forgetful)


def know_files_by_their_paths(patch: Patch) -> None:
    def of_path(self: Changes, fd: int, *, label: str) -> DiskChanges:
        number = zlib.crc32(os.fsencode(Path(f"/proc/self/fd/{fd}").readlink()))
        found = DiskChanges(self, fd, number, label)
        if number in self.known:
            found.take_up()
        return found

    patch.setattr(Changes, "open", of_path)
    patch.setattr("vmfs_stub.services.changes.inode_identity", lambda fd: InodeIdentity("0" * 32, 1, 1))
    patch.setattr(ChangesLeft, "finish", lambda self: None)


def believe_what_was_written_behind_the_mount(patch: Patch) -> None:
    patch.setattr(Seen, "is_left_as", lambda self, st, until_ns: self.is_content_of(st))


def set_nothing_aside(patch: Patch) -> None:
    async def keep(self: SetAside, offset: int, length: int, placeholder: Placeholder | None) -> None:
        pass

    patch.setattr(SetAside, "keep", keep)


def take_what_was_absent_for_whole(patch: Patch) -> None:
    patch.setattr(SetAside, "_absent_in", lambda self, chunk, placeholder: [])


def follow_from_the_commit_on(patch: Patch) -> None:
    """What changes between the moment and the commit is in neither map."""
    follow, replace = DiskChanges.follow, DiskChanges.replace
    origins: dict[int, Origin] = {}

    async def later(self: DiskChanges, origin: Origin) -> None:
        origins[self._ino] = origin
        await follow(self, origin)

    async def anew(self: DiskChanges) -> None:
        await follow(self, origins[self._ino])
        await replace(self)

    patch.setattr(DiskChanges, "follow", later)
    patch.setattr(DiskChanges, "replace", anew)


PLANTED: tuple[tuple[Plant, str], ...] = (
    (set_bits_before_data, ""),
    (make_bits_durable_before_data, ""),
    (fill_over_writes, ""),
    (fill_beyond_limit, "cut_and_grow"),
    (forget_the_limit, "cut_and_grow"),
    (punch_what_is_here, ""),
    (share_the_running_sync, ""),
    (acknowledge_syncs_at_once, ""),
    (use_an_old_map, ""),
    (forget_bits_at_close, ""),
    (start_from_the_durable_map, "kill_soon"),
    (take_whole_chunks_as_replaced, ""),
    (write_without_a_claim, ""),
    (fill_before_the_claim, "other_host"),
    (keep_the_note, ""),
    (copy_what_is_not_synced, "archive_again"),
    (forget_a_failed_sync, "failing_sync"),
    (graduate_before_data_is_durable, "crash_in_job"),
    (pin_after_manifest, ""),
    (unpin_before_the_removal_is_durable, "unlink"),
    (remove_the_map_before_the_record, "crash_in_job"),
    (accept_copies, ""),
    (start_while_threads_of_a_dead_daemon_write, "storm_and_kill"),
    (leave_replaced_maps, "archive_again"),
    (join_a_recall_and_look_no_more, "archive_amid_recalls"),
    (punch_behind_the_limit, "grow_at_the_end unlink_cut_short"),
    (note_removals_of_what_is_only_prepared, "fail_a_record unlink_cut_short"),
    (forget_what_a_failed_archive_was_to_replace, "fail_a_record unlink_cut_short"),
    (look_at_each_name_alone, "unlink_all_names"),
    (mark_after_the_first_write, "back_up commit_journal"),
    (keep_the_record_of_what_is_written, "back_up"),
    (note_after_the_write, "back_up storm_and_kill"),
    (note_no_truncation, "back_up cut_and_grow"),
    (begin_anew_before_the_backup_is_made, "back_up_in_vain"),
    (end_cleanly_without_the_bits, "back_up"),
    (know_files_by_their_paths, "back_up rename"),
    (believe_what_was_written_behind_the_mount, "back_up"),
    (set_nothing_aside, "back_up_in_use"),
    (take_what_was_absent_for_whole, "back_up_in_use archive"),
    (follow_from_the_commit_on, "back_up_in_use"),
)
"""Each with the steps that show it, where it would show too rarely for a test."""
