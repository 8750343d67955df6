"""The process that moves data: killed, stopped, or left behind, it takes no VM with it and no job hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, noise, wait_until

from scripts.lab.daemon_process import movers_of
from scripts.lab.datastore import ended
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.mover.lock import MoverLock
from vmfs_stub.primary.durable_map import DurableMap, MapHeader, MapState
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import InodeIdentity

SIZE = 96 * MIB
CONTENT = noise(SIZE, seed=11)


def mover_of(datastore: LiveDatastore) -> int:
    """Process id of the daemon's mover."""
    assert datastore.daemon is not None
    (found,) = movers_of(datastore.daemon.pid)
    return found


def open_files(pid: int) -> list[str]:
    """What a process has open, by name."""
    return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]


def killed_during(datastore: LiveDatastore, kind: str, *, at_once: bool) -> JobInfo:
    """Run a job on ``vm`` and kill the mover before it can do anything, or in the midst; how the job ended."""
    mover = mover_of(datastore)
    if at_once:
        os.kill(mover, signal.SIGSTOP)
    start = datastore.client.start_archive if kind == "archive" else datastore.client.start_recall
    job_id = start(["vm"])
    if at_once:
        time.sleep(0.3)
    else:
        wait_until("it has begun", lambda: datastore.client.job(job_id).progress.done_bytes > 0, poll_s=0.001)
        os.kill(mover, signal.SIGSTOP)
    assert datastore.client.job(job_id).state == "running"
    os.kill(mover, signal.SIGKILL)
    return datastore.wait_job(job_id)


def assert_lost(job: JobInfo) -> None:
    assert job.state == "failed", job
    assert job.error is not None
    assert job.error.error == "MoverLost"
    assert "SIGKILL" in job.error.message


@pytest.mark.parametrize("at_once", [True, False])
def test_a_mover_that_is_killed_in_an_archive(make_datastore: MakeDatastore, at_once: bool) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("other", CONTENT[:MIB])
    datastore.wait_job(datastore.client.start_backup(["other"], archive=False))  # it has begun to work
    disk = datastore.add_vm("vm", CONTENT)
    assert_lost(killed_during(datastore, "archive", at_once=at_once))
    assert datastore.state("vm") == "resident"
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert disk.read_bytes() == CONTENT
    datastore.archive("vm")
    assert len(datastore.pins()) == 1
    assert disk.read_bytes() == CONTENT
    assert "Traceback" not in datastore.log()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_mover_that_is_killed_in_a_recall(make_datastore: MakeDatastore, at_once: bool) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    assert_lost(killed_during(datastore, "recall", at_once=at_once))
    assert datastore.state("vm") == "placeholder"
    assert datastore.client.status().findings == []  # the job failed, which it says; nothing is wrong with the disk
    with disk.open("rb") as file:
        assert file.read(MIB) == CONTENT[:MIB]
    datastore.recall("vm")
    assert disk.read_bytes() == CONTENT
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert datastore.client.status().healthy
    assert "Traceback" not in datastore.log()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_reader_that_waits_for_a_background_fetch_does_without_the_mover(
    make_datastore: MakeDatastore, is_killed: bool
) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    mover = mover_of(datastore)
    os.kill(mover, signal.SIGSTOP)
    job_id = datastore.client.start_recall(["vm"])
    time.sleep(0.3)
    started_s = time.monotonic()
    reader = subprocess.Popen(["head", "-c", "4096", disk], stdout=subprocess.PIPE)
    time.sleep(0.3)
    assert reader.poll() is None, "the read did not wait for the fetch that is under way"
    if is_killed:
        os.kill(mover, signal.SIGKILL)
    out, _ = reader.communicate(timeout=20)
    assert out == CONTENT[:4096]
    assert time.monotonic() - started_s < 5  # a mover that hangs is given up after 20 s
    if is_killed:
        assert_lost(datastore.wait_job(job_id))
        return
    assert datastore.client.job(job_id).state == "running"
    os.kill(mover, signal.SIGCONT)
    assert datastore.wait_job(job_id).state == "done"
    assert disk.read_bytes() == CONTENT


def test_the_mover_ends_with_a_daemon_that_is_killed(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("vm", CONTENT)
    mover = mover_of(datastore)
    job_id = datastore.client.start_archive(["vm"])
    wait_until("it has begun", lambda: datastore.client.job(job_id).progress.done_bytes > 0, poll_s=0.001)
    datastore.kill()
    wait_until("the mover is gone", lambda: ended(mover, deadline_s=0), deadline_s=1)
    datastore.start()
    datastore.archive("vm")


def test_an_archive_that_was_cut_short_goes_on_without_storing_again(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    job_id = datastore.client.start_archive(["vm"])
    wait_until("half is copied", lambda: datastore.client.job(job_id).progress.done_bytes > SIZE // 2, poll_s=0.001)
    datastore.kill()
    stored = stored_bytes(datastore)
    assert stored > SIZE // 4
    datastore.start()
    datastore.archive("vm")
    assert stored_bytes(datastore) < SIZE + stored // 2  # some packs were being put
    assert disk.read_bytes() == CONTENT


def stored_bytes(datastore: LiveDatastore) -> int:
    return sum(path.stat().st_size for path in (datastore.store / "packs").rglob("*") if path.is_file())


def test_a_pin_that_an_earlier_mover_puts_late_goes_too(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("vm", CONTENT[:MIB])
    datastore.archive("vm")
    (pin,) = datastore.pins()
    datastore.stop()
    # As if a daemon was killed while it archived another disk, and its mover hung in the system call that makes a pin.
    late = pin.with_name("9" * 32)
    header = MapHeader(
        placeholder_id=PlaceholderId(late.name),
        vm_id=VmId(pin.parent.parent.name),
        point_id=PointId(pin.parent.name),
        identity=InodeIdentity("0" * 32, 1 << 40, 0),
        state=MapState.PREPARED,
        size=MIB,
        chunk_size=64 << 10,
        archived_limit=MIB,
    )
    prepared = datastore.backing / ".vmfs-stub" / "maps" / f"{late.name}.map"
    DurableMap.create(FileCalls(), prepared, header).close()
    with closing(MoverLock(datastore.backing / ".vmfs-stub" / "mover.lock")) as hanging:
        assert hanging.take()
        datastore.start()
        time.sleep(1)
        assert prepared.exists()
        late.write_bytes(pin.read_bytes())
    wait_until("nothing is left of it", lambda: not prepared.exists() and not late.exists(), poll_s=0.01)
    assert datastore.pins() == [pin]


def test_the_mover_ends_with_the_daemon(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    mover = mover_of(datastore)
    datastore.stop()
    assert ended(mover, deadline_s=0)


def test_the_mover_holds_no_lock_no_disk_and_no_mount(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    held = open_files(mover_of(datastore))
    assert not [name for name in held if name.endswith((".vmfs-stub/lock", "disk.raw", "/dev/fuse", ".map", ".bits"))]
    assert [name for name in held if name.endswith("index.sqlite")], "the checker sees what it holds"


def test_the_mover_stands_back(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    assert datastore.daemon is not None
    nice = [
        int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])
        for pid in (datastore.daemon.pid, mover_of(datastore))
    ]
    assert nice[0] < nice[1]
