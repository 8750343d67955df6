"""Writing: all of it arrives, also when the kernel takes only a part at a time."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmfs_stub.primary.files import write_buffers


@pytest.mark.parametrize("at_once", [1, 7, 4096, 5000, 1 << 30])
def test_buffers_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    pwritev, pwrite = os.pwritev, os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwritev(fd, [b"".join(parts)[:at_once]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(at_once, 64)], offset))
    chosen = random.Random(at_once)
    parts = [memoryview(chosen.randbytes(chosen.choice((1, 512, 4096)))) for _ in range(40)]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        write_buffers(fd, parts, 100)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes(100) + b"".join(parts)


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    parts: Sequence[bytes] = [bytes([number % 251]) * 3 for number in range(2500)]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        write_buffers(fd, parts, 0)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_a_write_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as found:
            write_buffers(fd, [b"x"], 0)
    finally:
        os.close(fd)
    assert found.value.errno == errno.EBADF
