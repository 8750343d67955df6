"""The programs that administrators use on image files: what they make of a placeholder is what was archived."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from live_datastore import CHUNK, MIB, QUIET, LiveDatastore, MakeDatastore, image

SIZE = 16 * MIB


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(QUIET)
    made.start()
    return made


def test_qemu_img_checks_converts_and_compares_an_archived_qcow2(datastore: LiveDatastore, base: Path) -> None:
    raw, plain = base / "content.raw", base / "plain.qcow2"
    raw.write_bytes(image(SIZE, seed=1) + bytes(SIZE) + image(SIZE, seed=2))
    run("qemu-img", "convert", "-O", "qcow2", raw, plain)
    disk = datastore.mountpoint / "vm/disk.qcow2"
    disk.parent.mkdir()
    run("cp", plain, disk)
    datastore.archive("vm")
    datastore.restart()  # nothing of it is in the kernel's cache

    run("qemu-img", "check", disk)
    assert datastore.state("vm") == "placeholder"
    run("qemu-img", "compare", disk, raw)
    datastore.recall("vm")
    datastore.archive("vm")
    datastore.restart()
    run("qemu-img", "convert", "-O", "raw", disk, base / "converted.raw")
    assert digest(base / "converted.raw") == digest(raw)
    assert digest(disk) == digest(plain)


def test_qemu_io_writes_into_an_archived_qcow2(datastore: LiveDatastore, base: Path) -> None:
    plain = base / "plain.qcow2"
    run("qemu-img", "create", "-f", "qcow2", plain, "64M")
    run("qemu-io", "-c", "write -P 17 3M 9M", plain)
    disk = datastore.mountpoint / "vm/disk.qcow2"
    disk.parent.mkdir()
    run("cp", plain, disk)
    datastore.archive("vm")
    datastore.restart()
    for path in (disk, plain):
        for command in ("read -P 17 5M 1M", "write -P 34 4M 700k", "write -P 51 40M 3M", "discard 10M 1M", "flush"):
            run("qemu-io", "-d", "unmap", "-c", command, path)
    datastore.crash()
    run("qemu-img", "check", disk)
    run("qemu-img", "compare", disk, plain)
    assert "Pattern verification failed" not in run("qemu-io", "-c", "read -P 34 4M 700k", disk)


def test_qemu_writes_a_raw_disk_without_cache_and_with_native_aio(datastore: LiveDatastore, base: Path) -> None:
    plain = base / "plain.raw"
    plain.write_bytes(image(SIZE, seed=3))
    disk = datastore.add_vm("vm", plain.read_bytes())
    datastore.archive("vm")
    for path in (disk, plain):
        for command in ("write -P 7 1M 3M", "write -z 5M 2M", "write -P 9 12345344 512", "flush"):
            run("qemu-io", "-f", "raw", "-t", "none", "-i", "native", "-c", command, path)
    datastore.crash()
    assert digest(disk) == digest(plain)


@pytest.mark.parametrize("holes", [True, False], ids=["with-holes", "full"])
def test_copiers_that_look_for_holes_copy_absent_bytes(datastore: LiveDatastore, base: Path, holes: bool) -> None:
    content = image(SIZE, seed=4)
    if holes:
        content = bytes(4 * MIB) + content[4 * MIB :]
    wanted = hashlib.sha256(content).hexdigest()
    disk = datastore.add_vm("vm", content)
    copies = {
        "tar": lambda: run("sh", "-c", f"tar -C {disk.parent} -Scf - disk.raw | tar -C {base / 'tar'} -xf -"),
        "cp": lambda: run("cp", "--sparse=always", disk, base / "cp/disk.raw"),
        "cp-auto": lambda: run("cp", "--sparse=auto", disk, base / "cp-auto/disk.raw"),
        "dd": lambda: run("dd", f"if={disk}", f"of={base / 'dd/disk.raw'}", "bs=1M", "conv=sparse"),
    }
    for name, copy in copies.items():
        (base / name).mkdir()
        datastore.archive("vm")
        datastore.restart()
        assert disk.stat().st_blocks > 0
        copy()
        assert digest(base / name / "disk.raw") == wanted, name
        datastore.recall("vm")
    assert datastore.backing_of(disk).stat().st_size == SIZE


def test_a_look_at_the_head_of_a_disk_recalls_nothing(make_datastore: MakeDatastore) -> None:
    """blkid and libvirt look at the first bytes: with the usual resident ends that wakes nobody."""
    datastore = make_datastore({"hydration": {"enabled": False}})
    datastore.start()
    disk = datastore.add_vm("vm", image(SIZE, seed=5))
    datastore.archive("vm")
    datastore.restart()
    run("qemu-img", "info", "--output=json", disk)
    with disk.open("rb") as file:
        file.seek(-CHUNK, 2)
        file.read()
    assert datastore.client.status().daemon.recalled_bytes == 0
