"""Rows of booting from an archived disk, and of what the daemon itself needs.

Under emulation the guest's processor hides what the storage costs, so the reads of a recorded boot are also replayed
without the guest, as fast as they are answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.lab.datastore import Datastore, Settings, copy_sparse, drop_caches, pss_bytes
from scripts.lab.disktrace import replay, unique_bytes
from scripts.lab.qemu import Machine, boot
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row

ARCHIVED, RESIDENT = "archived", "resident"
_MEMORY_BUDGET_BYTES = 150 << 20
_SAMPLE_INTERVAL_S = 0.02
_NO_HYDRATION: Settings = {"hydration": {"enabled": False}}


@contextmanager
def _two_disks(laboratory: Laboratory, settings: Settings | None = None) -> Iterator[Datastore]:
    """A mounted datastore with the guest's disk twice: in a VM that each sample archives, and in one that stays."""
    with laboratory.datastore(settings) as datastore:
        for name in (ARCHIVED, RESIDENT):
            disk = datastore.backing / name / "disk.raw"
            disk.parent.mkdir()
            copy_sparse(laboratory.guest.raw, disk)
        datastore.mount()
        yield datastore


def _disk(datastore: Datastore, name: str) -> Path:
    return datastore.mountpoint / name / "disk.raw"


def _archive_afresh(datastore: Datastore) -> None:
    """Whatever came back since the last sample is archived again."""
    if any(disk.vm == ARCHIVED and disk.state != "resident" for disk in datastore.disks()):
        datastore.vmfs("recall", ARCHIVED)
    datastore.vmfs("archive", ARCHIVED)
    drop_caches()


@contextmanager
def _boots(laboratory: Laboratory) -> Iterator[Measures]:
    with _two_disks(laboratory) as datastore:

        def marker_s(name: str) -> float:
            return boot(Machine(laboratory.guest, _disk(datastore, name), "raw", laboratory.accelerator)).marker_s

        def ours() -> float:
            _archive_afresh(datastore)
            return marker_s(ARCHIVED)

        def baseline() -> float:
            drop_caches()
            return marker_s(RESIDENT)

        yield Measures(ours, baseline)


@contextmanager
def _replays(laboratory: Laboratory) -> Iterator[Measures]:
    reads = laboratory.boot_reads
    with _two_disks(laboratory) as datastore:

        def ours() -> float:
            _archive_afresh(datastore)
            return replay(_disk(datastore, ARCHIVED), reads)

        def baseline() -> float:
            drop_caches()
            return replay(_disk(datastore, RESIDENT), reads)

        yield Measures(ours, baseline)


@contextmanager
def _recalled(laboratory: Laboratory) -> Iterator[Measures]:
    reads = laboratory.boot_reads
    with _two_disks(laboratory, _NO_HYDRATION) as datastore:

        def ours() -> float:
            _archive_afresh(datastore)
            before = datastore.recalled()
            replay(_disk(datastore, ARCHIVED), reads)
            return datastore.recalled().since(before).total

        yield Measures(ours, lambda: float(unique_bytes(reads)))


@contextmanager
def peak_pss(pid: int) -> Iterator[list[int]]:
    """Samples of a process's PSS in bytes, taken while inside; complete afterwards, and never empty."""
    samples, ended = [pss_bytes(pid)], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_INTERVAL_S):
            samples.append(pss_bytes(pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield samples
    finally:
        ended.set()
        sampler.join()


@contextmanager
def _memory(laboratory: Laboratory) -> Iterator[Measures]:
    with _two_disks(laboratory) as datastore:

        def ours() -> float:
            with peak_pss(datastore.daemon_pid) as samples:
                _archive_afresh(datastore)
                replay(_disk(datastore, ARCHIVED), laboratory.boot_reads)
                datastore.vmfs("recall", ARCHIVED)
            return float(max(samples))

        yield Measures(ours, lambda: float(_MEMORY_BUDGET_BYTES))


ROWS = (
    Row(
        "boot",
        "seconds to the marker of a full boot, archived",
        "the same, resident",
        "s",
        Target("at most", 1.5),
        3,
        _boots,
    ),
    Row(
        "replay",
        "the reads of a recorded boot at full speed, archived",
        "the same, resident",
        "s",
        Target("at most", 5),
        9,
        _replays,
    ),
    Row(
        "recalled",
        "bytes recalled by the reads of a boot, hydration off",
        "different bytes that it reads",
        "B",
        Target("at most", 1.5),
        3,
        _recalled,
    ),
    Row(
        "memory",
        "most memory (PSS) of the daemon during an archive, a boot's reads and a full recall",
        "a budget of 150 MiB",
        "B",
        Target("at most", 1),
        3,
        _memory,
    ),
)
