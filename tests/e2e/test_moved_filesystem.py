"""A backing directory that goes to another host with its filesystem: a new mount, path, configuration and daemon."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, noise

from vmfs_stub.cli.exit_codes import ExitCode

CONTENTS = {name: noise(20 * MIB, seed=seed) for seed, name in enumerate(("idle", "used", "running"))}


def mount(image: Path, place: Path) -> None:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)


def unmount(place: Path) -> None:
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def image(base: Path) -> Path:
    """A filesystem of 200 MiB in a file."""
    path = base / "image"
    with path.open("wb") as file:
        file.truncate(200 * MIB)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    return path


@pytest.fixture
def hosts(base: Path, image: Path) -> Iterator[tuple[LiveDatastore, LiveDatastore]]:
    """The old host's datastore, and the new host's, which is not initialised; its filesystem is at the new place."""
    place, new_place = base / "old-disk", base / "new-disk"
    mount(image, place)
    mounted = place
    old = LiveDatastore(base / "old", store=base / "store")
    old.backing = place / "backing"
    new = LiveDatastore(base / "new", store=old.store)
    new.backing = new_place / "directory"
    for datastore in (old, new):
        datastore.base.mkdir()
    try:
        old.init(QUIET)
        old.start()
        for name, content in CONTENTS.items():
            old.add_vm(name, content)
        old.archive("idle", "used")
        with (old.mountpoint / "used/disk.raw").open("r+b") as disk:
            disk.write(b"written")
        old.stop()
        unmount(place)
        mount(image, new_place)
        mounted = new_place
        (new_place / "backing").rename(new.backing)
        yield old, new
    finally:
        old.tear_down()
        new.tear_down()
        unmount(mounted)


def test_it_is_joined_by_init_and_nothing_is_lost(hosts: tuple[LiveDatastore, LiveDatastore]) -> None:
    _, new = hosts
    pins, maps = new.pins(), new.durable_maps()
    assert len(pins) == len(maps) == 2
    new.init(QUIET)
    assert (new.pins(), new.durable_maps()) == (pins, maps)
    new.start()
    assert "watching" not in new.log()
    assert {str(row["vm"]): row["state"] for row in new.rows()} == {
        "idle": "placeholder", "used": "placeholder", "running": "resident"
    }  # fmt: skip
    assert new.client.status().healthy, new.client.status()
    used = b"written" + CONTENTS["used"][len(b"written") :]
    for name, content in (CONTENTS | {"used": used}).items():
        assert (new.mountpoint / name / "disk.raw").read_bytes() == content
    report = new.archive("running").result
    assert report is not None
    new.recall("idle", "used", "running")
    new.assert_nothing_left(*(new.backing / name / "disk.raw" for name in CONTENTS))
    assert (new.mountpoint / "used/disk.raw").read_bytes() == used


def test_it_is_not_joined_to_another_store_or_to_a_new_one(
    hosts: tuple[LiveDatastore, LiveDatastore], base: Path
) -> None:
    _, new = hosts
    words = ("--backing", new.backing, "--mountpoint", new.mountpoint, "--runtime-dir", new.runtime)
    mistyped = new.cli("init", *words, "--store", base / "stoer")
    assert mistyped.code == ExitCode.STORE, mistyped
    assert "placeholders" in mistyped.err
    assert not new.config.exists()
    assert not (base / "stoer/vmfs-store.json").exists()
    new.cli("init", *words, "--store", new.store, check=0)
