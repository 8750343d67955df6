"""The end of a datastore that lived through many kills: all of it is archived, verified, restored and brought back.

Then nothing is left of what was there for placeholders alone, neither beside the files nor in the store.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from scripts.lab.daemon_process import DaemonProcess
from scripts.lab.datastore import Datastore
from scripts.lab.failure import LabError
from scripts.lab.kill_disk import KillDisk
from scripts.lab.kill_jobs import Point, digests_of, point_of, run_job
from vmfs_stub.core.names import ORPHANS_DIR, PRIVATE_DIR, RECALLED_XATTR, XATTR_PREFIX

_EARLIER_RESTORED: Final = 6
"""Restore points of the lives before that are restored, beside the last one of each VM."""
SETTLE_DEADLINE_S: Final = 8.0


def check_end(datastore: Datastore, daemon: DaemonProcess, disks: Sequence[KillDisk], points: Sequence[Point]) -> None:
    """All that a datastore has to be good for.  Raises LabError; the daemon has ended on return."""
    client, vms = daemon.client, list(dict.fromkeys(disk.vm for disk in disks))
    _compare(disks)
    last = []
    for vm in vms:
        digests = digests_of([disk for disk in disks if disk.vm == vm])
        last.append(point_of(vm, digests, run_job(client, "archive", vm)))
    _expect_states(datastore, "placeholder")
    datastore.vmfs("verify")
    _restore(datastore, [*last, *points[:: max(1, len(points) // _EARLIER_RESTORED)]])
    for vm in vms:
        run_job(client, "recall", vm)
    _expect_states(datastore, "resident")
    _compare(disks)
    for disk in disks:
        if disk.backing.read_bytes() != disk.content():
            raise LabError(f"{disk.label}: the backing file is not what memory holds")
    _wait_nothing_left(datastore)
    run_job(client, "archive", vms[0])
    for disk in disks:
        if disk.vm == vms[0]:
            disk.path.unlink()
    _wait_nothing_left(datastore)
    datastore.status()
    datastore.vmfs("unmount")
    daemon.wait_ended()
    _wait_nothing_left(datastore)


def _compare(disks: Sequence[KillDisk]) -> None:
    for disk in disks:
        disk.compare(whole=True)


def _expect_states(datastore: Datastore, state: str) -> None:
    if wrong := [row for row in datastore.disks() if row.state != state]:
        raise LabError(f"not {state}: {wrong}")


def _restore(datastore: Datastore, points: Sequence[Point]) -> None:
    """Write restore points out, and compare what they hold with what memory held when they were made."""
    for number, point in enumerate(points):
        target = datastore.home / "restored" / str(number)
        target.mkdir(parents=True)
        datastore.vmfs("restore", f"{point.vm}@{point.point_id}", "--to", str(target))
        for name, digest in point.digests.items():
            if hashlib.sha256((target / name).read_bytes()).hexdigest() != digest:
                raise LabError(f"{target / name} is not what {name} was at restore point {point.point_id}")


def _wait_nothing_left(datastore: Datastore) -> None:
    """What goes in the background has a while to do so."""
    until_s = time.monotonic() + SETTLE_DEADLINE_S
    while left := sorted(left_behind(datastore)):
        if time.monotonic() > until_s:
            raise LabError(f"left behind: {', '.join(left)}")
        time.sleep(0.05)


def left_behind(datastore: Datastore) -> Iterator[str]:
    """Whatever is there for placeholders, or files without a name, alone."""
    private = datastore.backing / PRIVATE_DIR
    for folder in (private / "maps", private / ORPHANS_DIR, datastore.home / "run" / "maps", datastore.store / "pins"):
        yield from (str(path) for path in folder.rglob("*") if path.is_file())
    for directory, names, files in os.walk(datastore.backing):
        if PRIVATE_DIR in names:
            names.remove(PRIVATE_DIR)
        for path in (Path(directory) / name for name in files):
            ours = [name for name in os.listxattr(path) if name.startswith(XATTR_PREFIX)]
            if ours := [name for name in ours if name != RECALLED_XATTR]:  # which says that it was one
                yield f"{path}: {ours}"
