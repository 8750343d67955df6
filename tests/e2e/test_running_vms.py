"""VMs in use are backed up by the real daemon: what is restored is one moment, and no write waits for long."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_datastore import BLOCK, MIB, QUIET, LiveDatastore, MakeDatastore, merged, noise, remove_base, wait_until

from scripts.lab.guest import MARKER, built_guest
from scripts.lab.qemu import Machine, RunningGuest, running, usable_accelerator

SIZE = 16 * MIB
SETTINGS = merged(QUIET, {"archive": {"placeholder_bytes_min": "1 MiB"}, "primary": {"free_floor_percent": 0}})
DISKS = ("a.raw", "b.raw")

WRITER = """
import json, mmap, os, random, sys, time
paths, report = sys.argv[1:3], sys.argv[3]
fds = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
block, count = mmap.mmap(-1, 4096), os.fstat(fds[0]).st_size // 4096
places = list(range(count))
random.Random(1).shuffle(places)
waits = []
for number, place in enumerate(places, start=1):
    block[:] = number.to_bytes(8, "little") * 512
    for fd in fds:
        began = time.monotonic()
        os.pwrite(fd, block, place * 4096)
        waits.append((began, time.monotonic() - began))
    time.sleep(0.002)
    if number % 20 == 0:
        with open(report + ".new", "w") as file:
            json.dump(waits, file)
        os.rename(report + ".new", report)
