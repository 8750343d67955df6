"""Who has a disk open, and what an archive does about it: refuse, give up, or be cut short; never lose a byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_datastore import (
    BLOCK,
    CHUNK,
    MIB,
    QUIET,
    Hold,
    LiveDatastore,
    MakeDatastore,
    forget_pages,
    image,
    merged,
    noise,
    wait_until,
)

from vmfs_stub.core.names import PLACEHOLDER_XATTR

REFUSED = 4
SIZE = 8 * MIB


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(QUIET)
    made.start()
    return made


# Refused


@pytest.mark.parametrize("mode", ["r", "rw", "map"])
@pytest.mark.parametrize("where", ["mount", "backing"])
def test_archive_is_refused_while_a_disk_is_open(datastore: LiveDatastore, hold: Hold, where: str, mode: str) -> None:
    content = noise(SIZE, seed=1)
    disk = datastore.add_vm("vm", content)
    holder = hold(disk if where == "mount" else datastore.backing_of(disk), mode)
    refused = datastore.cli("archive", "vm", check=REFUSED)
    assert "VM vm" in refused.err
    assert "open" in refused.err
    assert datastore.state("vm") == "resident"
    assert (datastore.durable_maps(), datastore.pins()) == ([], [])
    holder.let_go()
    wait_until("it is closed", lambda: datastore.client.status().mount.open_disks == 0)
    datastore.cli("archive", "vm", check=0)
    assert datastore.state("vm") == "placeholder"
    assert disk.read_bytes() == content


@pytest.mark.parametrize("mode", ["r", "rw", "map"])
def test_archive_is_refused_while_a_holder_outlives_the_daemon(datastore: LiveDatastore, hold: Hold, mode: str) -> None:
    """As a guest's passthrough descriptor does: no daemon knows of it."""
    content = noise(SIZE, seed=2)
    disk = datastore.add_vm("vm", content)
    holder = hold(datastore.backing_of(disk), mode)
    datastore.crash()
    refused = datastore.cli("archive", "vm", check=REFUSED)
    assert "VM vm" in refused.err
    holder.let_go()
    datastore.cli("archive", "vm", check=0)
    assert disk.read_bytes() == content


def test_one_open_disk_of_two_keeps_the_vm_whole(datastore: LiveDatastore, hold: Hold) -> None:
    first, second = noise(SIZE, seed=3), noise(SIZE, seed=4)
    datastore.add_vm("vm", first, disk="a.raw")
    held = datastore.add_vm("vm", second, disk="b.raw")
    holder = hold(datastore.backing_of(held))
    datastore.cli("archive", "vm", check=REFUSED)
    assert {row["state"] for row in datastore.rows()} == {"resident"}
    holder.let_go()
    datastore.cli("archive", "vm", check=0)
    assert {row["state"] for row in datastore.rows()} == {"placeholder"}


def test_a_vm_in_use_stops_no_other_and_a_name_that_is_none_stops_all(datastore: LiveDatastore, hold: Hold) -> None:
    names = ("first", "held", "last")
    disks = {name: datastore.add_vm(name, noise(SIZE, seed=seed)) for seed, name in enumerate(names, start=20)}
    holder = hold(disks["held"])
    assert "'frist'" in datastore.cli("archive", "last", "frist", check=3).err
    assert datastore.client.jobs() == []
    done = datastore.cli("archive", *names, check=REFUSED)
    assert ("first: archived" in done.out, "last: archived" in done.out) == (True, True)
    assert "held: skipped: VM held is in use" in done.err
    assert [datastore.state(name) for name in names] == ["placeholder", "resident", "placeholder"]
    holder.let_go()


def test_backup_of_all_skips_who_is_used_outside_the_mount_and_backs_up_the_rest(
    datastore: LiveDatastore, hold: Hold
) -> None:
    contents = {name: noise(SIZE, seed=seed) for seed, name in enumerate(("outside", "used", "idle"), start=5)}
    disks = {name: datastore.add_vm(name, content) for name, content in contents.items()}
    hold(datastore.backing_of(disks["outside"]))
    hold(disks["used"])
    done = datastore.cli("backup", check=0)
    assert "outside: skipped" in done.out
    assert datastore.cli("points", "outside").code == 3
    for name in ("used", "idle"):
        assert f"{name}: backed up" in done.out
        target = datastore.base / f"restored-{name}"
        datastore.cli("restore", name, "--to", target, check=0)
        assert (target / "disk.raw").read_bytes() == contents[name]


