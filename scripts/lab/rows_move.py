"""Rows of moving a whole disk: archiving it, and bringing it back.

Each sample begins with cold caches and ends with everything durable, on both sides.  Ours is what the daemon's job
took: loading a Python command from a cold disk is no part of moving a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.lab.datastore import COMMAND_DEADLINE_S, copy_sparse, drop_caches, seconds
from scripts.lab.failure import run
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row

_PAIRS = 9

_PIPELINE = """
set -euo pipefail
# What has to be done to every byte, by public tools, both cores at work: read, hash, compress, write, make durable,
# then read back from the medium, decompress and compare.  b3sum is the hash that the store identifies chunks by.
mkfifo "$2.fifo"
b3sum --num-threads 1 <"$2.fifo" >"$2.sum" &
tee "$2.fifo" <"$1" | lz4 -1 -q >"$2"
wait $!
sync "$2"
dd if="$2" iflag=nocache count=0 status=none
lz4 -dcq "$2" | b3sum --num-threads 1 | cmp - "$2.sum"
rm "$2" "$2.fifo" "$2.sum"
"""


def _pipeline(source: Path, target: Path) -> float:
    drop_caches()
    return seconds(run, ["bash", "-c", _PIPELINE, "pipeline", source, target], deadline_s=COMMAND_DEADLINE_S)


@contextmanager
def _archive(laboratory: Laboratory) -> Iterator[Measures]:
    image = laboratory.home / "image"
    copy_sparse(laboratory.guest.qcow2, image)

    def ours() -> float:
        # A store of its own for each sample: the second archive of the same bytes into one store writes nothing.
        with laboratory.datastore() as datastore:
            (datastore.backing / "vm").mkdir()
            copy_sparse(image, datastore.backing / "vm" / "disk.img")
            datastore.mount()
            drop_caches()
            return datastore.job_seconds("archive", "vm")

    yield Measures(ours, lambda: _pipeline(image, laboratory.home / "compressed"))


@contextmanager
def _recall(laboratory: Laboratory) -> Iterator[Measures]:
    with laboratory.datastore() as datastore:
        disk = datastore.backing / "vm" / "disk.img"
        disk.parent.mkdir()
        image, copy = laboratory.home / "original", laboratory.home / "copy"
        copy_sparse(laboratory.guest.qcow2, image)
        copy_sparse(image, disk)
        datastore.mount()

        def ours() -> float:
            datastore.vmfs("archive", "vm")
            drop_caches()
            return datastore.job_seconds("recall", "vm") + seconds(run, ["sync", disk], deadline_s=600)

        def baseline() -> float:
            copy.unlink(missing_ok=True)
            drop_caches()
            return seconds(copy_sparse, image, copy)

        yield Measures(ours, baseline)


ROWS = (
    Row(
        "archive",
        "archiving a VM, as the daemon's job",
        "tee, b3sum, lz4, sync, cold read-back and comparison in one pipeline",
        "s",
        Target("at most", 2),
        _PAIRS,
        _archive,
    ),
    Row(
        "recall",
        "bringing a VM back, as the daemon's job, and sync",
        "cp and sync of the same file",
        "s",
        Target("at most", 2),
        _PAIRS,
        _recall,
    ),
)
