"""Paced reading and writing: all of it arrives, in steps, also when the kernel takes only a part at a time."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmfs_stub import paced_io
from vmfs_stub.paced_io import (
    STEP_BESIDE_GUESTS_BYTES,
    STEP_BYTES,
    WriteBackFailed,
    pace,
    read_into,
    resume_read_ahead,
    stop_read_ahead,
    write_buffers,
)


@pytest.fixture(params=[True, False])
def step_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How large steps are, beside guests and without any."""
    monkeypatch.setattr(pace, "beside_guests", request.param)
    return STEP_BESIDE_GUESTS_BYTES if request.param else STEP_BYTES


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def written(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("at_once", [1, 7, 4096, 5000, 1 << 30])
def test_buffers_are_written_one_after_the_other(
    fd: int, monkeypatch: pytest.MonkeyPatch, at_once: int, paced: bool
) -> None:
    pwritev, pwrite = os.pwritev, os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwritev(fd, [b"".join(parts)[:at_once]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(at_once, 64)], offset))
    chosen = random.Random(at_once)
    parts = [memoryview(chosen.randbytes(chosen.choice((1, 512, 4096)))) for _ in range(40)]
    write_buffers(fd, parts, 100, paced=paced)
    assert written(fd) == bytes(100) + b"".join(parts)


@pytest.mark.parametrize("paced", [True, False])
def test_more_buffers_than_one_call_takes(fd: int, paced: bool) -> None:
    parts: Sequence[bytes] = [bytes([number % 251]) * 3 for number in range(2500)]
    write_buffers(fd, parts, 0, paced=paced)
    assert written(fd) == b"".join(parts)


def test_what_is_paced_goes_step_by_step_and_what_is_not_at_once(
    fd: int, monkeypatch: pytest.MonkeyPatch, step_bytes: int
) -> None:
    calls, pwritev = [], os.pwritev

    def noted(fd: int, parts: Sequence[memoryview], offset: int) -> int:
        calls.append((offset, sum(map(len, parts))))
        return pwritev(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", noted)
    parts = [random.Random(1).randbytes(step_bytes // 2 + 1000) for _ in range(5)]
    total = sum(map(len, parts))
    write_buffers(fd, parts, 0, paced=True)
    assert calls == [(at, min(step_bytes, total - at)) for at in range(0, total, step_bytes)]
    assert written(fd) == b"".join(parts)
    calls.clear()
    write_buffers(fd, parts, 0, paced=False)
    assert calls == [(0, total)]
    write_buffers(fd, [], 0, paced=True)
    assert written(fd) == b"".join(parts)


def test_a_write_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as found:
            write_buffers(fd, [b"x"], 0)
    finally:
        os.close(fd)
    assert found.value.errno == errno.EBADF
    assert not isinstance(found.value, WriteBackFailed)


def test_what_the_disk_took_badly_is_an_error_of_its_own(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def sync_file_range(self, fd: int, offset: int, length: int, flags: int) -> int:
            paced_io.ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(paced_io, "_libc", Libc())
    write_buffers(fd, [b"x"], 0, paced=False)
    with pytest.raises(WriteBackFailed) as found:
        write_buffers(fd, [b"x"], 0, paced=True)
    assert found.value.errno == errno.EIO


@pytest.mark.parametrize("reads_in_steps", [True, False])
@pytest.mark.parametrize("at_once", [1000, STEP_BESIDE_GUESTS_BYTES - 1, 1 << 30])
def test_reading_goes_on_to_the_end_of_the_file_in_steps_unless_a_guest_waits(
    fd: int, monkeypatch: pytest.MonkeyPatch, at_once: int, step_bytes: int, reads_in_steps: bool
) -> None:
    monkeypatch.setattr(pace, "reads_in_steps", reads_in_steps)
    content = random.Random(2).randbytes(2 * step_bytes + 777)
    os.pwrite(fd, content, 0)
    longest, preadv = 0, os.preadv

    def noted(fd: int, views: Sequence[memoryview], offset: int) -> int:
        nonlocal longest
        longest = max(longest, len(views[0]))
        return preadv(fd, [views[0][:at_once]], offset)

    monkeypatch.setattr(os, "preadv", noted)
    stop_read_ahead(fd)
    buffer = bytearray(len(content) - 10)
    assert read_into(fd, buffer, 10) == len(buffer)
    assert buffer == content[10:]
    assert read_into(fd, bytearray(100), len(content) - 30) == 30
    assert longest == (step_bytes if reads_in_steps else len(buffer))
    resume_read_ahead(fd)


def test_nothing_is_read_ahead_between_stop_and_resume(fd: int) -> None:
    os.pwrite(fd, bytes(4 << 20), 0)
    os.fsync(fd)

    def cached_after_reads() -> bool:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, 1 << 20, 64 << 10):
            read_into(fd, bytearray(64 << 10), at)
        try:
            return os.preadv(fd, [bytearray(4096)], 1 << 20, os.RWF_NOWAIT) == 4096
        except BlockingIOError:
            return False

    stop_read_ahead(fd)
    assert not cached_after_reads()
    resume_read_ahead(fd)
    assert cached_after_reads()


@pytest.mark.parametrize(
    ("beside_guests", "takes_turns", "most"), [(True, True, 1), (False, True, 3), (True, False, 3)]
)
def test_one_step_at_a_time_where_turns_are_taken(
    fd: int, monkeypatch: pytest.MonkeyPatch, beside_guests: bool, takes_turns: bool, most: int
) -> None:
    monkeypatch.setattr(pace, "beside_guests", beside_guests)
    monkeypatch.setattr(pace, "takes_turns", takes_turns)
    os.pwrite(fd, b"x" * 3 * STEP_BESIDE_GUESTS_BYTES, 0)
    preadv, lock, now, seen = os.preadv, threading.Lock(), [0], [0]

    def slow(*args: object) -> int:
        with lock:
            now[0] += 1
            seen[0] = max(seen[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(paced_io.os, "preadv", slow)
    with ThreadPoolExecutor(3) as pool:
        sizes = pool.map(lambda _: read_into(fd, bytearray(3 * STEP_BESIDE_GUESTS_BYTES), 0), range(3))
        assert list(sizes) == [3 * STEP_BESIDE_GUESTS_BYTES] * 3
    assert seen[0] == most


def test_a_step_that_hangs_holds_up_no_other_for_long(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "beside_guests", True)
    monkeypatch.setattr(pace, "takes_turns", True)
    os.pwrite(fd, b"x", 0)
    begun, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        with pace.step(fd):
            begun.set()
            goes_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(hang)
        begun.wait(30)
        assert read_into(fd, bytearray(1), 0) == 1
        assert not hanging.done()
        goes_on.set()
        hanging.result()
    assert read_into(fd, bytearray(1), 0) == 1
