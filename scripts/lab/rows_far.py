"""Rows of a store that is far: each request to it reaches a real S3 server 20 ms after it was made.

The delay is made by a proxy in a process of its own, in the one direction: the answer comes back at once.  Ours and the
plain download ask the same proxy, for the same stored bytes, as many requests at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lab.datastore import Datastore, datastore_in, drop_caches, seconds, working_directory
from scripts.lab.failure import run
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row
from scripts.lab.s3_proxy import delaying_proxy
from scripts.lab.s3_server import ceph_s3, new_bucket
from vmfs_stub.store.keys import PACKS
from vmfs_stub.store.objects import ObjectStore

DISK_BYTES: Final = 1 << 30
_DELAY_S: Final = 0.02
_CONCURRENCY: Final = 16
"""Requests at a time: the default of ``recall_concurrency``, so that neither has more of them under way."""
_RANGE_BYTES: Final = 4 << 20
"""The largest fetch of a recall."""
_VM: Final = "vm"


def _download(objects: ObjectStore, ranges: list[tuple[str, int, int]], target: Path) -> None:
    """All ranges of objects, one behind the other in a file, durable on return."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:

        def fetch(number: int) -> None:
            key, offset, length = ranges[number]
            os.pwrite(fd, objects.get_range(key, offset=offset, length=length), number * _RANGE_BYTES)

        with ThreadPoolExecutor(_CONCURRENCY) as executor:
            for _ in executor.map(fetch, range(len(ranges))):
                pass
        os.fsync(fd)
    finally:
        os.close(fd)


def _ranges(objects: ObjectStore) -> list[tuple[str, int, int]]:
    """Everything in packs."""
    return [
        (info.key, offset, min(_RANGE_BYTES, info.size - offset))
        for info in objects.list(PACKS)
        for offset in range(0, info.size, _RANGE_BYTES)
    ]


def _archived(datastore: Datastore) -> Path:
    """A VM with a disk of noise, of which every byte is stored; an ordinary file until it is archived."""
    disk = datastore.backing / _VM / "disk.img"
    disk.parent.mkdir()
    with disk.open("wb") as file:
        for _ in range(DISK_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    datastore.mount()
    datastore.vmfs("archive", _VM)
    datastore.vmfs("recall", _VM)
    return disk


@contextmanager
def _recall(laboratory: Laboratory) -> Iterator[Measures]:
    (laboratory.home / "s3").mkdir()
    with (
        ceph_s3(laboratory.home / "s3") as server,
        delaying_proxy(server.account.endpoint, delay_s=_DELAY_S) as endpoint,
        working_directory(laboratory.home) as home,
    ):
        bucket = new_bucket(server.account).through(endpoint)
        with datastore_in(home, bucket=bucket) as datastore:
            disk = _archived(datastore)
            objects = datastore.objects()
            ranges = _ranges(objects)

            def ours() -> float:
                datastore.vmfs("archive", _VM)
                drop_caches()
                return datastore.job_seconds("recall", _VM) + seconds(run, ["sync", disk], deadline_s=600)

            def baseline() -> float:
                drop_caches()
                return seconds(_download, objects, ranges, home / "downloaded")

            yield Measures(ours, baseline)


ROWS = (
    Row(
        "recall-far",
        "bringing 1 GiB back from an S3 server that each request reaches 20 ms late, as the daemon's job, and sync",
        f"a plain download of all packs there: {_CONCURRENCY} range reads of 4 MiB at a time into a file, and sync",
        "s",
        Target("at most", 1 / 0.8),
        5,
        _recall,
    ),
)
