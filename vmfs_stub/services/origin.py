"""Where the chunks of a stored file lie."""

from __future__ import annotations

from vmfs_stub.core.errors import IntegrityError, WrongStore
from vmfs_stub.core.origin import Origin
from vmfs_stub.store.chunk_table import ChunkTable
from vmfs_stub.store.store import Store


def open_table(store: Store, origin: Origin) -> ChunkTable:
    """The chunk table of the stored file.  Blocking; raises WrongStore, StoreError, IntegrityError, UnknownFormat."""
    if origin.store_id != store.id:
        raise WrongStore(
            f"its bytes are in store {origin.store_id}, but [store] url leads to {store.id}; correct the url"
        )
    point = store.open_point(origin.vm_id, origin.point_id)
    if origin.file_index >= len(point.manifest.files):
        raise IntegrityError(f"restore point {origin.point_id} has no file number {origin.file_index}")
    table = point.chunks(origin.file_index)
    if (table.size, table.chunk_size) != (origin.size, origin.chunk_size):
        raise IntegrityError(
            f"restore point {origin.point_id} has a file of {table.size} bytes where one of {origin.size} was stored"
        )
    return table
