"""What is copied without being read, where a hole of a huge disk is no list of its chunks; what is read at once."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from vmfs_stub.core.extents import Extent
from vmfs_stub.paced_io import pace
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.copying import BATCH_BYTES, BatchTurns, StoredSegment, _Origins, batches_at_once, open_copier
from vmfs_stub.services.mover import Content, CopyOrder, Part
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.store import Store

CHUNK = 64 << 10
CHUNKS = 5 * SEGMENT_CHUNKS + 100


@pytest.mark.parametrize("as_it_is", [False, True])
@pytest.mark.parametrize(
    ("start", "end"), [(0, CHUNKS), (10, CHUNKS), (0, CHUNKS - 1), (10, 20), (SEGMENT_CHUNKS, CHUNKS)]
)
async def test_zeros_are_segments_where_they_are_whole_ones(start: int, end: int, as_it_is: bool) -> None:
    nothing: Any = SimpleNamespace(chunk_size=CHUNK)
    origins = _Origins(nothing, nothing, CopyOrder(CHUNKS * CHUNK - 1, "disk"), as_it_is=as_it_is)
    at, lists = start, 0
    async for piece, found in origins.pieces(Part(Extent(start, end), Content.ZEROS)):
        assert piece.start == at
        at = piece.end
        if isinstance(found, StoredSegment):
            assert found == StoredSegment(None, None, piece.length)
            assert piece.start % SEGMENT_CHUNKS == 0
            assert piece.end in (piece.start + SEGMENT_CHUNKS, CHUNKS)
        else:
            assert found == [None] * piece.length
            lists += piece.length
    assert at == end
    assert lists < 2 * SEGMENT_CHUNKS


@pytest.mark.parametrize(("beside_guests", "expected"), [(True, 2), (False, 3)])
async def test_beside_guests_fewer_batches_are_read_at_once_of_all_backups_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside_guests: bool, expected: int
) -> None:
    monkeypatch.setattr(pace, "beside_guests", beside_guests)
    batches, turns = 6, BatchTurns(2)
    here, lock, reading, most = threading.Barrier(expected), threading.Lock(), [0], [0]

    def read(function: Any, *args: Any) -> Any:
        with lock:
            reading[0] += 1
            most[0] = max(most[0], reading[0])
        here.wait(timeout=30)  # broken, unless as many come
        result = function(*args)
        with lock:
            reading[0] -= 1
        return result

    async def parts() -> AsyncIterator[Part]:
        yield Part(Extent(0, batches * BATCH_BYTES // CHUNK), Content.DATA)

    files: Any = SimpleNamespace(call=lambda site, function, *args: read(function, *args))
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(batches * BATCH_BYTES))
    store = Store.create(LocalObjects(tmp_path / "store", create=True), chunk_size=CHUNK)
    with (
        closing(ChunkIndex(None, store.id, files=FileCalls())) as index,
        closing(Threads(files_max=1, store_max=2, compute_max=8, store_timeout_s=60, transfer_timeout_s=60)) as threads,
        disk.open("rb") as opened,
    ):

        async def back_up() -> None:
            writer = store.begin_backup(index=index)
            copier = open_copier(files=files, threads=threads, store=store, writer=writer, turns=turns, verify=False)
            async with copier as copying:
                order = CopyOrder(batches * BATCH_BYTES, "disk")
                await copying.copy(opened.fileno(), order, parts(), lambda size: None)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(back_up)
    assert most[0] == expected == batches_at_once(turns.workers, beside_guests=beside_guests)
