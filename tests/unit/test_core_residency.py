"""Residency bits against lists of bools, and what a write needs against its definition byte by byte."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmfs_stub.core import residency
from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.extents import Extent

STEP_BLOCKS = residency._STEP_BYTES * 8
"""Maps are looked at in steps of this many blocks: runs must not be cut or lost at their borders."""


def pack(bools: list[bool]) -> bytearray:
    bits = bytearray(-(-len(bools) // 8))
    for number, value in enumerate(bools):
        bits[number >> 3] |= value << (number & 7)
    return bits


def unpack(bits: bytes | bytearray | memoryview, count: int) -> list[bool]:
    return [bool(bits[number >> 3] >> (number & 7) & 1) for number in range(count)]


def runs_of_false(bools: list[bool], first: int, end: int) -> list[Extent]:
    found: list[Extent] = []
    for number in range(first, end):
        if not bools[number]:
            if found and found[-1].end == number:
                found[-1] = Extent(found[-1].start, number + 1)
            else:
                found.append(Extent(number, number + 1))
    return found


@st.composite
def maps(draw: st.DrawFn) -> tuple[list[bool], int, int]:
    bools = draw(st.lists(st.booleans(), min_size=1, max_size=200))
    first = draw(st.integers(0, len(bools)))
    return bools, first, draw(st.integers(first, len(bools)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@given(case=maps())
def test_queries_agree_with_a_list(kind: type, case: tuple[list[bool], int, int]) -> None:
    bools, first, end = case
    bits = kind(pack(bools))
    assert list(residency.clear_runs(bits, first, end)) == runs_of_false(bools, first, end)
    assert residency.all_set(bits, first, end) == all(bools[first:end])


@given(maps())
def test_set_range_sets_its_range_and_nothing_else(case: tuple[list[bool], int, int]) -> None:
    bools, first, end = case
    bits = pack(bools)
    residency.set_range(memoryview(bits), first, end)
    bools[first:end] = [True] * (end - first)
    assert unpack(bits, len(bools)) == bools
    assert bits == pack(bools), "not even the bits behind the last block change"


@pytest.mark.parametrize("first", [0, 1, 7, 8, STEP_BLOCKS - 1, STEP_BLOCKS, STEP_BLOCKS + 3])
@pytest.mark.parametrize("distance", [-9, -8, -1, 0, 1, 8, 9])
def test_runs_are_whole_across_step_borders(first: int, distance: int) -> None:
    count = 3 * STEP_BLOCKS + 17
    for start, stop in (
        (STEP_BLOCKS + distance, STEP_BLOCKS + distance + 3),
        (STEP_BLOCKS + distance, 2 * STEP_BLOCKS + distance),
        (first, count),
    ):
        bools = [not start <= number < stop for number in range(count)]
        bits = pack(bools)
        assert list(residency.clear_runs(bits, first, count)) == runs_of_false(bools, first, count)
        assert residency.all_set(bits, first, count) == all(bools[first:])
        assert residency.all_set(bits, max(first, stop), count)


def test_one_clear_bit_is_found_anywhere_in_a_large_map() -> None:
    count = 2 * STEP_BLOCKS + 11
    full = bytearray(b"\xff" * -(-count // 8))
    assert residency.all_set(full, 0, count)
    chosen = random.Random(1)
    for number in [0, count - 1, STEP_BLOCKS - 1, STEP_BLOCKS, *(chosen.randrange(count) for _ in range(100))]:
        full[number >> 3] ^= 1 << (number & 7)
        assert not residency.all_set(full, 0, count)
        assert list(residency.clear_runs(full, 0, count)) == [Extent(number, number + 1)]
        assert residency.all_set(full, 0, number)
        assert residency.all_set(full, number + 1, count)
        full[number >> 3] ^= 1 << (number & 7)


@given(st.integers(0, 20 * BLOCK_SIZE))
def test_block_count_is_the_number_of_blocks_with_a_byte(size: int) -> None:
    count = residency.block_count(size)
    assert (count - 1) * BLOCK_SIZE < size <= count * BLOCK_SIZE


# What a write needs, in a world of small blocks: an edge is met at every offset instead of one in four thousand.

SMALL = 4


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "BLOCK_SIZE", SMALL)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_touched_merged_and_replaced_by_definition() -> None:
    for size in range(4 * SMALL + 1):
        for offset in range(5 * SMALL + 1):
            for length in range(4 * SMALL + 1):
                written = set(range(offset, offset + length))
                touched = sorted({byte // SMALL for byte in written})
                # A block needs what was there before when the write leaves a byte of the file in it as it was.
                # Bytes before the write and behind the old end are zeros that the filesystem makes, but only as far
                # as it knows that the block is there: a block that is begun in the middle counts as merged.
                merged = [
                    block
                    for block in touched
                    if block * SMALL < offset
                    or any(byte not in written for byte in range(block * SMALL, min((block + 1) * SMALL, size)))
                ]
                found = residency.blocks_touched(offset, length)
                assert list(range(found.start, found.end)) == touched
                assert residency.blocks_merged(offset, length, size=size) == merged, (size, offset, length)
                replaced = residency.blocks_replaced(offset, length, size=size)
                assert list(range(replaced.start, replaced.end)) == [b for b in touched if b not in merged]
                assert len(merged) <= 2


@given(st.integers(0, 9 * BLOCK_SIZE), st.integers(1, 5 * BLOCK_SIZE), st.integers(0, 9 * BLOCK_SIZE))
@example(0, BLOCK_SIZE, 0)
@example(BLOCK_SIZE - 1, 2, 2 * BLOCK_SIZE)
def test_merged_and_replaced_share_out_what_is_touched(offset: int, length: int, size: int) -> None:
    touched = residency.blocks_touched(offset, length)
    replaced = residency.blocks_replaced(offset, length, size=size)
    merged = residency.blocks_merged(offset, length, size=size)
    assert sorted([*merged, *range(replaced.start, replaced.end)]) == list(range(touched.start, touched.end))
