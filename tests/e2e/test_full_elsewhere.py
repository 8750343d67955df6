"""No room where it is needed next: for recalled bytes, in the store, or for the maps in the runtime directory.

Each on a real filesystem of its own that is full: what cannot be done fails and says why, what needs no room goes on,
and with room again everything works.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_datastore import BLOCK, MIB, QUIET, LiveDatastore, forget_pages, make_room, noise

from vmfs_stub.control.client import ControlClient

CONTENT = noise(20 * MIB, seed=2)
SMALL = noise(2 * MIB, seed=3)
NO_SPACE, STORE = 9, 5
REGION = 128 * MIB
"""Of a disk: each needs a page of its own in the volatile map."""


@contextlib.contextmanager
def ext4_at(mountpoint: Path, image: Path, *, size: int) -> Iterator[Path]:
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@contextlib.contextmanager
def tmpfs_at(mountpoint: Path, *, size: int) -> Iterator[Path]:
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@contextlib.contextmanager
def served(datastore: LiveDatastore) -> Iterator[LiveDatastore]:
    try:
        datastore.init(QUIET)
        datastore.start()
        yield datastore
        assert "Traceback" not in datastore.log()
    finally:
        datastore.tear_down()


@pytest.fixture
def on_small_primary(base: Path) -> Iterator[LiveDatastore]:
    with ext4_at(base / "filesystem", base / "image", size=96 * MIB) as filesystem:
        made = LiveDatastore(base)
        made.backing = filesystem / "backing"
        with served(made):
            yield made


@pytest.fixture
def with_small_store(base: Path) -> Iterator[LiveDatastore]:
    with (
        ext4_at(base / "filesystem", base / "image", size=32 * MIB) as filesystem,
        served(LiveDatastore(base, store=filesystem / "store")) as made,
    ):
        yield made


@pytest.fixture
def with_small_runtime(base: Path) -> Iterator[LiveDatastore]:
    with tmpfs_at(base / "run", size=64 * BLOCK) as runtime:
        made = LiveDatastore(base)
        made.runtime = runtime
        made.client = ControlClient(runtime / "control.sock", timeout_s=30)
        with served(made):
            yield made


def fill(path: Path) -> Path:
    """Write until nothing more fits."""
    with path.open("ab", buffering=0) as file:
        for size in (MIB, BLOCK, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return path


def read_at(path: Path, offset: int, size: int) -> bytes | int:
    """What a guest reads there, or the errno that it gets."""
    try:
        forget_pages(path)
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)
    except OSError as exc:
        assert exc.errno is not None
        return exc.errno


def test_a_recall_without_room_fails_and_works_again_when_there_is(on_small_primary: LiveDatastore) -> None:
    datastore = on_small_primary
    idle = datastore.add_vm("idle", CONTENT)
    other = datastore.add_vm("other", SMALL)
    datastore.archive("idle")
    filler = fill(datastore.add_vm("busy", b"x"))
    assert read_at(idle, 0, MIB) == errno.ENOSPC
    refused = datastore.cli("recall", "idle", check=NO_SPACE)
    assert "idle" in refused.err
    assert read_at(other, 0, len(SMALL)) == SMALL
    with other.open("r+b") as file:
        assert file.write(SMALL[:BLOCK][::-1]) == BLOCK
        os.fsync(file.fileno())
    assert read_at(other, 0, BLOCK) == SMALL[:BLOCK][::-1]
    assert read_at(idle, 5 * MIB, MIB) == errno.ENOSPC
    make_room(filler)
    assert read_at(idle, 5 * MIB, MIB) == CONTENT[5 * MIB : 6 * MIB]
    assert idle.read_bytes() == CONTENT
    datastore.recall("idle")
    datastore.assert_nothing_left(datastore.backing_of(idle))


def test_an_archive_into_a_full_store_fails_and_the_vm_is_as_it_was(with_small_store: LiveDatastore) -> None:
    datastore = with_small_store
    filler = fill(datastore.store.parent / "filler")
    vm = datastore.add_vm("vm", CONTENT)
    for _ in range(2):
        failed = datastore.cli("archive", "vm", check=STORE)
        assert "no room" in failed.err + failed.out
        assert datastore.state("vm") == "resident"
        assert datastore.private_xattrs(datastore.backing_of(vm)) == []
        assert (datastore.durable_maps(), datastore.pins()) == ([], [])
        assert read_at(vm, 0, len(CONTENT)) == CONTENT
    filler.unlink()
    datastore.cli("archive", "vm", check=0)
    assert datastore.state("vm") == "placeholder"
    assert read_at(vm, 0, len(CONTENT)) == CONTENT
    datastore.cli("verify", "vm", check=0)


def test_a_store_that_fills_up_while_it_is_written_to_loses_nothing(with_small_store: LiveDatastore) -> None:
    datastore = with_small_store
    vm = datastore.add_vm("vm", noise(40 * MIB, seed=4))
    small = datastore.add_vm("small", SMALL)
    datastore.cli("archive", "vm", check=STORE)
    assert datastore.state("vm") == "resident"
    assert (datastore.durable_maps(), datastore.pins()) == ([], [])
    assert read_at(vm, 0, 40 * MIB) == noise(40 * MIB, seed=4)
    for pack in (datastore.store / "packs").rglob("*"):
        if pack.is_file():
            pack.unlink()  # as garbage collection would: no restore point needs them
    datastore.cli("archive", "small", check=0)
    assert read_at(small, 0, len(SMALL)) == SMALL


def test_no_room_for_the_maps_of_running_vms_is_an_error_and_no_crash(with_small_runtime: LiveDatastore) -> None:
    datastore = with_small_runtime
    assert datastore.daemon is not None
    pid = datastore.daemon.pid
    vm = datastore.add_vm("vm", SMALL)
    with vm.open("r+b") as file:
        file.truncate(2 * REGION)
        file.seek(REGION + 8 * BLOCK)
        file.write(SMALL)
    expected = {0: SMALL, REGION + 8 * BLOCK: SMALL, 4 * MIB: bytes(MIB)}
    other = datastore.add_vm("other", SMALL)
    late = datastore.add_vm("late", CONTENT)
    datastore.archive("vm")
    held = os.open(vm, os.O_RDWR)
    try:
        filler = fill(datastore.runtime / "filler")
        # Data arrives, and the page that would say so has no room: an error, not a signal that ends the daemon.
        assert read_at(vm, 0, BLOCK) == errno.ENOSPC
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(held, b"w" * BLOCK, REGION)
            os.fsync(held)
        assert read_at(other, 0, len(SMALL)) == SMALL
        assert "runtime directory" in datastore.cli("archive", "late", check=NO_SPACE).err
        assert read_at(late, 0, MIB) in (CONTENT[:MIB], errno.ENOSPC)
        datastore.cli("ls", check=0)
        filler.unlink()
        for offset, content in expected.items():
            assert read_at(vm, offset, len(content)) == content
        assert os.pwrite(held, b"w" * BLOCK, REGION) == BLOCK
        os.fsync(held)
    finally:
        os.close(held)
    assert read_at(late, 0, len(CONTENT)) == CONTENT
    datastore.cli("archive", "late", check=0)
    assert datastore.state("late") == "placeholder"
    assert datastore.client.status().daemon.pid == pid
    datastore.crash()
    assert read_at(vm, REGION, BLOCK) == b"w" * BLOCK
    assert read_at(vm, REGION + 8 * BLOCK, len(SMALL)) == SMALL
    assert read_at(late, 0, len(CONTENT)) == CONTENT
