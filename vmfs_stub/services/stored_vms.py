"""Naming VMs and restore points of the store: ``VM`` or ``VM@POINT``.

A VM is named by its id or its name; a point by its id, the first digits of it that only it has, or ``latest``.
Without a point the newest undamaged one is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmfs_stub.core.errors import AmbiguousName, PointNotFound, VmNotFound

if TYPE_CHECKING:
    from vmfs_stub.core.ids import VmId
    from vmfs_stub.store.points import PointSummary, StoredVm

LATEST = "latest"
_PREFIX_MIN = 4


@dataclass(frozen=True, slots=True)
class NamedPoints:
    """All points of the store (no ``vm_id``), of one VM, or one of them; ``size_bytes`` is logical, of all."""

    what: str
    vm_id: VmId | None
    only: PointSummary | None
    size_bytes: int


def split_name(text: str) -> tuple[str, str]:
    """VM and point of ``VM[@POINT]``; the point is "latest" when none is given, and never holds an @."""
    vm, at, point = text.rpartition("@")
    return (vm, point or LATEST) if at and vm else (text, LATEST)


def find_stored(vms: Sequence[StoredVm], text: str) -> tuple[StoredVm, PointSummary]:
    """What ``VM[@POINT]`` names; a VM whose very name holds an @ can be named as it is.

    Raises VmNotFound, AmbiguousName, PointNotFound.
    """
    stored, point = find_named(vms, text)
    return stored, find_point(stored, point)


def find_named(vms: Sequence[StoredVm], text: str) -> tuple[StoredVm, str]:
    """The VM that ``VM[@POINT]`` names, and the point as it is named.  Raises VmNotFound, AmbiguousName."""
    if any(text in (vm.name, vm.vm_id) for vm in vms):
        return find_stored_vm(vms, text), LATEST
    vm, point = split_name(text)
    return find_stored_vm(vms, vm), point


def named_points(vms: Sequence[StoredVm], text: str | None) -> NamedPoints:
    """What ``[VM[@POINT]]`` names when a VM without a point means all its points.

    Raises VmNotFound, AmbiguousName, PointNotFound.
    """
    if text is None:
        return NamedPoints("the store", None, None, sum(point.size_bytes for vm in vms for point in vm.points))
    is_vm = "@" not in text or any(text in (vm.name, vm.vm_id) for vm in vms)
    if is_vm:
        vm = find_stored_vm(vms, text)
        return NamedPoints(text, vm.vm_id, None, sum(point.size_bytes for point in vm.points))
    vm, point = find_stored(vms, text)
    return NamedPoints(text, vm.vm_id, point, point.size_bytes)


def find_stored_vm(vms: Sequence[StoredVm], name: str) -> StoredVm:
    """The VM of that id or name; raises VmNotFound, AmbiguousName."""
    found = [vm for vm in vms if vm.vm_id == name] or [vm for vm in vms if vm.name == name]
    if not found:
        raise VmNotFound(f"the store has no restore points of a VM {name!r}; `vmfs-stub points` lists what it has")
    if len(found) > 1:
        ids = ", ".join(vm.vm_id for vm in found)
        raise AmbiguousName(f"the store has {len(found)} VMs called {name!r}; name one by its id: {ids}")
    return found[0]


def find_point(vm: StoredVm, point: str) -> PointSummary:
    """The point of ``vm`` that ``point`` names; raises PointNotFound, AmbiguousName."""
    if point == LATEST:
        sound = [known for known in vm.points if known.damaged is None]
        if not sound:
            raise PointNotFound(f"VM {vm.name!r} has no restore point that can be read; `vmfs-stub verify` says why")
        return sound[-1]
    found = [known for known in vm.points if known.point_id == point]
    if not found and len(point) >= _PREFIX_MIN:
        found = [known for known in vm.points if known.point_id.startswith(point)]
    if not found:
        raise PointNotFound(f"VM {vm.name!r} has no restore point {point}; `vmfs-stub points` lists them")
    if len(found) > 1:
        raise AmbiguousName(f"{len(found)} restore points of VM {vm.name!r} begin with {point}")
    return found[0]
