"""Verify: proves that restore points can be restored, without restoring them.

Purpose: reads every chunk that a restore point needs and checks it by checksum and by identity (BLAKE3), and reports
each bad file with its VM's name.  Restore points share most of their segments: each segment is read once per run and
what was found wrong in it is reported for every point that uses it.

Blocking code with a few threads.  It changes nothing.  This module must not know primary storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import DAMAGE, PointNotFound
from vmfs_stub.core.ids import ChunkId, PackId, PointId, SegmentId, VmId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.store import frames
from vmfs_stub.store.chunk_table import ChunkTable, SegmentCache
from vmfs_stub.store.fallback import ReplicatedStore
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.manifest import StoredFile
from vmfs_stub.store.objects import drop_cache
from vmfs_stub.store.points import PointSummary
from vmfs_stub.store.store import Store

WORKERS: Final = 2
RUN_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes that are read and checked together."""
FINDINGS_MAX: Final = 1000
"""Findings kept per segment and per run; more say nothing new."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong; ``path`` is empty for the manifest itself, ``chunk`` None for a segment or more."""

    vm_id: VmId
    vm_name: str
    point_id: PointId
    path: str
    chunk: int | None
    problem: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked; the points are restorable exactly when ``findings`` is empty.

    ``replica_reads`` were answered by the replica, since the store did not.
    """

    point_count: int
    file_count: int
    read_bytes: int
    findings: tuple[Finding, ...]
    replica_reads: int = 0


@dataclass(frozen=True, slots=True)
class _BadChunk:
    """``slot`` is the chunk's place in its segment; None for the whole segment."""

    slot: int | None
    problem: str


def verify(
    store: Store,
    *,
    vm_id: VmId | None = None,
    point_id: PointId | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check one point, all points of one VM, or all points of the store.

    ``progress`` is called with the number of logical bytes just checked.
    Raises: PointNotFound; StoreUnavailable, StoreDenied: then nothing is known about the rest.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as executor:
        verifier = _Verifier(store, executor, progress)
        points = _selected(store, vm_id, point_id)
        for point in points:
            verifier.check_point(point)
        replica_reads = store.fallback.counts.reads if isinstance(store, ReplicatedStore) else 0
        findings = tuple(verifier.findings)
        return VerifyReport(len(points), verifier.file_count, verifier.read_bytes, findings, replica_reads)


def _selected(store: Store, vm_id: VmId | None, point_id: PointId | None) -> list[PointSummary]:
    if vm_id is None:
        return [point for vm in store.vms() for point in vm.points]
    points = [
        point for point in store.points(vm_id, with_damaged=True) if point_id is None or point.point_id == point_id
    ]
    if point_id is not None and not points:
        msg = f"VM {vm_id} has no restore point {point_id} in this store"
        raise PointNotFound(msg)
    return points


class _Verifier:
    """One run; remembers what each segment was found to be."""

    def __init__(self, store: Store, executor: ThreadPoolExecutor, progress: Progress | None) -> None:
        self._store = store
        self._executor = executor
        self._progress = progress
        self._tables = SegmentCache(store.read_segment)  # not the store's: what is in memory proves nothing
        self._segments: dict[SegmentId, tuple[_BadChunk, ...]] = {}
        self.findings: list[Finding] = []
        self.file_count = 0
        self.read_bytes = 0

    def check_point(self, summary: PointSummary) -> None:
        try:
            opened = self._store.open_point(summary.vm_id, summary.point_id)
        except PointNotFound:
            return  # pruned since the listing
        except DAMAGE as exc:
            self._report(summary, "", None, str(exc))
            return
        for stored in opened.manifest.files:
            self.file_count += 1
            self._check_file(summary, stored)

    def _check_file(self, summary: PointSummary, stored: StoredFile) -> None:
        table = ChunkTable(stored, self._store.chunk_size, self._tables)
        for number, segment_id in enumerate(stored.segments):
            first = number * SEGMENT_CHUNKS
            end = min(first + SEGMENT_CHUNKS, table.chunk_count)
            if segment_id is not None:
                try:
                    # Also for a segment that is known: whether it fits this file is this file's own question.
                    refs = table.locate(first, end)
                except DAMAGE as exc:
                    self._report(summary, stored.path, None, str(exc))
                else:
                    for bad in self._check_segment(segment_id, refs):
                        chunk = None if bad.slot is None else first + bad.slot
                        self._report(summary, stored.path, chunk, bad.problem)
            if self._progress is not None:
                self._progress(min(end * table.chunk_size, table.size) - first * table.chunk_size)

    def _check_segment(self, segment_id: SegmentId, refs: Sequence[FrameRef | None]) -> tuple[_BadChunk, ...]:
        known = self._segments.get(segment_id)
        if known is None:
            runs = _runs(refs)
            bad = [item for found in self._executor.map(self._check_run, runs) for item in found]
            self.read_bytes += sum(ref.length for run in runs for _, ref in run)
            known = self._segments[segment_id] = tuple(islice(sorted(bad, key=_by_slot), FINDINGS_MAX))
        return known

    def _check_run(self, run: list[tuple[int, FrameRef]]) -> list[_BadChunk]:
        drop_cache(self._store.objects, pack_key(run[0][1].pack_id))
        try:
            for (_, ref), raw in zip(run, self._store.fetch([ref for _, ref in run]), strict=True):
                frames.check_identity(raw, ref, self._store.sealing)
        except DAMAGE as exc:
            if len(run) == 1:
                return [_BadChunk(run[0][0], str(exc))]
        else:
            return []
        # Something in it is wrong: find out exactly which, one by one.
        return [bad for item in run for bad in self._check_run([item])]

    def _report(self, summary: PointSummary, path: str, chunk: int | None, problem: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(summary.vm_id, summary.vm_name, summary.point_id, path, chunk, problem))


def _by_slot(bad: _BadChunk) -> int:
    return -1 if bad.slot is None else bad.slot


def _runs(refs: Iterable[FrameRef | None]) -> list[list[tuple[int, FrameRef]]]:
    """Frames of one pack that lie one after another, by place in the pack, each with its slot."""
    places: dict[tuple[PackId, int, ChunkId], tuple[int, FrameRef]] = {}
    for slot, ref in enumerate(refs):
        if ref is not None:
            places.setdefault((ref.pack_id, ref.offset, ref.chunk_id), (slot, ref))
    fetches = plan_fetches(places.values(), fetch_bytes_max=RUN_BYTES, gap_bytes_max=0)
    return [list(zip(fetch.chunks, fetch.frames, strict=True)) for fetch in fetches]
