"""Walking a directory by descriptors: no path is too long, nothing outside is reached, what fails is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmfs_stub.primary import tree
from vmfs_stub.primary.tree import open_beneath, walk


@pytest.fixture
def top_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def nest(parent_fd: int, name: str, depth: int) -> None:
    """Directories of that name inside each other, with a file in the innermost."""
    fd = os.dup(parent_fd)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def walked(top_fd: int, *, skipped: str = "") -> tuple[list[str], list[tuple[str, int | None]]]:
    """Paths, and what failed with which errno."""
    failed: list[tuple[str, int | None]] = []
    paths = [
        entry.path
        for entry in walk(top_fd, lambda path, exc: failed.append((path, exc.errno)), site="test.walk", skipped=skipped)
    ]
    return paths, failed


def test_directories_come_before_what_is_in_them(tmp_path: Path, top_fd: int) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "b/c/file").touch()
    (tmp_path / "a").touch()
    (tmp_path / "private").mkdir()
    (tmp_path / "private/file").touch()
    (tmp_path / "b/private").touch()
    (tmp_path / "link").symlink_to("b")
    assert walked(top_fd, skipped="private") == (["a", "b", "b/c", "b/c/file", "b/private", "link"], [])


def test_a_path_may_be_longer_than_a_call_takes(top_fd: int) -> None:
    nest(top_fd, "x" * 250, 18)
    paths, failed = walked(top_fd)
    assert (len(paths), failed) == (19, [])
    fd = open_beneath(top_fd, paths[-1])
    os.close(fd)
    with pytest.raises(OSError, match="too long"):
        os.stat(paths[-1], dir_fd=top_fd)


def test_depth_is_bounded_and_the_rest_is_walked(tmp_path: Path, top_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "DEPTH_MAX", 3)
    nest(top_fd, "d", 4)
    (tmp_path / "e").touch()
    assert walked(top_fd) == (["d", "d/d", "d/d/d", "d/d/d/d", "e"], [("d/d/d/d", errno.ELOOP)])


def test_what_vanishes_is_told(tmp_path: Path, top_fd: int) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    failed: list[tuple[str, int | None]] = []
    entries = walk(top_fd, lambda path, exc: failed.append((path, exc.errno)), site="test.walk")
    assert next(entries).path == "a"
    (tmp_path / "b").unlink()
    assert [entry.path for entry in entries] == ["c"]
    assert failed == [("b", errno.ENOENT)]


def test_no_descriptor_is_left(tmp_path: Path, top_fd: int) -> None:
    nest(top_fd, "d", 3)
    before = descriptors()
    entries = walk(top_fd, lambda path, exc: None, site="test.walk")
    assert [next(entries).path for _ in range(3)] == ["d", "d/d", "d/d/d"]
    assert len(descriptors()) > len(before)
    entries.close()  # type: ignore[attr-defined]
    assert descriptors() == before