def test_backup_without_archive_restores_equal_elsewhere(datastore: LiveDatastore, base: Path) -> None:
    content = image(SIZE + 777, seed=7)
    disk = datastore.add_vm("vm", content)
    disk.chmod(0o640)
    os.utime(disk, ns=(10**18 + 1, 10**18 + 7))
    os.setxattr(disk, "user.note", b"kept")
    (disk.parent / "nvram").write_bytes(b"small")
    datastore.cli("backup", "vm", "--no-archive", check=0)
    assert {row["state"] for row in datastore.rows()} == {"resident"}
    datastore.stop()  # restore needs no daemon
    url = datastore.store.as_uri()
    datastore.cli("restore", "vm", "--to", base / "restored", "--store", url, check=0)
    restored = base / "restored/disk.raw"
    assert restored.read_bytes() == content
    assert (restored.stat().st_mode & 0o777, restored.stat().st_mtime_ns) == (0o640, 10**18 + 7)
    assert os.getxattr(restored, "user.note") == b"kept"
    assert (base / "restored/nvram").read_bytes() == b"small"
    datastore.cli("restore", "vm", "--to", base / "restored", check=REFUSED)


def test_second_daemon_is_refused(datastore: LiveDatastore) -> None:
    assert datastore.daemon is not None
    content = noise(SIZE, seed=8)
    disk = datastore.add_vm("vm", content)
    refused = datastore.cli("mount", check=REFUSED)
    assert str(datastore.daemon.pid) in refused.err
    datastore.cli("mount", "--background", check=REFUSED)
    other = datastore.config.with_name("other.toml")
    text = datastore.config.read_text().replace(str(datastore.mountpoint), str(datastore.base / "mount2"))
    other.write_text(text.replace(str(datastore.runtime), str(datastore.base / "run2")))
    command = [sys.executable, "-m", "vmfs_stub.cli.main", "--config", str(other), "mount"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == REFUSED, done
    assert str(datastore.backing) in done.stderr
    assert disk.read_bytes() == content


# An open that wins


def copying(datastore: LiveDatastore, job_id: str) -> bool:
    """Whether the job has begun to copy; fails when it is over already."""
    info = datastore.client.job(job_id)  # type: ignore[arg-type]
    assert info.state == "running", info
    return info.progress.done_bytes > 0


def open_and_write(path: Path, content: bytearray, *, number: int) -> float:
    """A guest that starts during an archive; how long its open took, in seconds."""
    started = time.monotonic()
    fd = os.open(path, os.O_RDWR)
    opened = time.monotonic() - started
    try:
        data = b"guest %d" % number
        os.pwrite(fd, data, number * CHUNK + 5)
        content[number * CHUNK + 5 : number * CHUNK + 5 + len(data)] = data
        os.fsync(fd)
    finally:
        os.close(fd)
    return opened


def test_an_open_during_the_copy_wins(datastore: LiveDatastore) -> None:
    content = bytearray(noise(96 * MIB, seed=9))
    disk = datastore.add_vm("vm", bytes(content))
    job_id = datastore.client.start_archive(["vm"])
    wait_until("it copies", lambda: copying(datastore, job_id), poll_s=0)
    assert open_and_write(disk, content, number=3) < 5
    info = datastore.wait_job(job_id)
    assert info.error is not None
    assert (info.error.error, "VM vm" in info.error.message) == ("Abandoned", True)
    assert datastore.state("vm") == "resident"
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert disk.read_bytes() == content
    assert datastore.backing_of(disk).read_bytes() == content
    datastore.cli("archive", "vm", check=0)
    forget_pages(disk)
    assert disk.read_bytes() == content


def test_an_open_outside_the_mount_during_the_copy_wins(datastore: LiveDatastore) -> None:
    """The kernel lets it wait until the archive has given the file back."""
    content = bytearray(noise(64 * MIB, seed=10))
    disk = datastore.add_vm("vm", bytes(content))
    job_id = datastore.client.start_archive(["vm"])
    wait_until("it copies", lambda: copying(datastore, job_id), poll_s=0)
    assert open_and_write(datastore.backing_of(disk), content, number=3) < 20
    info = datastore.wait_job(job_id)
    assert info.error is not None
    assert info.error.error == "Abandoned"
    datastore.assert_nothing_left(datastore.backing_of(disk))
    forget_pages(disk)
    assert disk.read_bytes() == content


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_races_between_opens_and_an_archive(datastore: LiveDatastore, seed: int) -> None:
    """At moments all over the job: either it gives up, or the guest finds a placeholder; the bytes are the same."""
    rng, outcomes = random.Random(seed), set()
    content = bytearray(image(16 * MIB, seed=seed))
    disk = datastore.add_vm("vm", bytes(content))
    started = time.monotonic()
    datastore.archive("vm")
    duration_s = time.monotonic() - started
    for number in range(8):
        job_id = datastore.client.start_archive(["vm"])
        time.sleep(rng.random() * duration_s)  # the moment is what is varied
        assert open_and_write(disk, content, number=number) < 5
        info = datastore.wait_job(job_id)
        outcomes.add(info.state)
        assert info.error is None or info.error.error in {"Abandoned", "InUse"}, info
        forget_pages(disk)
        assert disk.read_bytes() == content
        wait_until("no pin is left over", lambda: len(datastore.durable_maps()) == len(datastore.pins()) <= 1)
        if rng.random() < 0.5:
            datastore.recall("vm")
            datastore.assert_nothing_left(datastore.backing_of(disk))
    datastore.cli("status", check=0)
    datastore.crash()
    assert disk.read_bytes() == content
    datastore.archive("vm")
    assert "Traceback" not in datastore.log()


# Cut short


def map_appears(datastore: LiveDatastore, disk: Path, before: set[str]) -> bool:
    return {path.name for path in datastore.durable_maps()} > before


def record_appears(datastore: LiveDatastore, disk: Path, before: set[str]) -> bool:
    return PLACEHOLDER_XATTR in os.listxattr(datastore.backing_of(disk))


def space_is_released(datastore: LiveDatastore, disk: Path, before: set[str]) -> bool:
    st = datastore.backing_of(disk).stat()
    return st.st_blocks * 512 < st.st_size // 2


def kill_at(datastore: LiveDatastore, moment: Callable[[], bool]) -> None:
    """Archive, and kill the daemon at that moment, or when the job ends without it."""
    job_id = datastore.client.start_archive(["vm"])
    end_s = time.monotonic() + 30
    while not moment() and time.monotonic() < end_s:
        if datastore.client.job(job_id).state != "running":
            break
    datastore.kill()


@pytest.mark.parametrize("seed", [1])
def test_daemon_killed_in_the_middle_of_an_archive(datastore: LiveDatastore, seed: int) -> None:
    """Twenty times, at moments all over the job and right after each of its steps."""
    rng = random.Random(seed)
    content = bytearray(image(16 * MIB, seed=seed))
    disk = datastore.add_vm("vm", bytes(content))
    started = time.monotonic()
    datastore.archive("vm")
    duration_s = time.monotonic() - started
    datastore.recall("vm")
    ended_as = set()
    steps = [map_appears, record_appears, space_is_released]
    moments: list[Callable[[LiveDatastore, Path, set[str]], bool] | float] = [rng.random() for _ in range(12)]
    moments += steps * 3
    rng.shuffle(moments)
    for number, moment in enumerate(moments):
        if callable(moment):
            known = {path.name for path in datastore.durable_maps()}
            kill_at(datastore, lambda moment=moment, known=known: moment(datastore, disk, known))  # type: ignore[misc]
        else:
            end_s = time.monotonic() + moment * 1.2 * duration_s
            kill_at(datastore, lambda end_s=end_s: time.monotonic() >= end_s)  # type: ignore[misc]
        datastore.start()
        status = datastore.client.status()
        assert (status.healthy, status.findings) == (True, []), (moment, status)
        ended_as.add(datastore.state("vm"))
        assert disk.read_bytes() == content, f"kill {number} at {moment}"
        at, data = number * 7 * BLOCK + number, b"after kill %d" % number
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(data)
        content[at : at + len(data)] = data
        datastore.recall("vm")
        wait_until("what is left goes", lambda: not (datastore.pins() or datastore.durable_maps()))
        datastore.assert_nothing_left(datastore.backing_of(disk))
    assert ended_as == {"resident", "placeholder"}, "the kills all came too early or too late"
    datastore.cli("archive", "vm", check=0)
    datastore.cli("verify", check=0)
    forget_pages(disk)
    assert disk.read_bytes() == content
    assert "Traceback" not in datastore.log()


def test_daemon_killed_while_a_half_recalled_disk_is_archived_again(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(merged(QUIET, {"archive": {"workers": 1}}))
    datastore.start()
    rng = random.Random(5)
    content = bytearray(image(16 * MIB, seed=5))
    disk = datastore.add_vm("vm", bytes(content))
    datastore.archive("vm")
    for number in range(8):
        at, data = rng.randrange(len(content) - 100), b"written before archive %d" % number
        with disk.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, at)
        content[at : at + len(data)] = data
        known = {path.name for path in datastore.durable_maps()}
        if number % 2:
            kill_at(datastore, lambda known=known: map_appears(datastore, disk, known))  # type: ignore[misc]
        else:
            end_s = time.monotonic() + rng.random() * 0.3
            kill_at(datastore, lambda end_s=end_s: time.monotonic() >= end_s)  # type: ignore[misc]
        datastore.start()
        status = datastore.client.status()
        assert (status.healthy, status.findings) == (True, []), status
        wait_until("one placeholder is left", lambda: len(datastore.durable_maps()) == len(datastore.pins()) == 1)
        with disk.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), len(data), at) == data
        if number == 5:
            assert disk.read_bytes() == content
            datastore.archive("vm")
    assert disk.read_bytes() == content
    datastore.recall("vm")
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert datastore.backing_of(disk).read_bytes() == content
