"""Rows of a resident disk: what the mount costs against the backing file itself.

The disk is real data (the guest's image), read and written by fio with O_DIRECT, so that neither side is answered
from the page cache of the process that asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from scripts.lab.datastore import copy_sparse, drop_caches
from scripts.lab.failure import run
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row

_SECONDS_A_SAMPLE = 2
_PAIRS = 9


def _fio(disk: Path, *, pattern: str, block: str, depth: int) -> float:
    """Bytes a second of one fio run, beginning with cold caches."""
    drop_caches()
    command = ["fio", "--name=row", f"--filename={disk}", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}"]
    command += ["--ioengine=libaio", "--direct=1", "--time_based", f"--runtime={_SECONDS_A_SAMPLE}"]
    # One size for all, since reads of the image's holes would be measured as well beyond it.
    command += ["--size=448m", "--randrepeat=0", "--norandommap", "--output-format=json"]
    done = json.loads(run(command, deadline_s=120))
    kind = "write" if "write" in pattern else "read"
    return float(done["jobs"][0][kind]["bw_bytes"])


def _row(name: str, title: str, *, pattern: str, block: str, depth: int, at_least: float) -> Row:
    def prepared(laboratory: Laboratory) -> AbstractContextManager[Measures]:
        return _disk_measures(laboratory, pattern=pattern, block=block, depth=depth)

    return Row(name, title, "the backing file itself", "B/s", Target("at least", at_least), _PAIRS, prepared)


@contextmanager
def _disk_measures(laboratory: Laboratory, *, pattern: str, block: str, depth: int) -> Iterator[Measures]:
    with laboratory.datastore() as datastore:
        disk = datastore.backing / "vm" / "disk.img"
        disk.parent.mkdir()
        # The qcow2 file has next to no holes, and its bytes are those of a real system.
        copy_sparse(laboratory.guest.qcow2, disk)
        datastore.mount()

        def measure(path: Path) -> Callable[[], float]:
            return lambda: _fio(path, pattern=pattern, block=block, depth=depth)

        yield Measures(measure(datastore.mountpoint / "vm" / "disk.img"), measure(disk))


ROWS = (
    _row("read-4k-1", "4 KiB random reads, depth 1", pattern="randread", block="4k", depth=1, at_least=0.6),
    _row("read-4k-32", "4 KiB random reads, depth 32", pattern="randread", block="4k", depth=32, at_least=0.25),
    _row("write-4k-1", "4 KiB random writes, depth 1", pattern="randwrite", block="4k", depth=1, at_least=0.5),
    _row("write-4k-32", "4 KiB random writes, depth 32", pattern="randwrite", block="4k", depth=32, at_least=0.25),
    _row("read-1m", "1 MiB sequential reads", pattern="read", block="1m", depth=1, at_least=0.9),
    _row("write-1m", "1 MiB sequential writes", pattern="write", block="1m", depth=1, at_least=0.9),
)
