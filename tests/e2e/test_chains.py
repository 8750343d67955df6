"""Overlays on bases through a real mount: archived in the right order, read and written while both are placeholders."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, image
from test_qemu_image import digest, run

SIZE = 8 * MIB


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(QUIET)
    made.start()
    return made


def make_chain(datastore: LiveDatastore, base: Path) -> Path:
    """A golden image and a linked clone with data of its own, below the mount and, the same, beside it; that one."""
    raw = base / "content.raw"
    raw.write_bytes(image(SIZE, seed=11))
    for top in (datastore.mountpoint, base / "plain"):
        (top / "golden").mkdir(parents=True)
        (top / "clone").mkdir()
        run("qemu-img", "convert", "-O", "qcow2", raw, top / "golden/base.qcow2")
        clone = top / "clone/disk.qcow2"
        run("qemu-img", "create", "-f", "qcow2", "-b", "../golden/base.qcow2", "-F", "qcow2", clone)
        run("qemu-io", "-c", "write -P 17 1M 2M", clone)
    return base / "plain/clone/disk.qcow2"


def test_a_base_goes_after_its_overlays_and_both_are_read_while_archived(datastore: LiveDatastore, base: Path) -> None:
    plain = make_chain(datastore, base)
    clone, golden = datastore.mountpoint / "clone/disk.qcow2", datastore.mountpoint / "golden/base.qcow2"
    refused = datastore.cli("archive", "golden")
    assert refused.code != 0
    assert "is the base of clone/disk.qcow2, which is resident" in refused.err + refused.out
    assert datastore.state("golden") == "resident"

    datastore.archive("golden", "clone")
    assert (datastore.state("golden"), datastore.state("clone")) == ("placeholder", "placeholder")
    datastore.restart()
    run("qemu-img", "compare", clone, plain)
    run("qemu-io", "-c", "read -P 17 1M 2M", clone)

    for path in (clone, plain):
        for command in ("write -P 34 5M 700k", "write -P 51 100k 3k", "flush"):
            run("qemu-io", "-c", command, path)
    datastore.crash()
    run("qemu-img", "check", clone)
    run("qemu-img", "compare", clone, plain)
    for vm in ("clone", "golden"):
        datastore.recall(vm)
    assert digest(golden) == digest(base / "plain/golden/base.qcow2")
    run("qemu-img", "compare", clone, plain)
    datastore.assert_nothing_left(clone, golden)


def test_an_overlay_is_archived_alone_and_its_base_stays(datastore: LiveDatastore, base: Path) -> None:
    plain = make_chain(datastore, base)
    clone = datastore.mountpoint / "clone/disk.qcow2"
    datastore.archive("clone")
    assert datastore.state("golden") == "resident"
    run("qemu-img", "compare", clone, plain)
    # While a guest has the clone open the base stays, though neither is of any use to itself.
    with clone.open("rb"):
        refused = datastore.cli("archive", "golden")
        assert refused.code != 0
        assert "which is" in refused.err + refused.out


def test_restore_writes_what_a_manifest_knows_of_bases_and_no_more(datastore: LiveDatastore, base: Path) -> None:
    """Without libvirt no definition is written, and nothing is said of one."""
    make_chain(datastore, base)
    datastore.archive("clone")
    done = datastore.cli("restore", "clone", "--to", base / "out", check=0)
    assert "define" not in done.out
    assert [path.name for path in (base / "out").iterdir()] == ["disk.qcow2"]
    only = datastore.cli("restore", "clone", "--to", base / "only", "--only-domain", check=0)
    assert "0 files" in only.out
    assert list((base / "only").iterdir()) == []
