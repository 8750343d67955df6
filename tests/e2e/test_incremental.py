"""Incremental backups by the real daemon: what its mover reads, and that what it makes is the disk."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest
from live_datastore import BLOCK, CHUNK, MIB, QUIET, LiveDatastore, MakeDatastore, merged, noise, objects

from vmfs_stub.core.chunking import chunk_count

SIZE = 192 * MIB
CONTENT = noise(SIZE, seed=31)
NAME = "disk.raw"


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(merged(QUIET, {"archive": {"placeholder_bytes_min": "1 MiB"}}))
    made.start()
    return made


def back_up(datastore: LiveDatastore, *, archive: bool = False) -> int:
    """Back up ``vm``, and see that the newest restore point is the disk; returns how many bytes were read."""
    client = datastore.client
    done = datastore.wait_job(client.start_archive(["vm"]) if archive else client.start_backup(["vm"], archive=False))
    assert done.state == "done", done
    assert done.result is not None
    (outcome,) = done.result["vms"]
    restored = datastore.base / "restored"
    datastore.cli("restore", "vm", "--to", restored, check=0)
    wanted = (datastore.mountpoint / "vm" / NAME).read_bytes()
    assert (restored / NAME).read_bytes() == wanted
    (restored / NAME).unlink()
    restored.rmdir()
    read_bytes = outcome["read_bytes"]
    assert isinstance(read_bytes, int)
    return read_bytes


def write(path: Path, *offsets: int, length: int = 100) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in offsets:
            os.pwrite(fd, random.Random(offset).randbytes(length), offset)
    finally:
        os.close(fd)


def read_by_mover(datastore: LiveDatastore) -> int:
    """Bytes that the daemon's children have read of files so far, as the kernel counts them."""
    assert datastore.daemon is not None
    children = Path(f"/proc/{datastore.daemon.pid}/task/{datastore.daemon.pid}/children").read_text().split()
    counts = [Path(f"/proc/{child}/io").read_text().split() for child in children]
    return sum(int(count[count.index("rchar:") + 1]) for count in counts)


def test_of_one_percent_that_changed_little_more_is_read(datastore: LiveDatastore) -> None:
    """1 % in runs of 384 KiB that begin at any block: a chunk of which a block changed has to be read."""
    path = datastore.add_vm("vm", CONTENT)
    assert back_up(datastore) == SIZE
    length = 96 * BLOCK
    runs = SIZE // 100 // length
    apart = SIZE // BLOCK // runs
    offsets = [(at * apart + random.Random(at).randrange(16)) * BLOCK for at in range(runs)]
    write(path, *offsets, length=length)
    before, stored = read_by_mover(datastore), len(objects(datastore.store / "segments"))
    read_bytes = back_up(datastore)
    counted = read_by_mover(datastore) - before
    changed = runs * length
    print(f"changed {changed}, read {read_bytes}: {read_bytes / changed:.2f}; the mover read {counted} in all")
    assert changed <= read_bytes <= 1.3 * changed
    # A backup releases nothing, and reads nothing back; of the last restore point it reads manifest and table.
    assert counted <= 1.1 * read_bytes + 80 * chunk_count(SIZE, CHUNK) + MIB
    assert len(objects(datastore.store / "segments")) == stored + 1
    assert back_up(datastore) == 0


def test_after_kill_and_restart_no_change_is_missed_and_little_is_read(datastore: LiveDatastore) -> None:
    path = datastore.add_vm("vm", CONTENT)
    back_up(datastore)
    write(path, 5 * MIB, 77 * MIB)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"acknowledged", 100 * MIB)
    datastore.kill()
    with contextlib.suppress(OSError):
        os.close(fd)  # which the dead mount does not answer
    datastore.start()
    write(path, 120 * MIB)
    assert back_up(datastore) == 4 * CHUNK
    datastore.crash()
    assert back_up(datastore) == 0
    write(path, 9 * MIB)
    datastore.restart()
    write(path, 11 * MIB)
    assert back_up(datastore) == 2 * CHUNK


def test_a_placeholder_that_a_guest_has_written_to(datastore: LiveDatastore) -> None:
    path = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    write(path, 50 * MIB, length=CHUNK)
    recalled = datastore.client.status().daemon.recalled_bytes
    done = datastore.wait_job(datastore.client.start_backup(["vm"], archive=False))
    assert done.result is not None
    assert done.result["vms"][0]["read_bytes"] == CHUNK
    assert datastore.client.status().daemon.recalled_bytes == recalled
    assert back_up(datastore) == 0
    datastore.recall("vm")
    write(path, 60 * MIB)
    assert back_up(datastore, archive=True) == CHUNK
    assert datastore.state("vm") == "placeholder"


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_what_is_done_behind_the_mount_is_read(datastore: LiveDatastore, how: str) -> None:
    path = datastore.backing_of(datastore.add_vm("vm", CONTENT))
    back_up(datastore)
    datastore.stop()
    st = path.stat()
    if how == "written":
        write(path, 70 * MIB)
    else:
        new = path.with_name("new")
        new.write_bytes(noise(SIZE, seed=32))
        new.rename(path)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    datastore.start()
    assert back_up(datastore) == SIZE


def test_owners_and_names_that_change_through_the_mount_cost_nothing(datastore: LiveDatastore) -> None:
    path = datastore.add_vm("vm", CONTENT)
    back_up(datastore)
    path.chmod(0o640)
    os.chown(path, 12345, 12345)
    path.rename(path.with_name("other.raw")).rename(path)
    os.setxattr(path, "user.note", b"kept")
    assert back_up(datastore) == 0
    datastore.restart()
    assert back_up(datastore) == 0
