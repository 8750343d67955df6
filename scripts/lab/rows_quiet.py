"""Rows of what other disks notice: of a job that moves data, and of many placeholders in one directory.

The first compares a disk with itself, while nothing else happens.  The second compares the mount with the least that
a pyfuse3 filesystem can do, since `ls -l` costs requests that a directory without a mount does not need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.lab.content import salted_copies
from scripts.lab.datastore import Datastore, Settings, copy_sparse, drop_caches, pss_bytes, seconds
from scripts.lab.failure import LabError, run
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row

_READER, _ARCHIVED, _RECALLED = "reader", "archived", "recalled"
_SECONDS_A_SAMPLE = 3
_SALTED_COPIES = 3
_DEADLINE_S = 120.0

PLACEHOLDERS = 10_000
_PLACEHOLDER_BYTES = 16 << 10
_VMS, _ALL = 20, "all"
_SMALL: Settings = {
    "archive": {"placeholder_bytes_min": 0, "resident_head_bytes": 0, "resident_tail_bytes": 0},
    "hydration": {"enabled": False},
}


# Quiet under load


def _p99_s(disk: Path) -> float:
    """The 99th percentile of 4 KiB reads at depth 1 from a disk that is not cached, in seconds."""
    command = ["fio", "--name=row", f"--filename={disk}", "--rw=randread", "--bs=4k", "--iodepth=1", "--direct=1"]
    command += ["--ioengine=libaio", "--time_based", f"--runtime={_SECONDS_A_SAMPLE}", "--size=448m"]
    command += ["--randrepeat=0", "--norandommap", "--output-format=json"]
    (job,) = json.loads(run(command, deadline_s=_DEADLINE_S))["jobs"]
    return float(job["read"]["clat_ns"]["percentile"]["99.000000"]) / 1e9


@contextmanager
def _moving(datastore: Datastore) -> Iterator[None]:
    """An archive and a full recall run all the while; LabError when one of them fails or is over too soon."""
    failures: list[LabError] = []
    ended: dict[str, float] = {}

    def job(kind: str, vm: str) -> None:
        try:
            datastore.vmfs(kind, vm)
        except LabError as exc:
            failures.append(exc)
        ended[kind] = time.monotonic()

    jobs = [threading.Thread(target=job, args=pair) for pair in (("archive", _ARCHIVED), ("recall", _RECALLED))]
    for thread in jobs:
        thread.start()
    time.sleep(0.5)  # until both commands are more than a Python that starts
    yield
    over_s = time.monotonic()
    for thread in jobs:
        thread.join()
    if failures:
        raise failures[0]
    early = [kind for kind, at_s in ended.items() if at_s < over_s - _SECONDS_A_SAMPLE / 2]
    if early:
        raise LabError(f"{' and '.join(early)} ended long before the reads did, so that they were not disturbed")


@contextmanager
def _quiet(laboratory: Laboratory) -> Iterator[Measures]:
    images = {name: laboratory.home / name for name in (_ARCHIVED, _RECALLED)}
    for number, (name, image) in enumerate(images.items()):
        if not image.exists():
            laboratory.say(f"making the data to be {name}")
            salted_copies(laboratory.guest.qcow2, image, copies=_SALTED_COPIES, salt=number)

    def measure(*, moving: bool) -> float:
        with laboratory.datastore() as datastore:
            disk = datastore.backing / _READER / "disk.img"
            disk.parent.mkdir()
            copy_sparse(laboratory.guest.qcow2, disk)
            for name, image in images.items() if moving else ():
                (datastore.backing / name).mkdir()
                copy_sparse(image, datastore.backing / name / "disk.img")
            datastore.mount()
            if moving:
                datastore.vmfs("archive", _RECALLED)
            drop_caches()
            shown = datastore.mountpoint / _READER / "disk.img"
            if not moving:
                return _p99_s(shown)
            with _moving(datastore):
                return _p99_s(shown)

    yield Measures(lambda: measure(moving=True), lambda: measure(moving=False))


# Many placeholders


def _many(laboratory: Laboratory) -> Datastore:
    """A datastore of 10,000 placeholders in one directory, not mounted; made once, for all the rows that want it."""
    return laboratory.shared(_made_many)


@contextmanager
def _made_many(laboratory: Laboratory) -> Iterator[Datastore]:
    with laboratory.datastore(_SMALL) as datastore:
        for number in range(PLACEHOLDERS):
            vm = datastore.backing / f"vm{number % _VMS}"
            vm.mkdir(exist_ok=True)
            (vm / f"{number:05}.img").write_bytes(number.to_bytes(8, "little") + os.urandom(_PLACEHOLDER_BYTES - 8))
        datastore.mount()
        laboratory.say(f"archiving {PLACEHOLDERS} disks")
        for which in range(_VMS):
            datastore.vmfs("archive", f"vm{which}")
        states = {disk.state for disk in datastore.disks()}
        if states != {"placeholder"}:
            raise LabError(f"not all are placeholders: {states}")
        all_of_them = datastore.mountpoint / _ALL
        all_of_them.mkdir()
        for disk in datastore.mountpoint.glob("vm*/*.img"):
            disk.rename(all_of_them / disk.name)
        datastore.unmount()
        yield datastore


def _long_listing(directory: Path) -> float:
    drop_caches()
    return seconds(run, ["ls", "-l", directory], deadline_s=_DEADLINE_S)


@contextmanager
def _passthrough(backing: Path, mountpoint: Path) -> Iterator[None]:
    """The minimal pyfuse3 mount of a directory; unmounted at the end."""
    mountpoint.mkdir()
    command = [sys.executable, "-m", "scripts.lab.passthrough", str(backing), str(mountpoint)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until_s = time.monotonic() + _DEADLINE_S
            while not os.path.ismount(mountpoint):
                if process.poll() is not None or time.monotonic() > until_s:
                    raise LabError("the minimal pyfuse3 mount did not start")
                time.sleep(0.05)
            yield
        finally:
            if os.path.ismount(mountpoint):
                run(["umount", mountpoint], deadline_s=_DEADLINE_S)
            process.wait(_DEADLINE_S)


@contextmanager
def _listing(laboratory: Laboratory) -> Iterator[Measures]:
    datastore = _many(laboratory)
    datastore.mount()
    plain = datastore.home / "passthrough"
    try:
        with _passthrough(datastore.backing, plain):
            yield Measures(lambda: _long_listing(datastore.mountpoint / _ALL), lambda: _long_listing(plain / _ALL))
    finally:
        datastore.unmount()


@contextmanager
def _start(laboratory: Laboratory) -> Iterator[Measures]:
    datastore = _many(laboratory)

    def ours() -> float:
        drop_caches()
        took_s = seconds(datastore.mount)
        datastore.unmount()
        return took_s

    yield Measures(ours, lambda: 5.0)


@contextmanager
def _memory(laboratory: Laboratory) -> Iterator[Measures]:
    datastore = _many(laboratory)

    def ours() -> float:
        datastore.mount()
        _long_listing(datastore.mountpoint / _ALL)
        datastore.disks()
        used = float(pss_bytes(datastore.daemon_pid))
        datastore.unmount()
        return used

    yield Measures(ours, lambda: float(300 << 20))


ROWS = (
    Row(
        "quiet",
        "99th percentile of 4 KiB reads of a resident disk at depth 1, while an archive and a full recall run",
        "the same, with nothing else going on",
        "s",
        Target("at most", 3),
        9,
        _quiet,
    ),
    Row(
        "list-10000",
        "ls -l of 10,000 placeholders, cold",
        "the same through a minimal pyfuse3 passthrough mount",
        "s",
        Target("at most", 1.5),
        9,
        _listing,
    ),
    Row(
        "start-10000",
        "seconds until a daemon with 10,000 placeholders answers, cold",
        "a budget of 5 s",
        "s",
        Target("at most", 1),
        5,
        _start,
    ),
    Row(
        "memory-10000",
        "memory (PSS) of a daemon with 10,000 placeholders that were all listed",
        "a budget of 300 MiB",
        "B",
        Target("at most", 1),
        3,
        _memory,
    ),
)