"""
"""Writes block after block, in an order that it knows, always to the first disk and then to the second."""


@contextmanager
def writer(datastore: LiveDatastore) -> Iterator[Path]:
    """A program that writes to both disks; yields where it says how long each write took."""
    report = datastore.base / "waits"
    paths = [str(datastore.mountpoint / "vm" / name) for name in DISKS]
    process = subprocess.Popen([sys.executable, "-c", WRITER, *paths, str(report)])
    try:
        wait_until("it writes", report.exists)
        yield report
    finally:
        process.kill()
        process.wait()


def back_up(datastore: LiveDatastore) -> dict[str, object]:
    # Beside a guest that never rests the job gives way to it, step by step.
    done = datastore.wait_job(datastore.client.start_backup(["vm"], archive=False), deadline_s=240)
    assert done.state == "done", done
    assert done.result is not None
    (outcome,) = done.result["vms"]
    assert isinstance(outcome, dict)
    return outcome


def restored(datastore: LiveDatastore, outcome: dict[str, object]) -> list[bytes]:
    to = datastore.base / "restored"
    datastore.cli("restore", f"vm@{outcome['point_id']}", "--to", to, check=0)
    contents = [(to / name).read_bytes() for name in DISKS]
    for name in DISKS:
        (to / name).unlink()
    to.rmdir()
    return contents


def written_to(content: bytes, before: bytes) -> int:
    """How many blocks were written, which must be the first so many of the writer's order."""
    places = list(range(len(content) // BLOCK))
    random.Random(1).shuffle(places)
    blocks = [slice(place * BLOCK, (place + 1) * BLOCK) for place in places]
    is_new = [content[block] == number.to_bytes(8, "little") * (BLOCK // 8) for number, block in enumerate(blocks, 1)]
    count = is_new.index(False) if False in is_new else len(blocks)
    late = [number for number, block in enumerate(blocks) if number >= count and content[block] != before[block]]
    assert late == [], f"{count} blocks are there, and some of those after"
    return count


def check_two_disks_at_one_moment(datastore: LiveDatastore) -> None:
    before = [noise(SIZE, seed=number) for number in (1, 2)]
    for name, content in zip(DISKS, before, strict=True):
        datastore.add_vm("vm", content, disk=name)
    with writer(datastore) as report:
        began = time.monotonic()
        outcome = back_up(datastore)
        first_s = time.monotonic() - began
        assert (outcome["outcome"], outcome["consistency"]) == ("backed up", "crash")
        second = back_up(datastore)
        assert second["consistency"] == "crash"
        waits = json.loads(report.read_text())
    counts, later = (
        [written_to(content, old) for content, old in zip(restored(datastore, point), before, strict=True)]
        for point in (outcome, second)
    )
    assert 0 < counts[0] - 1 <= counts[1] <= counts[0]
    assert later[0] - 1 <= later[1] <= later[0]
    assert counts[0] < later[0]
    during = sorted(wait for at, wait in waits if began <= at <= began + first_s)
    others = sorted(wait for at, wait in waits if not began <= at <= began + first_s)
    for name, found in (("during the backup", during), ("else", others)):
        shown = [f"{found[int(len(found) * share)] * 1000:.1f}" for share in (0.5, 0.9, 0.99)] if found else []
        longest_ms = found[-1] * 1000 if found else 0
        print(f"{len(found)} writes {name}: ms at 50, 90, 99 %: {shown}; longest {longest_ms:.0f}")
    print(f"first backup {first_s:.1f} s; the second read {second['read_bytes']}")
    assert during[-1] < 10
    assert list((datastore.backing / ".vmfs-stub/frozen").iterdir()) == []


def test_what_is_set_aside_makes_one_moment_of_two_disks(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(SETTINGS)
    datastore.start()
    check_two_disks_at_one_moment(datastore)


@pytest.fixture(params=[("mkfs.xfs", "-q", "-m", "reflink=1"), ("mkfs.btrfs", "-q")], ids=["xfs", "btrfs"])
def sharing(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a filesystem whose files can share their bytes."""
    base = Path(tempfile.mkdtemp(prefix="vmfs-stub-sharing-", dir="/var/tmp"))
    image, place = base / "image", base / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(2 << 30)
    subprocess.run([*request.param, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        wait_until("it is unmounted", lambda: subprocess.run(["umount", place], check=False).returncode == 0)
        remove_base(base)


def test_clones_make_one_moment_of_two_disks(sharing: Path) -> None:
    datastore = LiveDatastore(sharing)
    try:
        datastore.init(SETTINGS)
        datastore.start()
        check_two_disks_at_one_moment(datastore)
        assert ", 0 were set aside" in datastore.log()
    finally:
        datastore.tear_down()


def test_after_a_kill_amid_a_backup_in_use_no_change_is_missed(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(SETTINGS)
    datastore.start()
    for number, name in enumerate(DISKS, start=1):
        datastore.add_vm("vm", noise(SIZE, seed=number), disk=name)
    with writer(datastore):
        back_up(datastore)
        datastore.client.start_backup(["vm"], archive=False)
        time.sleep(0.3)
        datastore.kill()
    datastore.start()
    assert list((datastore.backing / ".vmfs-stub/frozen").iterdir()) == []
    outcome = back_up(datastore)
    wanted = [(datastore.mountpoint / "vm" / name).read_bytes() for name in DISKS]
    assert restored(datastore, outcome) == wanted


SCRIPT = (
    f"mount -t proc proc /proc; echo {MARKER}; i=0; while :; do i=$((i+1)); "
    "dd if=/dev/urandom of=/root/f$((i%6)) bs=64k count=24 conv=fsync 2>/dev/null; echo $i >/root/n$i; rm -f "
    "/root/n$((i-9)); sync; echo TICK $i; done"
)


def ticks(guest: RunningGuest) -> int:
    return guest.console.count(b"TICK")


def test_the_point_of_a_guest_that_writes_passes_fsck(make_datastore: MakeDatastore) -> None:
    """A real guest on a raw disk, which goes on while it is backed up; of the point the journal is replayed."""
    guest = built_guest()
    datastore = make_datastore(SETTINGS)
    datastore.start()
    disk = datastore.mountpoint / "vm/disk.raw"
    disk.parent.mkdir()
    subprocess.run(["cp", "--sparse=always", guest.raw, disk], check=True)
    machine = Machine(guest, disk, "raw", usable_accelerator(guest))
    with running(machine, parameters=["init=/bin/sh", "--", "-c", f'"{SCRIPT}"']) as run:
        run.wait_for("TICK 3", deadline_s=300)
        began = time.monotonic()
        outcome = back_up(datastore)
        print(f"backed up in {time.monotonic() - began:.1f} s: {outcome}")
        before = ticks(run)
        run.wait_for(f"TICK {before + 3}", deadline_s=300)
        second = back_up(datastore)
        assert int(str(second["read_bytes"])) < int(str(outcome["read_bytes"]))
        run.process.kill()
    for number, point in enumerate((outcome, second)):
        to = datastore.base / f"restored{number}"
        datastore.cli("restore", f"vm@{point['point_id']}", "--to", to, check=0)
        image = to / "disk.raw"
        replayed = subprocess.run(["e2fsck", "-p", image], capture_output=True, text=True, check=False)
        assert replayed.returncode in (0, 1), replayed
        checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked
        image.unlink()
