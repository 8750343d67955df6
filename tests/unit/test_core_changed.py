"""What is taken over from a restore point is what no write can have touched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.changed import Changed, bits_size, chunks_touched
from vmfs_stub.core.chunking import chunk_count, chunk_length
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PointId, StoreId, VmId
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import set_range

CHUNK = 64 * 1024


def origin(size: int) -> Origin:
    return Origin(StoreId("1" * 32), VmId("2" * 32), PointId("3" * 32), 0, size, CHUNK)


sizes = st.integers(1, 40 * CHUNK)
writes = st.lists(st.tuples(st.integers(0, 50 * CHUNK), st.integers(0, 3 * CHUNK)), max_size=4)


@given(stored=sizes, now=sizes, writes=writes)
def test_chunks_that_are_taken_over_are_whole_the_same_and_untouched(
    stored: int, now: int, writes: list[tuple[int, int]]
) -> None:
    bits = bytearray(bits_size(origin(stored)))
    touched: set[int] = set()
    for offset, length in writes:
        run = chunks_touched(origin(stored), offset, length)
        set_range(bits, run.start, run.end)
        touched.update(at // CHUNK for at in range(offset - offset % CHUNK, offset + length, CHUNK))
    changed, count = Changed(origin(stored), bytes(bits)), chunk_count(now, CHUNK)
    taken: set[int] = set()
    at = 0
    while at < count:
        run = changed.unchanged(at, size=now)
        assert at <= run.start <= run.end <= count
        assert run.length or run.start == count
        taken.update(range(run.start, run.end))
        at = run.end
    same_length = {
        chunk for chunk in range(count) if chunk_length(chunk, now, CHUNK) == chunk_length(chunk, stored, CHUNK)
    }
    assert taken == same_length - touched


def test_nothing_changed_takes_all_over() -> None:
    assert Changed.nothing(origin(5 * CHUNK + 1)).unchanged(0, size=5 * CHUNK + 1) == Extent(0, 6)
    assert Changed.nothing(origin(5 * CHUNK + 1)).unchanged(0, size=5 * CHUNK + 2) == Extent(0, 5)
    assert Changed.nothing(origin(5 * CHUNK + 1)).unchanged(2, size=CHUNK) == Extent(1, 1)
