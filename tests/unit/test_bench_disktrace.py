"""Disk traces: what QEMU's log says, what a replay reads, and that the bit-for-bit check finds one planted bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.lab.disktrace import Extent, differing, merged, read_trace, replay, unique_bytes

MIB = 1 << 20
LOG = """\
qemu-system-x86_64: a line of something else
7@100.000001:blk_co_preadv blk 0x1 bs 0x2 offset 4096 bytes 8192 flags 0x8
7@100.500000:blk_co_pwritev blk 0x1 bs 0x2 offset 0 bytes 512 flags 0x0
7@101.000000:blk_co_preadv blk 0x1 bs 0x2 offset 8192 bytes 4096 flags 0x8
7@109.000000:blk_co_preadv blk 0x1 bs 0x2 offset 65536 bytes 4096 flags 0x8
"""


def sparse_file(path: Path, *, size: int, data: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
    return path


def test_a_log_is_read_in_order_and_cut_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    trace = read_trace(log, until_s=105.0)
    assert trace.reads == (Extent(4096, 12288), Extent(8192, 12288))
    assert trace.writes == (Extent(0, 512),)
    assert len(read_trace(log).reads) == 3
    assert unique_bytes(trace.reads) == 8192


def test_extents_merge_where_they_overlap_or_touch() -> None:
    assert merged([Extent(8, 9), Extent(0, 4), Extent(4, 6), Extent(2, 5), Extent(7, 7)]) == [
        Extent(0, 6),
        Extent(8, 9),
    ]


def test_a_replay_reads_what_is_there_and_refuses_what_is_not(tmp_path: Path) -> None:
    disk = sparse_file(tmp_path / "disk", size=MIB, data={0: b"x" * 8192})
    assert replay(disk, [Extent(0, 4096), Extent(MIB - 4096, MIB)]) > 0
    with pytest.raises(ValueError, match="short"):
        replay(disk, [Extent(MIB - 4096, MIB + 4096)])


@pytest.mark.parametrize("at", [0, 5 * MIB - 1, 5 * MIB, 9 * MIB + 12345, 12 * MIB - 1])
def test_one_planted_byte_is_found(tmp_path: Path, at: int) -> None:
    data = {5 * MIB: b"y" * 100}
    left = sparse_file(tmp_path / "left", size=12 * MIB, data=data)
    right = sparse_file(tmp_path / "right", size=12 * MIB, data=data)
    assert differing(left, right) is None
    with right.open("r+b") as file:
        file.seek(at)
        file.write(b"!")
    found = differing(left, right)
    assert found is not None
    assert found.start <= at < found.end
    assert differing(left, right, but_for=[Extent(0, 1), Extent(at, at + 1), Extent(at + 1, at + 1)]) is None
    assert differing(left, right, but_for=[Extent(at + 1, 12 * MIB), Extent(0, at)]) is not None


def test_files_of_different_sizes_differ(tmp_path: Path) -> None:
    left = sparse_file(tmp_path / "left", size=100, data={})
    right = sparse_file(tmp_path / "right", size=101, data={})
    assert differing(left, right) == Extent(100, 101)
