"""Recall plans: every wanted frame exactly once, in range reads that are near, bounded and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.ids import ChunkId, PackId
from vmfs_stub.core.recall_plan import plan_fetches

PACKS = [PackId(f"{number:032x}") for number in range(3)]


def frame(pack: int, offset: int, length: int, raw_length: int) -> FrameRef:
    return FrameRef(ChunkId(bytes(32)), PACKS[pack], offset, length, raw_length, bytes(16))


@st.composite
def wanted_frames(draw: st.DrawFn) -> list[tuple[int, FrameRef]]:
    """Frames that lie in packs one after another with gaps; chunks may share one (equal content)."""
    frames = []
    for pack in range(3):
        at = 0
        for _ in range(draw(st.integers(0, 6))):
            at += draw(st.integers(0, 30))
            length = draw(st.integers(1, 20))
            frames.append(frame(pack, at, length, draw(st.integers(length, 40))))
            at += length
    if not frames:
        return []
    indexes = draw(st.lists(st.integers(0, 50), unique=True, max_size=20))
    return [(index, draw(st.sampled_from(frames))) for index in indexes]


@given(wanted_frames(), st.integers(1, 120), st.integers(0, 40))
def test_plan(wanted: list[tuple[int, FrameRef]], fetch_bytes_max: int, gap_bytes_max: int) -> None:
    plan = plan_fetches(iter(wanted), fetch_bytes_max=fetch_bytes_max, gap_bytes_max=gap_bytes_max)

    planned = [pair for fetch in plan for pair in zip(fetch.chunks, fetch.frames, strict=True)]
    assert sorted(planned, key=lambda pair: pair[0]) == sorted(wanted, key=lambda pair: pair[0])
    for fetch in plan:
        assert len({part.pack_id for part in fetch.frames}) == 1
        assert len(fetch.frames) == 1 or sum(part.raw_length for part in fetch.frames) <= fetch_bytes_max
        for before, after in zip(fetch.frames, fetch.frames[1:], strict=False):
            assert 0 <= after.offset - before.end <= gap_bytes_max
    lowest = [min(fetch.chunks) for fetch in plan]
    assert lowest == sorted(lowest)


def test_neighbours_are_read_at_once_in_their_order_in_the_pack() -> None:
    near = [(7, frame(0, 0, 10, 10)), (2, frame(0, 10, 10, 10)), (4, frame(0, 25, 10, 10))]
    (fetch,) = plan_fetches(near, fetch_bytes_max=100, gap_bytes_max=5)
    assert fetch.chunks == (7, 2, 4)


def test_a_frame_larger_than_the_limit_comes_alone() -> None:
    wanted = [(0, frame(0, 0, 10, 64)), (1, frame(0, 10, 10, 200)), (2, frame(0, 20, 10, 64))]
    plan = plan_fetches(wanted, fetch_bytes_max=128)
    assert [fetch.chunks for fetch in plan] == [(0,), (1,), (2,)]
