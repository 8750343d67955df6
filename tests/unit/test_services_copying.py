"""What is copied without being read: a hole of a huge disk is never a list of all its chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmfs_stub.core.extents import Extent
from vmfs_stub.services.copying import StoredSegment, _Origins
from vmfs_stub.services.mover import Content, CopyOrder, Part
from vmfs_stub.store.format import SEGMENT_CHUNKS

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
