"""Rows of a store that many hosts have filled for long: 60,000 restore points of 2,000 VMs.

The points are made up, and so are their packs: what is measured never looks into them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lab.datastore import PROGRAM, Datastore, pss_bytes
from scripts.lab.failure import LabError
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.ids import ChunkId, PackId, PointId, VmId, WriterId
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.keys import manifest_key, pack_key, segment_key
from vmfs_stub.store.manifest import FileKind, Manifest, StoredFile, encode_manifest
from vmfs_stub.store.segments import SealedSegment, entries_of, seal_segment

_VMS: Final = 2_000
_POINTS_OF_A_VM: Final = 30
_FORGOTTEN_OF_A_VM: Final = 5
_CHUNK: Final = 64 << 10
_SIZE: Final = (SEGMENT_CHUNKS + 1) * _CHUNK
"""Of each VM's disk: two segments, of which the first is new in each point."""
_BUDGET: Final = float(300 << 20)


def _put(store: Path, key: str, data: bytes) -> None:
    path = store / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _segment(store: Path, number: int, slots: int) -> SealedSegment:
    """A segment with one chunk in a pack of its own; the rest is zeros."""
    writer = WriterId(f"{number:016x}")
    pack = PackId(f"{number % 256:02x}{number:014x}{writer}")
    ref = FrameRef(ChunkId(number.to_bytes(32, "little")), pack, 0, 100, _CHUNK, bytes(16))
    segment = seal_segment([*entries_of([ref]), *[None] * (slots - 1)], _CHUNK, writer)
    assert segment is not None
    _put(store, pack_key(pack), b"made up")
    _put(store, segment_key(segment.segment_id), segment.data)
    return segment


def _fill(store: Path) -> None:
    number = 0
    for vm in range(_VMS):
        vm_id = VmId(f"{vm:032x}")
        number += 1
        shared = _segment(store, number, 1)
        for which in range(_POINTS_OF_A_VM):
            number += 1
            point_id = PointId(f"{number:032x}")
            ids = (_segment(store, number, SEGMENT_CHUNKS).segment_id, shared.segment_id)
            disk = StoredFile("disk.raw", FileKind.FILE, _SIZE, 0o600, 0, 0, 1, 1, segments=ids)
            made = Manifest(vm_id, point_id, f"vm{vm}", 1.7e9 + which * 86400, "host", _CHUNK, (disk,))
            _put(store, manifest_key(vm_id, point_id), encode_manifest(made))
            if which < _FORGOTTEN_OF_A_VM:
                _put(store, f"forgotten/{vm_id}/{point_id}", b"")


@contextmanager
def _made_full(laboratory: Laboratory) -> Iterator[Datastore]:
    with laboratory.datastore({"store": {"listing_lag_s": 0}}) as datastore:
        laboratory.say(f"making up {_VMS * _POINTS_OF_A_VM} restore points")
        _fill(datastore.store)
        yield datastore


def _peak_bytes(command: Sequence[str | Path]) -> int:
    """The most memory that a command had resident."""
    words = [str(word) for word in command]
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise LabError(f"{' '.join(words)!r} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


@contextmanager
def _collecting(laboratory: Laboratory) -> Iterator[Measures]:
    datastore = laboratory.shared(_made_full)

    def ours() -> float:
        started_s = time.monotonic()
        peak = _peak_bytes([PROGRAM, "--config", datastore.config, "gc", "--json"])
        laboratory.say(f"garbage collection took {time.monotonic() - started_s:.0f} s")
        return float(peak)

    yield Measures(ours, lambda: _BUDGET)


@contextmanager
def _backing_up(laboratory: Laboratory) -> Iterator[Measures]:
    datastore = laboratory.shared(_made_full)
    disk = datastore.backing / "new" / "disk.raw"
    disk.parent.mkdir(exist_ok=True)

    def ours() -> float:
        disk.write_bytes(os.urandom(64 << 20))
        datastore.mount()
        started_s = time.monotonic()
        datastore.vmfs("backup", "new")
        laboratory.say(f"a backup of 64 MiB took {time.monotonic() - started_s:.0f} s")
        used = float(pss_bytes(datastore.daemon_pid))
        datastore.unmount()
        return used

    yield Measures(ours, lambda: _BUDGET)


ROWS = (
    Row(
        "gc-60000",
        "most memory of garbage collection in a store with 60,000 restore points of 2,000 VMs",
        "a budget of 300 MiB",
        "B",
        Target("at most", 1),
        3,
        _collecting,
    ),
    Row(
        "backup-60000",
        "memory (PSS) of a daemon after a backup into a store with 60,000 restore points of 2,000 VMs",
        "a budget of 300 MiB",
        "B",
        Target("at most", 1),
        3,
        _backing_up,
    ),
)
