"""Values of the backing directory's private structures, for tests of them."""

from __future__ import annotations

import os
from pathlib import Path

from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PlaceholderId, PointId, StoreId, VmId
from vmfs_stub.core.residency import block_count
from vmfs_stub.primary.durable_map import PAGE_BITS_SIZE, DurableMap, MapHeader, MapState, pages_of
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import BootIdentity, InodeIdentity, inode_identity
from vmfs_stub.primary.record import PlaceholderRecord

BLOCK = 4096
PLACEHOLDER = PlaceholderId("a1" * 16)
OTHER = PlaceholderId("b2" * 16)
VM = VmId("c3" * 16)
POINT = PointId("d4" * 16)
STORE = StoreId("e5" * 16)
BOOT = BootIdentity("f6" * 16, 7)
LATER_BOOT = BootIdentity("07" * 16, 7)
IDENTITY = InodeIdentity("18" * 16, 42, 3)


def header(blocks: int, *, identity: InodeIdentity = IDENTITY, live: BootIdentity | None = None) -> MapHeader:
    return MapHeader(
        placeholder_id=PLACEHOLDER,
        vm_id=VM,
        point_id=POINT,
        identity=identity,
        state=MapState.PUNCHED,
        size=blocks * BLOCK,
        chunk_size=64 * 1024,
        archived_limit=blocks * BLOCK,
        live=live,
    )


def record_of(path: Path, *, size: int | None = None) -> PlaceholderRecord:
    """A record that fits the file at ``path``."""
    fd = os.open(path, os.O_RDONLY)
    try:
        identity = inode_identity(fd)
        logical = os.fstat(fd).st_size if size is None else size
    finally:
        os.close(fd)
    return PlaceholderRecord(
        placeholder_id=PLACEHOLDER,
        store_id=STORE,
        vm_id=VM,
        point_id=POINT,
        file_index=0,
        size=logical,
        mtime_ns=1_700_000_000_000_000_001,
        archived_ns=1_700_000_001_000_000_000,
        filesystem=identity.filesystem,
        ino=identity.ino,
        generation=identity.generation,
    )


def make_map(files: FileCalls, path: Path, header: MapHeader, resident: set[int]) -> DurableMap:
    """A new durable map in which these blocks are resident."""
    durable = DurableMap.create(files, path, header)
    durable.update(pages_of(Extent(block, block + 1) for block in sorted(resident)), header)
    return durable


def pages_in_turn(blocks: int, resident: set[int]) -> list[bytes]:
    """All pages of a map, as `DurableMap.load_pages` yields them."""
    bits = bits_of(blocks, resident)
    return [bits[at : at + PAGE_BITS_SIZE].ljust(PAGE_BITS_SIZE, b"\0") for at in range(0, len(bits), PAGE_BITS_SIZE)]


def bits_of(blocks: int, resident: set[int]) -> bytes:
    bits = bytearray(-(-blocks // 8))
    for block in resident:
        bits[block >> 3] |= 1 << (block & 7)
    return bytes(bits)


def resident_of(bits: bytes | bytearray, size: int) -> set[int]:
    return {block for block in range(block_count(size)) if bits[block >> 3] >> (block & 7) & 1}
