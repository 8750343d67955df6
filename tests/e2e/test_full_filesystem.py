"""A guest fills the backing filesystem: the datastore starts, lists, and can be archived from."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, free_bytes, make_room, noise

CONTENT = noise(20 * MIB, seed=1)
UNHEALTHY = 8


@pytest.fixture
def datastore(base: Path) -> Iterator[LiveDatastore]:
    """On a filesystem of its own, of 96 MiB."""
    image, mounted = base / "image", base / "filesystem"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    made = LiveDatastore(base)
    made.backing = mounted / "backing"
    try:
        made.init(QUIET)
        yield made
    finally:
        made.tear_down()
        subprocess.run(["umount", mounted], check=True)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("ab", buffering=0) as file:
        for size in (MIB, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def test_a_full_filesystem_is_served_and_archived_from(datastore: LiveDatastore) -> None:
    datastore.start()
    idle = datastore.add_vm("idle", CONTENT)
    busy = datastore.add_vm("busy", b"x")
    datastore.cli("ls", check=0)
    fill(busy)
    datastore.crash()
    fill(busy)
    assert {"busy", "idle"} <= {str(row["vm"]) for row in datastore.rows()}
    assert "busy: backed up" in datastore.cli("backup", "busy", check=0).out
    datastore.archive("idle")
    assert datastore.state("idle") == "placeholder"
    assert free_bytes(datastore.backing) > 8 * MIB
    make_room(busy)
    assert idle.read_bytes() == CONTENT
    datastore.restart()
    assert "index" not in datastore.cli("status", check=0).out
    assert (datastore.backing / ".vmfs-stub/reserve").stat().st_size > 0
    assert "Traceback" not in datastore.log()


def test_a_filesystem_that_is_full_at_the_end_is_served_at_the_next_start(datastore: LiveDatastore) -> None:
    datastore.start()
    idle = datastore.add_vm("idle", CONTENT)
    datastore.archive("idle")
    busy = datastore.add_vm("busy", b"x")
    fill(busy)
    datastore.stop()
    before = (datastore.backing / ".vmfs-stub/store.json").read_bytes()
    for name in ("index", "catalog"):
        for path in (datastore.backing / ".vmfs-stub").glob(f"{name}.sqlite*"):
            path.unlink()
    fill(datastore.backing / "filler")
    datastore.start()
    found = datastore.cli("status", check=UNHEALTHY).out
    assert "problem: index" in found
    assert "problem: catalog" in found
    # What has no identity yet cannot be given one; that is told, and hides no other.
    assert [row["vm"] for row in datastore.rows()] == ["idle"]
    assert "warning: VM busy: VM busy cannot be read" in datastore.cli("status", check=UNHEALTHY).out
    make_room(busy)
    (datastore.backing / "filler").unlink()
    assert idle.read_bytes() == CONTENT
    assert (datastore.backing / ".vmfs-stub/store.json").read_bytes() == before
