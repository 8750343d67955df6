"""Guests' reads: every byte arrives, whoever waits for the disk, and what the ring cannot do threads do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vmfs_stub.primary import read_ring
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.read_ring import ReadRing
from vmfs_stub.services import file_reads
from vmfs_stub.services.file_reads import RING_BYTES_MAX, FileReads, open_ring
from vmfs_stub.services.threads import Threads

SIZE = (4 << 20) + 777
CONTENT = random.Random(3).randbytes(SIZE)


class CountedCalls(FileCalls):
    """Counts calls; nothing is in the page cache when ``is_cold``."""

    def __init__(self, *, is_cold: bool) -> None:
        self.sites: list[str] = []
        self._is_cold = is_cold

    def call(self, site: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.sites.append(site)
        if self._is_cold and site == "read.cached":
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return function(*args, **kwargs)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(CONTENT)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    yield fd
    os.close(fd)


@pytest.fixture
def threads() -> Iterator[Threads]:
    with closing(Threads(files_max=4, store_max=1, compute_max=1, store_timeout_s=5, transfer_timeout_s=5)) as threads:
        yield threads


def reading(calls: FileCalls, threads: Threads, *, ring: ReadRing | None) -> FileReads:
    return FileReads(files=calls, threads=threads, ring=ring)


async def read_at_random(reads: FileReads, fd: int, chosen: random.Random) -> None:
    for _ in range(20):
        offset, size = chosen.randrange(SIZE + 4096), chosen.choice((1, 512, 4096, 131072))
        assert await reads.read(fd, size, offset) == CONTENT[offset : offset + size]


@pytest.mark.parametrize("is_cold", [True, False])
@pytest.mark.parametrize("has_ring", [True, False])
async def test_many_reads_at_once_get_each_its_own_bytes(
    fd: int, threads: Threads, has_ring: bool, is_cold: bool
) -> None:
    calls = CountedCalls(is_cold=is_cold)
    ring = ReadRing(16) if has_ring else None
    with closing(reading(calls, threads, ring=ring)) as reads:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(read_at_random, reads, fd, random.Random(number))
    assert ("read.ring" in calls.sites) == has_ring
    assert "read.data" in calls.sites


async def test_what_the_kernel_reads_needs_no_thread(fd: int, threads: Threads) -> None:
    calls = CountedCalls(is_cold=True)
    with closing(reading(calls, threads, ring=ReadRing(4))) as reads:
        for offset in range(0, 1 << 20, 65536):
            assert await reads.read(fd, 4096, offset) == CONTENT[offset : offset + 4096]
    assert calls.sites == ["read.cached", "read.ring"] * 16


async def test_an_error_of_the_file_is_told_by_a_thread(tmp_path: Path, threads: Threads) -> None:
    calls = CountedCalls(is_cold=True)
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with closing(reading(calls, threads, ring=ReadRing(4))) as reads, pytest.raises(OSError) as found:
            await reads.read(fd, 4096, 0)
    finally:
        os.close(fd)
    assert found.value.errno == errno.EBADF
    assert calls.sites == ["read.cached", "read.ring", "read.data"]


async def test_a_reader_that_is_cancelled_keeps_its_buffer_until_the_kernel_is_done(fd: int, threads: Threads) -> None:
    with closing(reading(CountedCalls(is_cold=True), threads, ring=ReadRing(4))) as reads:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await reads.read(fd, 4096, 8192) == CONTENT[8192:12288]
        assert not scope.cancelled_caught


def test_a_buffer_cannot_be_moved_while_the_kernel_writes_to_it(fd: int) -> None:
    ring, buffer = ReadRing(4), bytearray(4096)
    ring.begin(fd, buffer, 4096)
    with pytest.raises(BufferError):
        buffer.extend(b"more")
    ring.close()
    assert buffer == CONTENT[4096:8192]
    buffer.extend(b"more")


def test_as_many_reads_as_there_are_entries_and_round_the_queue(fd: int) -> None:
    ring = ReadRing(4)
    told: dict[int, bytearray] = {}
    for turn in range(11):
        begun = {}
        for at in range(4):
            buffer = bytearray(512)
            assert not ring.is_full
            begun[ring.begin(fd, buffer, (turn * 4 + at) * 512)] = buffer
        assert ring.is_full
        while begun:
            for number, result in ring.done():
                assert result == 512
                told[number] = begun.pop(number)
    ring.close()
    assert b"".join(told[number] for number in sorted(told)) == CONTENT[: 44 * 512]


def test_a_read_that_the_kernel_refuses_was_not_begun(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, libc = ReadRing(4), read_ring._libc_brief

    class Refusing:
        def syscall(self, *_: object) -> int:
            read_ring.ctypes.set_errno(errno.EAGAIN)
            return -1

    monkeypatch.setattr(read_ring, "_libc_brief", Refusing())
    with pytest.raises(BlockingIOError):
        ring.begin(fd, bytearray(512), 0)
    monkeypatch.setattr(read_ring, "_libc_brief", libc)
    buffer = bytearray(512)
    number = ring.begin(fd, buffer, 512)
    while not (done := ring.done()):
        pass
    assert done == [(number, 512)]
    assert buffer == CONTENT[512:1024]
    ring.close()


def test_without_an_io_uring_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused(_: int) -> ReadRing:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(file_reads, "ReadRing", refused)
    with caplog.at_level("INFO"):
        assert open_ring() is None
    assert "Operation not permitted" in caplog.text


def test_where_memory_is_ordered_otherwise_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ring.platform, "machine", lambda: "aarch64")
    assert open_ring() is None


async def test_what_is_not_begun_because_of_an_error_is_read_by_a_thread(fd: int, threads: Threads) -> None:
    class Failing(CountedCalls):
        def call(self, site: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = partial(super().call, site, function, *args, **kwargs)
            if site == "read.ring":
                call()  # it may have been begun all the same
                raise OSError(errno.EIO, "planted")
            return call()

    with closing(reading(Failing(is_cold=True), threads, ring=ReadRing(4))) as reads:
        for offset in range(0, 1 << 18, 4096):
            assert await reads.read(fd, 4096, offset) == CONTENT[offset : offset + 4096]


@pytest.mark.parametrize("turns", range(4))
async def test_closing_while_something_is_done_that_nobody_waits_for(threads: Threads, turns: int) -> None:
    """The listener is to wait, is woken, or is just being woken; it finds no ring any more."""
    ring, (end, other) = ReadRing(4), os.pipe()
    reads = reading(CountedCalls(is_cold=True), threads, ring=ring)
    os.set_blocking(end, True)
    try:
        os.write(other, b"first")
        assert await reads.read(end, 5, -1 & 0xFFFFFFFFFFFFFFFF) == b"first"
        ring.begin(end, bytearray(6), -1 & 0xFFFFFFFFFFFFFFFF)
        os.write(other, b"second")
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        reads.close()
        await trio.testing.wait_all_tasks_blocked()
    finally:
        os.close(end)
        os.close(other)


async def test_what_is_large_and_what_cannot_be_tried_is_read_by_a_thread(fd: int, threads: Threads) -> None:
    class Unsupported(CountedCalls):
        def call(self, site: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            if site == "read.cached":
                self.sites.append(site)
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return super().call(site, function, *args, **kwargs)

    for calls, size in ((CountedCalls(is_cold=True), RING_BYTES_MAX + 1), (Unsupported(is_cold=True), 4096)):
        with closing(reading(calls, threads, ring=ReadRing(4))) as reads:
            assert await reads.read(fd, size, 512) == CONTENT[512 : 512 + size]
        assert calls.sites == ["read.cached", "read.data"]
