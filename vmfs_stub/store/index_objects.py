"""Objects under ``index/``: which chunks lie in which packs, so that dedup need not read every pack's footer.

An index object lists up to some hundred packs with their entries, as the footers do, and ends with the BLAKE3 of all
before.  It is a hint: losing one costs dedup, never data.  Layout: docs/FORMAT.md.
This module must not know how index objects are transported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from blake3 import blake3

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptPack, CorruptStoreObject, UnknownFormat
from vmfs_stub.core.ids import PackId
from vmfs_stub.store.format import (
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_PACK,
    INDEX_SIZE_MAX,
    INDEX_VERSION,
    PACK_ENTRY,
    PACK_FRAMES_MAX,
)
from vmfs_stub.store.packs import decode_entries, encode_entries

PackEntries = tuple[PackId, Sequence[FrameRef]]


def encode_index(packs: Iterable[PackEntries]) -> bytes:
    """The bytes of an index object."""
    body: list[bytes] = []
    count = 0
    for pack_id, refs in packs:
        count += 1
        body.append(INDEX_PACK.pack(bytes.fromhex(pack_id), len(refs)))
        body.append(encode_entries(refs))
    data = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, 0, count) + b"".join(body)
    return data + blake3(data).digest()


def decode_index(data: bytes, key: str) -> list[PackEntries]:
    """Parse the index object that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    end = len(data) - 32
    if not INDEX_HEADER.size <= end <= INDEX_SIZE_MAX or blake3(data[:end]).digest() != data[end:]:
        msg = f"{key}: checksum does not match: the object is damaged or cut short"
        raise CorruptStoreObject(msg)
    magic, version, zero, count = INDEX_HEADER.unpack_from(data)
    if magic != INDEX_MAGIC or version != INDEX_VERSION or zero:
        msg = f"{key}: index version {version} is not known to this version; use a newer vmfs-stub"
        raise UnknownFormat(msg)
    view = memoryview(data)[:end]
    packs: list[PackEntries] = []
    at = INDEX_HEADER.size
    for _ in range(count):
        if at + INDEX_PACK.size > end:
            break
        pack, frames = INDEX_PACK.unpack_from(view, at)
        at += INDEX_PACK.size
        entries = view[at : at + frames * PACK_ENTRY.size]
        if not 0 < frames <= PACK_FRAMES_MAX or len(entries) != frames * PACK_ENTRY.size:
            break
        at += len(entries)
        packs.append((PackId(pack.hex()), _decode_pack(entries, PackId(pack.hex()), key)))
    if at != end or len(packs) != count:
        msg = f"{key}: has sizes that do not fit together"
        raise CorruptStoreObject(msg)
    return packs


def _decode_pack(entries: memoryview, pack_id: PackId, key: str) -> list[FrameRef]:
    _, offset, length, _, _ = PACK_ENTRY.unpack_from(entries, len(entries) - PACK_ENTRY.size)
    try:
        return decode_entries(entries, pack_id, frames_end=offset + length)
    except CorruptPack as exc:
        msg = f"{key}: {exc}"
        raise CorruptStoreObject(msg) from exc
