"""Which VMs and restore points a store has, in short.

Purpose: a listing reads each manifest once, since a committed one never changes, and keeps what is told of it.  Void
points are left out, and so are forgotten ones where nothing else is said.  Thread-safe and blocking.  This module must
not know what points are listed for.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import CorruptManifest, PointNotFound, UnknownFormat
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.store.keys import FORGOTTEN, MANIFESTS, forgotten_of, is_id, manifest_key, manifests_of
from vmfs_stub.store.manifest import VOID_SIZE_MAX, Manifest
from vmfs_stub.store.objects import ObjectInfo, ObjectStore

SUMMARIES_KEPT: Final = 100_000
"""Summaries of immutable manifests kept in memory: 2,000 VMs with 30 points and room to spare."""


@dataclass(frozen=True, slots=True)
class PointSummary:
    """A committed restore point in short; ``created_s`` is Unix time, ``size_bytes`` logical.

    ``datastore`` is that which ``host`` backed the VM up from; empty where the manifest does not say.  ``damaged`` says
    what is wrong with a manifest that cannot be read; all but the ids is then empty.
    """

    vm_id: VmId
    point_id: PointId
    vm_name: str
    created_s: float
    host: str
    file_count: int
    size_bytes: int
    damaged: str | None = None
    datastore: str = ""


@dataclass(frozen=True, slots=True)
class StoredVm:
    """A VM that the store has restore points of, oldest first; ``name`` is that of the newest readable one."""

    vm_id: VmId
    name: str
    points: tuple[PointSummary, ...]


class PointListing:
    """The restore points of one store; ``read`` gives the manifest of one, or raises PointNotFound."""

    def __init__(self, objects: ObjectStore, read: Callable[[VmId, PointId], Manifest]) -> None:
        self._objects = objects
        self._read = read
        self._summaries: OrderedDict[str, PointSummary | None] = OrderedDict()
        """None: there is no such point."""
        self._lock = threading.Lock()

    def vms(self) -> list[StoredVm]:
        """All VMs with committed restore points that are not forgotten, by name."""
        by_vm: dict[VmId, list[PointSummary]] = {}
        for vm_id, point_id, _ in self._committed():
            summary = self._summary(vm_id, point_id)
            if summary is not None:
                by_vm.setdefault(vm_id, []).append(summary)
        vms = [_stored_vm(vm_id, _oldest_first(found)) for vm_id, found in by_vm.items()]
        return sorted(vms, key=lambda vm: (vm.name, vm.vm_id))

    def vm(self, vm_id: VmId, *, known: PointId | None = None) -> StoredVm | None:
        """One VM as `vms` has it; None when it has no point.

        A point that is ``known`` to have been committed is asked for by its name where a listing, which may lag, does
        not have it.
        """
        points = self.points(vm_id, with_damaged=True)
        if (
            known is not None
            and known not in {point.point_id for point in points}
            and not self.is_forgotten(vm_id, known)
        ):
            points += filter(None, [self._summary(vm_id, known)])
        return _stored_vm(vm_id, _oldest_first(points)) if points else None

    def point_counts(self) -> dict[VmId, int]:
        """Number of restore points of each VM as `vms` has them, from names and sizes.  Raises: StoreUnavailable."""
        return dict(
            Counter(
                vm_id
                for vm_id, point_id, size in self._committed()
                if size > VOID_SIZE_MAX or self._summary(vm_id, point_id) is not None
            )
        )

    def points(self, vm_id: VmId, *, with_damaged: bool = False, but: Collection[PointId] = ()) -> list[PointSummary]:
        """Restore points of a VM as `vms` has them, oldest first; those with a damaged manifest only when asked for.

        ``but`` are left out, and not read.
        """
        found = [self._summary(vm_id, point_id) for _, point_id, _ in self._committed(vm_id) if point_id not in but]
        known = [summary for summary in found if summary is not None]
        return list(_oldest_first([point for point in known if with_damaged or point.damaged is None]))

    def stored_points(self) -> list[tuple[VmId, PointId]]:
        """All committed points, those that are forgotten and still there included.  Raises: StoreUnavailable."""
        return sorted(points_named(self._objects.list(MANIFESTS)))

    def is_forgotten(self, vm_id: VmId, point_id: PointId) -> bool:
        """Whether a point has the mark.  Raises: StoreUnavailable, StoreDenied."""
        return (vm_id, point_id) in points_named(self._objects.list(forgotten_of(vm_id)))

    def _committed(self, vm_id: VmId | None = None) -> Iterator[tuple[VmId, PointId, int]]:
        """Points of a VM, or of all, that are not forgotten, with the sizes of their manifests; void ones included."""
        of_manifests, of_marks = (MANIFESTS, FORGOTTEN) if vm_id is None else (manifests_of(vm_id), forgotten_of(vm_id))
        # The marks first: a mark goes after its manifest, which must not be taken for one that never had any.
        forgotten = set(points_named(self._objects.list(of_marks)))
        for info in self._objects.list(of_manifests):
            for ids in points_named([info]):
                if ids not in forgotten:
                    yield (*ids, info.size)

    def _summary(self, vm_id: VmId, point_id: PointId) -> PointSummary | None:
        key = manifest_key(vm_id, point_id)
        with self._lock:
            if key in self._summaries:
                return self._summaries[key]
        try:
            manifest = self._read(vm_id, point_id)
        except PointNotFound:  # a void one, or deleted since the listing: there never will be another of this name
            return self._keep(key, None)
        except (CorruptManifest, UnknownFormat) as exc:
            return PointSummary(vm_id, point_id, "", 0.0, "", 0, 0, damaged=str(exc))
        return self._keep(
            key,
            PointSummary(
                vm_id,
                point_id,
                manifest.vm_name,
                manifest.created_s,
                manifest.host,
                len(manifest.files),
                manifest.size,
                datastore=manifest.metadata.get("datastore", ""),
            ),
        )

    def _keep(self, key: str, summary: PointSummary | None) -> PointSummary | None:
        with self._lock:
            self._summaries[key] = summary
            if len(self._summaries) > SUMMARIES_KEPT:
                self._summaries.popitem(last=False)
        return summary


def points_named(infos: Iterable[ObjectInfo]) -> Iterator[tuple[VmId, PointId]]:
    """The restore points that objects belong to; neither pending manifests nor foreign files belong to one."""
    for info in infos:
        _, vm_id, point_id = (*info.key.split("/"), "", "")[:3]
        if is_id(vm_id) and is_id(point_id):
            yield VmId(vm_id), PointId(point_id)


def _stored_vm(vm_id: VmId, points: Sequence[PointSummary]) -> StoredVm:
    """A VM with these points, oldest first."""
    name = next((point.vm_name for point in reversed(points) if point.damaged is None), "")
    return StoredVm(vm_id, name, tuple(points))


def _oldest_first(points: Sequence[PointSummary]) -> tuple[PointSummary, ...]:
    return tuple(sorted(points, key=lambda point: (point.created_s, point.point_id)))
