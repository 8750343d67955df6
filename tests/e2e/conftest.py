"""Datastores served by real daemons, and processes that hold files open; all gone at the end, whatever happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_datastore import Hold, Holder, LiveDatastore, MakeDatastore, remove_base

from scripts.lab.datastore import Settings
from scripts.lab.guest import Guest, built_guest
from scripts.lab.private_libvirt import PrivateLibvirt, private_libvirt


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

    def make(settings: Settings, *words: str | Path, store: Path | str | None = None) -> LiveDatastore:
        home = base if not made else base / f"datastore{len(made)}"
        home.mkdir(exist_ok=True)
        datastore = LiveDatastore(home, store=store)
        made.append(datastore)
        datastore.init(settings, *words)
        return datastore

    yield make
    for datastore in made:
        datastore.tear_down()


@pytest.fixture
def libvirt(base: Path) -> Iterator[PrivateLibvirt]:
    """A libvirtd of this test's own; its guests see what is mounted in ``base``.  Name it before ``make_datastore``."""
    with private_libvirt(base / "libvirt", shared=base) as running:
        yield running


@pytest.fixture(scope="session")
def guest() -> Guest:
    """A small real guest; built once a machine."""
    return built_guest()


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
