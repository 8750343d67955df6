"""Chunks and their lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core import chunking
from vmfs_stub.core.chunking import FrameRef, chunk_count, chunk_length
from vmfs_stub.core.ids import ChunkId, PackId

sizes = st.integers(1, 40)


@given(st.integers(0, 400), sizes)
def test_chunks_cut_a_file_without_gap_or_overlap(size: int, chunk_size: int) -> None:
    count = chunk_count(size, chunk_size)
    lengths = [chunk_length(index, size, chunk_size) for index in range(count)]
    assert sum(lengths) == size
    assert all(length == chunk_size for length in lengths[:-1])
    assert all(length > 0 for length in lengths)
    assert chunk_length(count, size, chunk_size) == 0


def test_a_frame_knows_its_end() -> None:
    assert FrameRef(ChunkId(bytes(32)), PackId("0" * 32), 10, 5, 64, bytes(16)).end == 15
    assert chunking.BLOCK_SIZE == 4096
