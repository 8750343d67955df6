"""Which VMs of the store a datastore has, had, or never had; for whoever is not its daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.ids import VmId
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.store.points import StoredVm


@dataclass(frozen=True, slots=True)
class DatastoreVms:
    """``ids`` of the VMs that are there; ``host`` and ``name`` of the datastore, as restore points made from it say."""

    host: str
    name: str
    ids: frozenset[VmId]

    def has_deleted(self, vm: StoredVm) -> bool | None:
        """Whether a VM was here and is here no more; None when its last readable point was not made from here."""
        if vm.vm_id in self.ids:
            return False
        last = next((point for point in reversed(vm.points) if point.damaged is None), None)
        return True if last is not None and (last.host, last.datastore) == (self.host, self.name) else None


def read_datastore_vms(backing: Path, *, host: str, name: str) -> DatastoreVms:
    """The VMs in a backing directory; raises PrimaryIOError, Unsupported when not all of them can be told."""
    return DatastoreVms(host, name, DirectoryInventory(backing).ids())
