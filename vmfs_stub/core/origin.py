"""Which file of which restore point something was copied from, so that a reference can stand for its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.ids import PointId, StoreId, VmId


@dataclass(frozen=True, slots=True)
class Origin:
    """File number ``file_index`` of a restore point; sizes in bytes."""

    store_id: StoreId
    vm_id: VmId
    point_id: PointId
    file_index: int
    size: int
    chunk_size: int
