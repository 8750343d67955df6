"""Chunks, their spans and lengths, and the test for zeros."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core import chunking
from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, FrameRef, chunk_count, chunk_length, chunk_span, is_zero
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


@given(st.integers(0, 400), st.integers(0, 100), sizes)
def test_a_span_holds_exactly_the_chunks_that_are_touched(offset: int, length: int, chunk_size: int) -> None:
    first, end = chunk_span(offset, length, chunk_size)
    assert list(range(first, end)) == sorted({byte // chunk_size for byte in range(offset, offset + length)})


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("length", [0, 1, 2, 4096, CHUNK_SIZE_MAX - 1, CHUNK_SIZE_MAX, CHUNK_SIZE_MAX + 1, 3 << 20])
def test_is_zero_finds_a_single_byte_anywhere(kind: type, length: int) -> None:
    data = bytearray(length)
    assert is_zero(kind(data))
    for at in {0, length // 2, length - 1, CHUNK_SIZE_MAX - 1, CHUNK_SIZE_MAX}:
        if 0 <= at < length:
            data[at] = 1
            assert not is_zero(kind(data))
            data[at] = 0


def test_a_frame_knows_its_end() -> None:
    assert FrameRef(ChunkId(bytes(32)), PackId("0" * 32), 10, 5, 64, bytes(16)).end == 15
    assert chunking.BLOCK_SIZE == 4096
