"""Which VMs of the store a datastore has, had, or never had; for whoever is not its daemon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.errors import CorruptRecord, IntegrityError, PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import DatastoreId, VmId
from vmfs_stub.core.names import PRIVATE_DIR
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.primary.datastore_id import load_datastore_id
from vmfs_stub.store.claims import Claim
from vmfs_stub.store.points import StoredVm


@dataclass(frozen=True, slots=True)
class DatastoreVms:
    """``ids`` of the VMs that are there; ``host`` and ``name`` of the datastore, as restore points made from it say.

    ``id`` is the datastore's own, by which claims name it; None when it has none that can be read.
    """

    host: str
    name: str
    ids: frozenset[VmId]
    id: DatastoreId | None = None

    def has_deleted(self, vm: StoredVm, claim_of: Callable[[VmId], Claim | None]) -> bool | None:
        """Whether a VM was here and is here no more; None when that is not certain.

        So it is when its last readable point was not made from here, or another datastore had it last, by its newest
        claim, which ``claim_of`` reads: names are those of a lost datastore as well when another one is in its place,
        and a VM that was moved away was made points of from here.  Raises what ``claim_of`` does, but for damage.
        """
        if vm.vm_id in self.ids:
            return False
        last = next((point for point in reversed(vm.points) if point.damaged is None), None)
        if last is None or (last.host, last.datastore) != (self.host, self.name):
            return None
        try:
            claim = claim_of(vm.vm_id)
        except (IntegrityError, UnknownFormat):
            return None
        return True if claim is None or claim.datastore_id == self.id else None


def read_datastore_vms(backing: Path, *, host: str, name: str, memory_dir: str | None = None) -> DatastoreVms:
    """The VMs in a backing directory; raises PrimaryIOError, Unsupported when not all of them can be told.

    ``memory_dir``: see DirectoryInventory.
    """
    ids = DirectoryInventory(backing, memory_dir=memory_dir).ids()
    try:
        own = load_datastore_id(PLAIN, backing / PRIVATE_DIR)
    except (CorruptRecord, UnknownFormat):
        own = None
    except OSError as exc:
        raise PrimaryIOError(f"cannot look into {backing / PRIVATE_DIR}: {exc.strerror}") from exc
    return DatastoreVms(host, name, ids, own)
