"""What a change that was cut short may have left, and what not: the judge of `scripts/soak kills`, on plain files."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab.content import BLOCK
from scripts.lab.failure import LabError
from scripts.lab.lane import Change, Lane, loaded, store_to

SIZE = 4 * BLOCK
OLD, NEW = b"o", b"n"


class PlainFile:
    """A disk without a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, flags: int) -> int | None:
        return os.open(self.path, flags)

    def truncate(self, size: int) -> bool:
        os.truncate(self.path, size)
        return True

    def forget(self, fd: int, offset: int, length: int) -> None: ...


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk"
    path.write_bytes(OLD * SIZE)
    found = os.open(path, os.O_RDWR)
    yield found
    os.close(found)


def lane(fd: int, change: Change, *, size_max: int | None = None) -> Lane:
    """A lane of all of it that was cut short in a change."""
    made = Lane(PlainFile(Path(f"/proc/self/fd/{fd}")), start=0, model=bytearray(OLD * SIZE), size_max=size_max)
    made.change, made.version = change, 1
    return made


def written(*, offset: int = 100, length: int = 2 * BLOCK, unit: int = BLOCK, acknowledged: int = 0) -> Change:
    return Change("pwrite", offset, NEW * length, unit=unit, acknowledged=acknowledged)


@pytest.mark.parametrize("new", [(0, 0), (100, 2 * BLOCK + 100), (BLOCK, 2 * BLOCK), (100, BLOCK)])
def test_each_block_is_old_or_new(fd: int, new: tuple[int, int]) -> None:
    os.pwrite(fd, NEW * (new[1] - new[0]), new[0])
    judged = lane(fd, written())
    judged.settle(fd)
    judged.compare(fd, whole=True)
    assert bytes(judged.model) == os.pread(fd, SIZE, 0)
    assert (judged.change, judged.version % 2) == (None, 0)


@pytest.mark.parametrize(("at", "content"), [(100, b"n" * 10), (BLOCK, b"x"), (BLOCK + 5, bytes(100))])
def test_nothing_else(fd: int, at: int, content: bytes) -> None:
    os.pwrite(fd, content, at)
    with pytest.raises(LabError, match="neither old nor new"):
        lane(fd, written()).settle(fd)


def test_each_byte_of_a_store_to_memory(fd: int) -> None:
    os.pwrite(fd, NEW * 10, 200)
    lane(fd, written(unit=1)).settle(fd)
    os.pwrite(fd, b"x", 205)
    with pytest.raises(LabError, match="neither old nor new"):
        lane(fd, written(unit=1)).settle(fd)


def test_what_was_acknowledged_is_there(fd: int) -> None:
    os.pwrite(fd, NEW * 50, 100)
    lane(fd, written(acknowledged=50)).settle(fd)
    with pytest.raises(LabError, match="acknowledged"):
        lane(fd, written(acknowledged=51)).settle(fd)


@pytest.mark.parametrize(
    ("size", "is_right"), [(SIZE, True), (SIZE + BLOCK, True), (SIZE + 7000, True), (SIZE + 9, False)]
)
def test_a_write_behind_the_end(fd: int, size: int, is_right: bool) -> None:
    os.pwrite(fd, NEW * (size - SIZE), SIZE)
    judged = lane(fd, written(offset=SIZE, length=7000), size_max=2 * SIZE)
    if is_right:
        judged.settle(fd)
        assert judged.end == size
    else:
        with pytest.raises(LabError, match="cut short it made"):
            judged.settle(fd)


@pytest.mark.parametrize("size", [SIZE, 5000, 20_000, 6000])
def test_an_end_that_was_moved(fd: int, size: int) -> None:
    os.ftruncate(fd, size)
    judged = lane(fd, Change("ftruncate", 20_000 if size == 20_000 else 5000), size_max=2 * SIZE)
    if size == 6000:
        with pytest.raises(LabError, match="cut short it made"):
            judged.settle(fd)
    else:
        judged.settle(fd)
        judged.compare(fd, whole=True)
        assert judged.end == size


def test_wrong_bytes_are_found_where_they_are_looked_for(fd: int) -> None:
    judged = lane(fd, written(length=0))
    judged.settle(fd)
    os.pwrite(fd, b"x", 3 * BLOCK)
    judged.touched.append((0, BLOCK))
    judged.compare(fd, whole=False)
    with pytest.raises(LabError, match=f"WRONG BYTES: other bytes from {3 * BLOCK} "):
        judged.compare(fd, whole=True)


def test_mapped_memory_is_read_and_written(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as memory:
        store_to(memory, SIZE - 10, NEW * 10)
        assert loaded(memory) == OLD * (SIZE - 10) + NEW * 10


def test_mapped_memory_that_is_gone_is_an_error_and_no_signal(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as memory:
        os.ftruncate(fd, 0)
        with pytest.raises(OSError) as read:
            loaded(memory)
        with pytest.raises(OSError) as written:
            store_to(memory, 0, NEW * SIZE)
    assert (read.value.errno, written.value.errno) == (errno.EFAULT, errno.EFAULT)
