"""Real mounts of plain directories, each served by a process of its own and taken down whatever happens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_mount import PlainMount, tear_down


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    if path.exists():
        shutil.rmtree(path)


@pytest.fixture
def make_mount(base: Path) -> Iterator[Callable[..., PlainMount]]:
    """Mounts that a test makes itself, with settings as ``name=json``."""
    made: list[PlainMount] = []

    def make(*settings: str) -> PlainMount:
        made.append(PlainMount(base, *settings))
        return made[-1]

    yield make
    try:
        for mount in made:
            mount.end()
    finally:
        if made:
            tear_down(made[0].mountpoint)


@pytest.fixture(scope="module")
def mounted() -> Iterator[PlainMount]:
    """One mount for all tests of a module; each uses names of its own."""
    path = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    path.chmod(0o755)
    mount = PlainMount(path)
    try:
        assert mount.first_answer == {"ready": True}
        yield mount
    finally:
        try:
            mount.end()
        finally:
            tear_down(mount.mountpoint)
            shutil.rmtree(path)
