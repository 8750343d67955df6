"""The model finds what it is there to find: each fault that the design rules out is planted, and must be noticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import trio

from tests.datastore_harness import BLOCK
from tests.model.disk_play import Wrong, play
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.residency import block_count
from vmfs_stub.primary import placeholder as primary_placeholder
from vmfs_stub.primary.durable_map import DurableMap, MapHeader
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PlaceholderMaps
from vmfs_stub.primary.volatile_map import VolatileMap
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.locks import SharedSync
from vmfs_stub.services.placeholder import Placeholder

SEEDS = range(300)
"""A fault that none of these finds is one that the model does not see."""

Patch = pytest.MonkeyPatch


def found_by_a_seed() -> bool:
    for seed in SEEDS:
        try:
            play(seed, step_count=60)
        except BaseExceptionGroup as group:
            if group.subgroup(Wrong) is None:
                raise
            return True
        except Wrong:
            return True
    return False


def set_bits_before_data(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    async def fill(self: Placeholder, first_chunk: int, raws: Sequence[bytes | None]) -> None:
        end_chunk = first_chunk + len(raws)
        async with self._locks.hold(first_chunk, end_chunk):
            if self.ended:
                return
            live = self.maps.live
            runs = list(live.absent_runs(first_chunk * self.chunk_blocks, end_chunk * self.chunk_blocks))
            for run in runs:
                live.set_resident(run.start, run.end)
            await trio.sleep(0.001)
            await self._threads.files(write_runs, self, runs, first_chunk, raws, live.archived_limit)

    patch.setattr(Placeholder, "fill", fill)


def make_bits_durable_before_data(patch: Patch) -> None:
    def sync(self: PlaceholderMaps, files: FileCalls, fd: int, pages: dict[int, bytes], header: MapHeader) -> None:
        self.durable.update(pages, header)

    patch.setattr(PlaceholderMaps, "sync", sync)


def fill_over_writes(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    def all_of_it(
        self: Placeholder, runs: Sequence[Extent], first_chunk: int, raws: Sequence[bytes | None], limit: int
    ) -> None:
        first, end = first_chunk * self.chunk_blocks, (first_chunk + len(raws)) * self.chunk_blocks
        write_runs(self, [Extent(first, min(end, block_count(limit)))], first_chunk, raws, limit)

    patch.setattr(Placeholder, "_write_runs", all_of_it)


def fill_beyond_limit(patch: Patch) -> None:
    write_runs = Placeholder._write_runs

    def beyond(
        self: Placeholder, runs: Sequence[Extent], first_chunk: int, raws: Sequence[bytes | None], limit: int
    ) -> None:
        write_runs(self, runs, first_chunk, raws, min(self.maps.record.size, os.fstat(self._fd).st_size))

    patch.setattr(Placeholder, "_write_runs", beyond)


def forget_the_limit(patch: Patch) -> None:
    patch.setattr(VolatileMap, "lower_archived_limit", lambda self, size: None)


def punch_what_is_here(patch: Patch) -> None:
    punch = Placeholder._punch

    def all_between(self: Placeholder, runs: Sequence[Extent]) -> None:
        punch(self, [Extent(0, max(run.end for run in runs))])

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
        raise primary_placeholder.CorruptMap("planted")

    patch.setattr(VolatileMap, "open", missing)
    update = DurableMap.update

    def not_live(self: DurableMap, pages: Mapping[int, bytes], header: MapHeader) -> None:
        update(self, pages, primary_placeholder.replace(header, live=None))

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


PLANTED: list[Callable[[Patch], None]] = [
    set_bits_before_data,
    make_bits_durable_before_data,
    fill_over_writes,
    fill_beyond_limit,
    forget_the_limit,
    punch_what_is_here,
    share_the_running_sync,
    acknowledge_syncs_at_once,
    use_an_old_map,
    forget_bits_at_close,
    start_from_the_durable_map,
    take_whole_chunks_as_replaced,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert found_by_a_seed()
