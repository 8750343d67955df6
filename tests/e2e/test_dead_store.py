"""A store that does not answer, or is not there: reads end at the deadline, nobody else notices, and it can come back.

The store that hangs is a directory below a small mount, served by a process of its own that is stopped (SIGSTOP).
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from live_datastore import (
    BLOCK,
    CHUNK,
    MIB,
    QUIET,
    LiveDatastore,
    MakeDatastore,
    detach,
    merged,
    noise,
    readable_ranges,
    wait_until,
)

PLAIN_DAEMON = Path(__file__).parent.parent / "mount/plain_daemon.py"
READERS = Path(__file__).with_name("waiting_readers.py")

DEADLINE_S = 5.0
SIZE = 32 * MIB
CONTENT = noise(SIZE, seed=1)
READS, PROCESSES = 200, 4

IMPATIENT = merged(
    QUIET,
    {"recall": {"recall_deadline_s": DEADLINE_S, "store_timeout_s": 4}, "mount": {"attr_timeout_s": 0}},
)
"""Every stat reaches the daemon."""


class Readers:
    """Processes that read one block of each chunk of ``path``, all at once."""

    def __init__(self, path: Path, chunks: range) -> None:
        self.chunks = chunks
        command = [sys.executable, str(READERS), str(path)]
        self.processes = [
            subprocess.Popen(
                [*command, *(str(chunk * CHUNK) for chunk in chunks[at::PROCESSES])], stdout=subprocess.PIPE
            )
            for at in range(PROCESSES)
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"

    def results(self, timeout_s: float) -> dict[int, tuple[float, int, bytes]]:
        """By chunk: seconds, errno, bytes."""
        found = {}
        for at, process in enumerate(self.processes):
            out, _ = process.communicate(timeout=timeout_s)
            for chunk, (took_s, code, data) in zip(self.chunks[at::PROCESSES], json.loads(out), strict=True):
                found[chunk] = (took_s, code, bytes.fromhex(data))
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def read_at_once() -> Iterator[Callable[[Path, range], Readers]]:
    """Starts readers."""
    started: list[Readers] = []

    def start(path: Path, chunks: range) -> Readers:
        started.append(Readers(path, chunks))
        return started[-1]

    yield start
    for readers in started:
        readers.end()


@pytest.fixture
def hanging(base: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A directory for a store that hangs while its process is stopped."""
    far, near = base / "far", base / "near"
    for directory in (far, near, far / ".vmfs-stub"):
        directory.mkdir()
    command = [sys.executable, str(PLAIN_DAEMON), str(far), str(near), "attr_timeout_s=0"]
    with (base / "far.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}, (base / "far.log").read_text()
        yield near / "store", process
    finally:
        process.kill()  # whatever waits for it gets an error now
        process.communicate()
        detach(near)


Times = dict[str, list[float]]


def measure(folder: Path, times: Times, *, rounds: int) -> None:
    """Add how long each call takes, in seconds; every one goes to the daemon."""
    fd = os.open(folder / "a.raw", os.O_RDWR | os.O_DIRECT)
    block = mmap.mmap(-1, BLOCK)
    calls: dict[str, Callable[[int], object]] = {
        "stat": lambda offset: (folder / "b.raw").stat(),
        "ls": lambda offset: list(folder.iterdir()),
        "read": lambda offset: os.preadv(fd, [block], offset),
        "write": lambda offset: os.pwritev(fd, [block], offset),
    }
    try:
        for number in range(rounds):
            for name, call in calls.items():
                started = time.perf_counter()
                call(number % 64 * BLOCK)
                times.setdefault(name, []).append(time.perf_counter() - started)
    finally:
        os.close(fd)


def assert_as_fast(before: Times, during: Times) -> None:
    """Generous, for a busy machine; a call that waits for the store takes seconds."""
    for name in before:
        medians = [statistics.median(times[name]) for times in (before, during)]
        tails = [sorted(times[name])[len(times[name]) * 95 // 100] for times in (before, during)]
        assert medians[1] <= 3 * medians[0] + 0.001, f"median of {name}: {medians}"
        assert tails[1] <= 4 * tails[0] + 0.010, f"95th percentile of {name}: {tails}"


def test_checker_tells_slow_from_fast() -> None:
    fast, slow = {"stat": [0.001] * 100}, {"stat": [0.001] * 90 + [1.0] * 10}
    assert_as_fast(fast, fast)
    with pytest.raises(AssertionError, match="95th"):
        assert_as_fast(fast, slow)


@pytest.fixture
def archived(
    make_datastore: MakeDatastore, hanging: tuple[Path, subprocess.Popen[bytes]]
) -> tuple[LiveDatastore, Path, subprocess.Popen[bytes]]:
    """A datastore on a store that can hang, an archived disk of it, and the process to stop."""
    store, process = hanging
    datastore = make_datastore(IMPATIENT, store=store)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.add_vm("resident", bytes(MIB), disk="a.raw")
    datastore.add_vm("resident", bytes(MIB), disk="b.raw")
    datastore.archive("vm")
    return datastore, disk, process


def test_two_hundred_reads_of_a_hanging_store(
    archived: tuple[LiveDatastore, Path, subprocess.Popen[bytes]], read_at_once: Callable[[Path, range], Readers]
) -> None:
    datastore, disk, process = archived
    resident = datastore.mountpoint / "resident"
    before: Times = {}
    during: Times = {}
    for cycle in range(2):
        chunks = range(cycle * READS, (cycle + 1) * READS)
        measure(resident, before, rounds=100)
        process.send_signal(signal.SIGSTOP)
        try:
            readers = read_at_once(disk, chunks)
            wait_until("all of them wait", lambda: waiting(datastore) == READS, deadline_s=3)
            measure(resident, during, rounds=100)
            assert waiting(datastore) == READS, "measured too slowly: the reads are over already"
            results = readers.results(timeout_s=60)
        finally:
            process.send_signal(signal.SIGCONT)
        for chunk, (took_s, code, data) in results.items():
            assert (code, data) == (errno.EIO, b""), f"chunk {chunk}"
            assert DEADLINE_S - 2 <= took_s <= DEADLINE_S + 2, f"chunk {chunk} after {took_s:.1f} s"
        assert "VM vm" in datastore.log()

        # It is back: so is every byte, also of those that were asked for before.
        wait_until("reads are tried again", partial(block_of, disk, chunks[-1]))
        back = read_at_once(disk, chunks).results(timeout_s=60)
        for chunk, (_, code, data) in back.items():
            assert (code, data) == (0, CONTENT[chunk * CHUNK : chunk * CHUNK + BLOCK]), f"chunk {chunk}"
    assert_as_fast(before, during)
    assert disk.read_bytes() == CONTENT
    wait_until("the store is seen again", lambda: datastore.client.status().store.reachable)
    datastore.cli("status", check=0)
    datastore.stop()


def block_of(path: Path, chunk: int) -> bytes:
    """One block, nothing when it cannot be read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, BLOCK, chunk * CHUNK)
    except OSError:
        return b""
    finally:
        os.close(fd)


def waiting(datastore: LiveDatastore) -> int:
    return datastore.client.status().daemon.waiting_reads


def test_guests_read_on_from_the_replica_while_the_store_hangs(
    make_datastore: MakeDatastore,
    hanging: tuple[Path, subprocess.Popen[bytes]],
    base: Path,
    read_at_once: Callable[[Path, range], Readers],
) -> None:
    """Each wait is that for the store, a short one, and most reads do not wait for it at all."""
    store, process = hanging
    settings = merged(IMPATIENT, {"recall": {"recall_deadline_s": 25, "store_timeout_s": 4}})
    datastore = make_datastore(settings, "--replica", (base / "replica").as_uri(), store=store)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    assert block_of(disk, 200) == CONTENT[200 * CHUNK : 200 * CHUNK + BLOCK]  # the VM is claimed, which needs the store
    process.send_signal(signal.SIGSTOP)
    try:
        found = read_at_once(disk, range(60)).results(timeout_s=60)
        for chunk, (_, code, data) in found.items():
            assert (code, data) == (0, CONTENT[chunk * CHUNK : chunk * CHUNK + BLOCK]), f"chunk {chunk}"
        times = []
        for chunk in range(100, 160):
            started = time.monotonic()
            assert block_of(disk, chunk) == CONTENT[chunk * CHUNK : chunk * CHUNK + BLOCK]
            times.append(time.monotonic() - started)
        assert statistics.median(times) < 1
        assert max(times) < 15
    finally:
        process.send_signal(signal.SIGCONT)
    wait_until("the store is seen again", lambda: datastore.client.status().store.reachable)
    assert disk.read_bytes() == CONTENT


def test_unmount_by_force_while_the_store_hangs(
    archived: tuple[LiveDatastore, Path, subprocess.Popen[bytes]], read_at_once: Callable[[Path, range], Readers]
) -> None:
    datastore, disk, process = archived
    process.send_signal(signal.SIGSTOP)
    try:
        readers = read_at_once(disk, range(40))
        wait_until("all of them wait", lambda: waiting(datastore) == 40, deadline_s=3)
        datastore.cli("unmount", check=4)
        datastore.cli("unmount", "--force", check=0)
        assert datastore.daemon is not None
        assert datastore.daemon.wait(timeout=30) == 0
        failed = readers.results(timeout_s=10)
        assert all(code and not data for _, code, data in failed.values())
    finally:
        process.send_signal(signal.SIGCONT)
    datastore.start()
    assert disk.read_bytes() == CONTENT


def test_jobs_on_a_hanging_store_end_and_others_do_not_notice(
    make_datastore: MakeDatastore, hanging: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    store, process = hanging
    datastore = make_datastore(merged(IMPATIENT, {"recall": {"store_timeout_s": 1}}), store=store)
    datastore.start()
    disk, other = datastore.add_vm("vm", CONTENT), datastore.add_vm("other", CONTENT)
    resident = datastore.add_vm("resident", bytes(MIB), disk="a.raw").parent
    datastore.add_vm("resident", bytes(MIB), disk="b.raw")
    datastore.archive("other")
    before: Times = {}
    during: Times = {}
    measure(resident, before, rounds=50)
    archive = datastore.client.start_archive(["vm"])
    wait_until("it has begun", lambda: datastore.client.job(archive).progress.done_bytes > 0, poll_s=0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        recall = datastore.client.start_recall(["other"])
        measure(resident, during, rounds=50)
        for job_id in (archive, recall):
            job = datastore.wait_job(job_id)
            assert job.state == "failed"
            assert job.error is not None
            assert job.error.error == "StoreUnavailable"
        assert datastore.state("vm") == "resident"
        assert datastore.state("other") == "placeholder"
    finally:
        process.send_signal(signal.SIGCONT)
    assert_as_fast(before, during)
    datastore.archive("vm")
    datastore.recall("vm", "other")
    assert disk.read_bytes() == other.read_bytes() == CONTENT
    wait_until("late puts are over", lambda: datastore.pins() == [])
    datastore.assert_nothing_left(datastore.backing_of(disk), datastore.backing_of(other))


def test_writes_of_whole_blocks_to_a_vm_in_use_need_no_store(
    archived: tuple[LiveDatastore, Path, subprocess.Popen[bytes]],
) -> None:
    datastore, disk, process = archived
    assert block_of(disk, 60) == CONTENT[60 * CHUNK : 60 * CHUNK + BLOCK]
    process.send_signal(signal.SIGSTOP)
    try:
        fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
        block = mmap.mmap(-1, BLOCK)
        block[:] = b"w" * BLOCK
        started = time.monotonic()
        for chunk in range(50):
            assert os.pwritev(fd, [block], chunk * CHUNK) == BLOCK
        os.fsync(fd)
        assert os.preadv(fd, [block], 0) == BLOCK
        os.close(fd)
        assert time.monotonic() - started < DEADLINE_S
        datastore.kill()
    finally:
        process.send_signal(signal.SIGCONT)
    datastore.start()
    wanted = bytearray(CONTENT)
    for chunk in range(50):
        wanted[chunk * CHUNK : chunk * CHUNK + BLOCK] = b"w" * BLOCK
    assert disk.read_bytes() == wanted


def test_the_first_write_to_an_archived_vm_needs_the_store(
    archived: tuple[LiveDatastore, Path, subprocess.Popen[bytes]],
) -> None:
    """Nobody could tell whether another host has it: an error within the deadline, and nothing is changed."""
    datastore, disk, process = archived
    process.send_signal(signal.SIGSTOP)
    fd = os.open(disk, os.O_RDWR)
    try:
        started = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(fd, b"w" * BLOCK, 3 * CHUNK)
        assert DEADLINE_S - 2 <= time.monotonic() - started <= DEADLINE_S + 2
        assert "VM vm" in datastore.cli("status").out
    finally:
        process.send_signal(signal.SIGCONT)
    assert os.pwrite(fd, b"w" * BLOCK, 5 * CHUNK) == BLOCK
    os.close(fd)
    wanted = bytearray(CONTENT)
    wanted[5 * CHUNK : 5 * CHUNK + BLOCK] = b"w" * BLOCK
    assert disk.read_bytes() == wanted
    wait_until("the store is seen again", lambda: datastore.client.status().store.reachable)
    datastore.cli("status", check=0)


def test_part_of_the_store_is_gone_and_comes_back(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    other = datastore.add_vm("other", b"resident")
    datastore.archive("vm")
    packs, away = datastore.store / "packs", datastore.store / "away"
    packs.rename(away)
    assert set(readable_ranges(disk, SIZE)) == {errno.EIO}
    refused = datastore.cli("recall", "vm", check=5)
    assert "VM vm" in refused.err
    assert "is not in the store" in refused.err
    assert other.read_bytes() == b"resident"
    datastore.cli("status", check=8)
    away.rename(packs)
    assert disk.read_bytes() == CONTENT
    datastore.cli("recall", "vm", check=0)


def test_store_directory_is_renamed_while_the_daemon_runs(make_datastore: MakeDatastore) -> None:
    """Whether it finds it or not: the archived bytes or an error."""
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    away = datastore.store.with_name("away")
    datastore.store.rename(away)
    for chunk, got in enumerate(readable_ranges(disk, SIZE // 2)):
        assert got in (errno.EIO, CONTENT[chunk * CHUNK : (chunk + 1) * CHUNK])
    away.rename(datastore.store)
    assert disk.read_bytes() == CONTENT


def test_a_start_without_the_store(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(merged(IMPATIENT, {"recall": {"store_timeout_s": 2}}))
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    other = datastore.add_vm("other", b"resident")
    datastore.archive("vm")
    datastore.stop()
    away = datastore.store.with_name("away")
    datastore.store.rename(away)
    datastore.start()
    assert other.read_bytes() == b"resident"
    assert disk.stat().st_size == SIZE
    with disk.open("rb", buffering=0) as file, pytest.raises(OSError, match="Input/output error"):
        file.read(1)
    wait_until("the loss is noticed", lambda: not datastore.client.status().store.reachable)
    assert str(datastore.store) in datastore.cli("status", check=8).out
    assert datastore.cli("recall", "vm").code in (5, 10)
    assert not datastore.store.exists(), "a new, empty store was made in its place"
    away.rename(datastore.store)
    wait_until("reads are tried again", partial(block_of, disk, 0), deadline_s=10)
    assert disk.read_bytes() == CONTENT
    datastore.cli("recall", "vm", check=0)
    datastore.assert_nothing_left(datastore.backing_of(disk))
