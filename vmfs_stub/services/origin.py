"""Which stored file a placeholder stands for, and where the chunks of that file lie."""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.errors import IntegrityError, WrongStore
from vmfs_stub.core.ids import PointId, StoreId, VmId
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.store.chunk_table import ChunkTable
from vmfs_stub.store.store import Store


@dataclass(frozen=True, slots=True)
class Origin:
    """File number ``file_index`` of a restore point, as the placeholder's record describes it; sizes in bytes."""

    store_id: StoreId
    vm_id: VmId
    point_id: PointId
    file_index: int
    size: int
    chunk_size: int

    @classmethod
    def of(cls, record: PlaceholderRecord, *, chunk_size: int) -> Origin:
        """What a record says."""
        return cls(record.store_id, record.vm_id, record.point_id, record.file_index, record.size, chunk_size)


def open_table(store: Store, origin: Origin) -> ChunkTable:
    """The chunk table of the stored file.  Blocking; raises WrongStore, StoreError, IntegrityError, UnknownFormat."""
    if origin.store_id != store.id:
        raise WrongStore(
            f"its bytes are in store {origin.store_id}, but [store] url leads to {store.id}; correct the url"
        )
    table = store.open_point(origin.vm_id, origin.point_id).chunks(origin.file_index)
    if (table.size, table.chunk_size) != (origin.size, origin.chunk_size):
        raise IntegrityError(
            f"restore point {origin.point_id} has a file of {table.size} bytes where the placeholder stands for "
            f"{origin.size}"
        )
    return table
