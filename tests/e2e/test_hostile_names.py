"""What a user of one VM does to its files and their names is that VM's trouble, and nobody else's."""

from __future__ import annotations

import json
import os

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, forget_pages, noise

UNHEALTHY = 8
CONTENT = noise(2 * MIB, seed=1)


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(QUIET)
    made.start()
    made.add_vm("web", CONTENT)
    return made


def test_a_vm_that_cannot_be_read_spoils_no_command_for_others(datastore: LiveDatastore) -> None:
    (datastore.mountpoint / "mine" / "/".join(["d"] * 70)).mkdir(parents=True)
    assert [row["vm"] for row in datastore.rows()] == ["web"]
    datastore.cli("archive", "web", check=0)
    assert "VM mine cannot be read: directories" in datastore.cli("archive", "mine").err
    everything = datastore.cli("backup")
    assert everything.code != 0
    assert "web: backed up" in everything.out
    assert "mine: failed: VM mine cannot be read" in everything.err
    status = datastore.cli("status", check=0)
    assert "warning: VM mine: VM mine cannot be read" in status.out
    datastore.crash()
    assert [row["state"] for row in datastore.rows()] == ["placeholder"]


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"\x1b]0;evil\x07\nline", "caf\u00e9".encode(), "\u4e8b\u52d9 \u6240".encode()],
    ids=["no text", "not printable", "accent", "wide"],
)
def test_names_that_are_not_ascii_text(datastore: LiveDatastore, name: bytes) -> None:
    text = os.fsdecode(name)
    path = datastore.add_vm(f"vm{text}", CONTENT, disk=text)
    (row,) = (row for row in datastore.rows() if row["vm"] != "web")
    shown = str(row["vm"])
    assert shown.isprintable()
    assert str(row["disk"]).isprintable()
    assert str(row["path"]).isprintable()
    assert datastore.cli("ls", check=0).out.replace("\n", "").replace("\t", "").isprintable()
    datastore.cli("archive", shown, check=0)
    assert datastore.state(shown) == "placeholder"
    # Recalls of it fail, and the message has its name.
    (datastore.store / "packs").rename(datastore.base / "packs")
    with pytest.raises(OSError, match="Input/output"):
        path.read_bytes()
    (datastore.base / "packs").rename(datastore.store / "packs")
    found = json.loads(datastore.cli("status", "--json").out)
    assert any(shown in finding["subject"] for finding in found["findings"])
    # And so does the start that finds it damaged.
    datastore.stop()
    for each in datastore.durable_maps():
        each.unlink()
    datastore.start()
    status = datastore.cli("status", check=UNHEALTHY).out
    assert shown in status
    assert all(line.isprintable() for line in status.splitlines())
    assert all(line.isprintable() for line in datastore.log().splitlines())
    other = datastore.mountpoint / "web/disk.raw"
    forget_pages(other)
    assert other.read_bytes() == CONTENT
    datastore.cli("restore", shown, "--to", datastore.base / "restored", check=0)
    assert (datastore.base / "restored" / text).read_bytes() == CONTENT
