"""Datastores served by real daemons, and processes that hold files open; all gone at the end, whatever happens."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_datastore import LiveDatastore, remove_base

from scripts.lab.datastore import Settings

MakeDatastore = Callable[..., LiveDatastore]
Hold = Callable[..., "Holder"]


class Holder:
    """A process that keeps a file open: ``mode`` is r or rw, or map for a mapping whose descriptor is closed."""

    _CODE = """
import mmap, os, sys
path, mode = sys.argv[1:]
fd = os.open(path, os.O_RDONLY if mode in ("r", "map") else os.O_RDWR)
if mode == "map":
    kept = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
print("open", flush=True)
sys.stdin.read()
"""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-c", self._CODE, str(path), mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"open\n"

    def let_go(self) -> None:
        """Close the file; it is closed on return."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory on a real filesystem for one test."""
    path = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    yield path
    remove_base(path)


@pytest.fixture
def make_datastore(base: Path) -> Iterator[MakeDatastore]:
    """Makes datastores, initialised and not mounted; the first lies in ``base`` itself."""
    made: list[LiveDatastore] = []

    def make(settings: Settings, *, store: Path | None = None) -> LiveDatastore:
        home = base if not made else base / f"datastore{len(made)}"
        home.mkdir(exist_ok=True)
        datastore = LiveDatastore(home, store=store)
        made.append(datastore)
        datastore.init(settings)
        return datastore

    yield make
    for datastore in made:
        datastore.tear_down()


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts processes that keep a file open."""
    holders: list[Holder] = []

    def start(path: Path, mode: str = "r") -> Holder:
        holders.append(Holder(path, mode))
        return holders[-1]

    yield start
    for holder in holders:
        holder.let_go()
