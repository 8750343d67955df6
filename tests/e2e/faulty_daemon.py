"""The daemon with a planted fault: ``python faulty_daemon.py FAULT --config FILE mount``.

Each fault is a mistake that the program could make, in a process that is otherwise the real one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import trio

from vmfs_stub.cli.main import main
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.residency import block_count
from vmfs_stub.primary import volatile_map
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.orphans import Orphans
from vmfs_stub.primary.volatile_map import VolatileMap
from vmfs_stub.services import disk as disks
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_maker import PlaceholderMaker
from vmfs_stub.services.recovery import Recovery

Runs, Raws = Sequence[Extent], Sequence[bytes | None]
write_runs, write, truncate, read = Placeholder._write_runs, Placeholder.write, Disk.truncate, Disk.read
prepare = PlaceholderMaker.prepare


def fill_ignores_set_bits() -> None:
    def fill_all(self: Placeholder, runs: Runs, first_chunk: int, raws: Raws, limit: int, paced: bool) -> None:
        first, end = first_chunk * self.chunk_blocks, (first_chunk + len(raws)) * self.chunk_blocks
        write_runs(self, [Extent(first, min(end, block_count(limit)))], first_chunk, raws, limit, paced)

    Placeholder._write_runs = fill_all  # type: ignore[method-assign]


def write_forgets_its_bit() -> None:
    async def forgetful(self: Placeholder, offset: int, data: bytes) -> int | None:
        if self.ended:
            return None
        return await self._threads.files(os.pwrite, self._fd, data, offset)

    Placeholder.write = forgetful  # type: ignore[method-assign]


def truncate_keeps_the_limit() -> None:
    VolatileMap.lower_archived_limit = lambda self, size: None  # type: ignore[method-assign]


def fill_goes_beyond_the_end() -> None:
    def beyond(self: Placeholder, runs: Runs, first_chunk: int, raws: Raws, limit: int, paced: bool) -> None:
        write_runs(self, runs, first_chunk, raws, self.maps.record.size, paced)

    Placeholder._write_runs = beyond  # type: ignore[method-assign]
    truncate_keeps_the_limit()


def partial_write_recalls_nothing() -> None:
    async def careless(self: Placeholder, offset: int, data: bytes) -> int | None:
        if not self.ended:
            self.maps.live.set_resident(offset // 4096, block_count(offset + len(data)))
        return await write(self, offset, data)

    Placeholder.write = careless  # type: ignore[method-assign]
    disks.blocks_merged = lambda *args, **kwargs: []  # type: ignore[assignment]


def bits_are_set_before_the_data() -> None:
    async def fill(self: Placeholder, first_chunk: int, raws: Raws, *, paced: bool) -> None:
        live, end_chunk = self.maps.live, first_chunk + len(raws)
        runs = list(live.absent_runs(first_chunk * self.chunk_blocks, end_chunk * self.chunk_blocks))
        for run in runs:
            live.set_resident(run.start, run.end)
        trio.lowlevel.spawn_system_task(write_late, self, runs, first_chunk, raws, live.archived_limit, paced)

    async def write_late(placeholder: Placeholder, *args: object) -> None:
        await trio.sleep(0.5)  # so that whoever waited for the fill reads before it, on the slowest machine too
        with contextlib.suppress(OSError):
            await placeholder._threads.files(write_runs, placeholder, *args)

    Placeholder.fill = fill  # type: ignore[method-assign]


def graduates_too_early() -> None:
    VolatileMap.absent_count = lambda self: 0  # type: ignore[method-assign]
    next_absent = Placeholder.next_absent

    def of_the_first_half(self: Placeholder, chunk: int) -> int | None:
        found = next_absent(self, chunk)
        is_released = self.maps.durable.header.state is MapState.PUNCHED
        return None if found is None or (is_released and found * self.chunk_size * 2 > self.maps.record.size) else found

    Placeholder.next_absent = of_the_first_half  # type: ignore[method-assign]


def write_loses_its_last_byte() -> None:
    whole = Disk.write

    async def shorter(self: Disk, offset: int, data: bytes) -> int:
        if len(data) % 4096 and self.placeholder is None and offset + len(data) < self.fstat().st_size:
            return await whole(self, offset, data[:-1]) + 1
        return await whole(self, offset, data)

    Disk.write = shorter  # type: ignore[method-assign]


def growing_is_forgotten() -> None:
    async def only_down(self: Disk, size: int) -> None:
        await truncate(self, min(size, self.fstat().st_size))

    Disk.truncate = only_down  # type: ignore[method-assign]


def read_at_the_end_is_cut() -> None:
    async def cut(self: Disk, offset: int, size: int) -> bytes | bytearray:
        found = await read(self, offset, size)
        return found if len(found) in (0, size) else found[:-1]

    Disk.read = cut  # type: ignore[method-assign]


def bits_die_with_the_daemon() -> None:
    def private(fd: int, length: int) -> mmap.mmap:
        return mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE)

    volatile_map.mmap = SimpleNamespace(mmap=private)  # type: ignore[assignment]


def start_leaves_lone_maps() -> None:
    def slow(self: PlaceholderMaker, *args: Any) -> None:
        prepare(self, *args)
        time.sleep(0.3)  # so that a kill that is aimed at it comes before the record, on any machine

    PlaceholderMaker.prepare = slow  # type: ignore[method-assign]
    Recovery._look_at_lone_map = lambda *args: None  # type: ignore[method-assign]


def start_leaves_orphans() -> None:
    Orphans.sweep = lambda self, files: 0  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        fill_ignores_set_bits,
        write_forgets_its_bit,
        truncate_keeps_the_limit,
        fill_goes_beyond_the_end,
        partial_write_recalls_nothing,
        bits_are_set_before_the_data,
        graduates_too_early,
        write_loses_its_last_byte,
        growing_is_forgotten,
        read_at_the_end_is_cut,
    )
}
KILL_FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault for fault in (bits_die_with_the_daemon, start_leaves_lone_maps, start_leaves_orphans)
}
"""Only a daemon that follows one which was killed shows these."""

if __name__ == "__main__":
    (FAULTS | KILL_FAULTS)[sys.argv.pop(1)]()
    main()
