"""A row of one very large disk: 2 TiB, of which 40 GiB are data.

The data is made up: every chunk is another one, so that tables and index have their full size, and compresses to next
to nothing, so that the store takes little room.  Primary has to have room for all of it.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lab.content import CHUNK
from scripts.lab.failure import LabError
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row
from scripts.lab.rows_boot import peak_pss

SIZE_BYTES: Final = 2 << 40
DATA_BYTES: Final = 40 << 30
_RUN_BYTES: Final = 64 << 20
"""Data comes in runs of this size, at even distances."""
_SPARE_BYTES: Final = 6 << 30
_BUDGET: Final = float(300 << 20)


def make_large(disk: Path) -> None:
    """The disk, durable.  Raises LabError where there is no room."""
    if shutil.disk_usage(disk.parent).free < DATA_BYTES + _SPARE_BYTES:
        raise LabError(f"{disk.parent} has no room for {(DATA_BYTES + _SPARE_BYTES) >> 30} GiB")
    run, count = bytearray(random.Random(1).randbytes(256) * (_RUN_BYTES // 256)), DATA_BYTES // _RUN_BYTES
    number = 0
    with disk.open("wb", buffering=0) as file:
        file.truncate(SIZE_BYTES)
        for which in range(count):
            for at in range(0, _RUN_BYTES, CHUNK):
                number += 1
                run[at : at + 8] = number.to_bytes(8, "little")
            os.pwrite(file.fileno(), run, which * (SIZE_BYTES // count))
        os.fsync(file.fileno())


@contextmanager
def _memory(laboratory: Laboratory) -> Iterator[Measures]:
    def ours() -> float:
        with laboratory.datastore() as datastore:
            (datastore.backing / "vm").mkdir()
            make_large(datastore.backing / "vm" / "disk.img")
            datastore.mount()
            started_s = time.monotonic()
            with peak_pss(datastore.daemon_pid) as samples:
                datastore.vmfs("archive", "vm")
            took_s = time.monotonic() - started_s
            laboratory.say(f"archived in {took_s:.0f} s, {(DATA_BYTES >> 20) / took_s:.0f} MiB of data a second")
            return float(max(samples))

    yield Measures(ours, lambda: _BUDGET)


ROWS = (
    Row(
        "archive-2t",
        "most memory (PSS) of the daemon and its mover while a disk of 2 TiB with 40 GiB of data is archived",
        "a budget of 300 MiB",
        "B",
        Target("at most", 1),
        1,
        _memory,
    ),
)
