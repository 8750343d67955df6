"""Which frames to fetch together.

A recall names chunks; the plan groups their frames into range reads: frames of one pack that lie close together are
read at once, because a request costs more than the bytes of a small gap.  Pure: it neither reads nor waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmfs_stub.core.chunking import FrameRef

GAP_BYTES_MAX = 16 * 1024
"""Bytes read in vain rather than making one more request; about what a local range read costs in time."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One range read: frames, ascending by their place in the pack, and what was given as the chunk index of each.

    Who plans no recall may have given any other number, of which frames are to be told by it.
    """

    chunks: tuple[int, ...]
    frames: tuple[FrameRef, ...]


def plan_fetches(
    wanted: Iterable[tuple[int, FrameRef]], *, fetch_bytes_max: int, gap_bytes_max: int = GAP_BYTES_MAX
) -> list[Fetch]:
    """Group ``wanted`` (chunk index, its frame) into range reads of at most ``fetch_bytes_max`` raw bytes each.

    A frame larger than the limit is fetched alone.  The groups come in the order of their lowest chunk index, so that
    what is asked for first arrives first.
    """
    groups: list[list[tuple[int, FrameRef]]] = []
    raw_bytes = 0
    for index, frame in sorted(wanted, key=lambda item: (item[1].pack_id, item[1].offset, item[0])):
        last = groups[-1][-1][1] if groups else None
        close = last is not None and last.pack_id == frame.pack_id and 0 <= frame.offset - last.end <= gap_bytes_max
        if close and raw_bytes + frame.raw_length <= fetch_bytes_max:
            groups[-1].append((index, frame))
            raw_bytes += frame.raw_length
        else:
            groups.append([(index, frame)])
            raw_bytes = frame.raw_length
    groups.sort(key=lambda group: min(index for index, _ in group))
    return [Fetch(tuple(i for i, _ in group), tuple(f for _, f in group)) for group in groups]
