"""The reserve: filled while there is ample room, lent slice by slice, and never in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmfs_stub.primary import reserve as reserves
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.reserve import RESERVE_SIZE, Reserve

FILES = FileCalls()
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reserve"


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_it_is_filled_and_filled_up(path: Path) -> None:
    reserve = Reserve(path)
    for _ in range(2):
        reserve.fill(FILES)
        assert path.stat().st_size == RESERVE_SIZE
        assert path.stat().st_blocks * 512 >= RESERVE_SIZE
        os.truncate(path, 5)


def test_it_is_not_filled_without_ample_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserves, "_FREE_FACTOR", 1 << 40)
    Reserve(path).fill(FILES)
    assert path.stat().st_size == 0


def test_it_is_lent_as_far_as_it_is_needed(path: Path) -> None:
    reserve = Reserve(path)
    reserve.fill(FILES)

    def needs(size: int) -> str:
        if RESERVE_SIZE - path.stat().st_size < size:
            raise full()
        return "done"

    assert reserve.lend(FILES, lambda: needs(0)) == "done"
    assert path.stat().st_size == RESERVE_SIZE
    assert reserve.lend(FILES, lambda: needs(3 * MIB)) == "done"
    assert path.stat().st_size == RESERVE_SIZE - 4 * MIB
    with pytest.raises(OSError, match="No space"):
        reserve.lend(FILES, lambda: needs(RESERVE_SIZE + 1))
    assert path.stat().st_size == 0


def test_without_it_the_failure_is_what_it_was(path: Path) -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise full()

    with pytest.raises(OSError, match="No space"):
        Reserve(path).lend(FILES, fails)
    assert calls == [1]


def test_other_failures_give_up_nothing(path: Path) -> None:
    reserve = Reserve(path)
    reserve.fill(FILES)

    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        reserve.lend(FILES, fails)
    assert path.stat().st_size == RESERVE_SIZE


def test_a_reserve_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Reserve(tmp_path / "missing" / "reserve").fill(FILES)
    assert "no space could be kept back" in caplog.text
