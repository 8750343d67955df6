"""Numbers, layouts and names that decide what the bytes on secondary storage mean.

Purpose: the one place for magic values, struct layouts, limits and the store's own description
(``vmfs-store.json``).  docs/FORMAT.md describes the same in words; change both together.  Where an older reader would
misread the result, raise the version of that kind, whose reader goes on accepting the older ones, or add a required
feature.

Integers are little-endian.  Every limit here is a bound for a *reader*: nothing larger is allocated, whatever a
damaged or hostile object claims.  This module must not know how objects are transported.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN
from vmfs_stub.core.errors import ConfigError, CorruptStoreObject, UnknownFormat
from vmfs_stub.core.ids import StoreId
from vmfs_stub.store import documents
from vmfs_stub.store.keys import STORE_KEY

STORE_VERSION: Final = 1
"""The newest version of a store that this program knows (versions.py); new stores are made with it."""
MANIFEST_VERSION: Final = 1
PIN_VERSION: Final = 1
FORGOTTEN_VERSION: Final = 1
PACK_VERSION: Final = 1
SEGMENT_VERSION: Final = 1
INDEX_VERSION: Final = 1
CLAIM_VERSION: Final = 1
CONDEMNED_VERSION: Final = 1
LEASE_VERSION: Final = 1
QUARANTINE_VERSION: Final = 1
MOVED_VERSION: Final = 1
"""Each kind of object has a version of its own: raising one makes no other kind unreadable."""
FEATURES_KNOWN: Final[frozenset[str]] = frozenset()
"""Required features that this reader understands; a document that needs another is refused."""
FEATURE_ENCRYPTION: Final = "encryption"
"""Of the store's description only: see sealing.py."""
FEATURE_RETIRED: Final = "retired"
"""Of condemned lists only: see condemned.py."""

DEFAULT_CHUNK_SIZE: Final = 64 * 1024
SEGMENT_CHUNKS: Final = 4096
"""Chunks that one segment describes: 256 MiB of a file at the default chunk size."""

FRAME_HEADER: Final = struct.Struct("<4sB3xII16s")
"""Magic, flags, 3 zero bytes, raw length, payload length, xxh3-128 of the raw bytes (big-endian digest)."""
FRAME_MAGIC: Final = b"vsFR"
FRAME_LZ4: Final = 0x01
"""Flag: the payload is one lz4 block without a size prefix; otherwise it is the raw bytes."""
FRAME_SEALED: Final = 0x02
"""Flag: the payload is encrypted, its GCM tag behind it; the header's last 16 bytes are nonce (12) and zeros."""
FRAME_MARK_AT: Final = 16
"""Where the last 16 bytes of the header begin."""
FRAME_TAG_SIZE: Final = 16
FRAME_LENGTH_MAX: Final = FRAME_HEADER.size + CHUNK_SIZE_MAX + FRAME_TAG_SIZE
"""A payload is never longer than its chunk, but for its tag: what does not shrink is stored raw."""

SEAL_HEADER: Final = struct.Struct("<8sHH")
"""Magic, version, 0; then the AES-SIV of the object: 16 bytes of synthetic IV and the ciphertext."""
SEAL_MAGIC: Final = b"vsSEAL\r\n"
SEAL_VERSION: Final = 1
SEAL_GROWTH: Final = SEAL_HEADER.size + 16
"""Bytes by which an object of an encrypted store is longer than a plain one's."""

PACK_SIZE: Final = 8 * 1024 * 1024
"""Bytes of frames after which a pack is sealed: one durable put or one cold read of it takes tens of milliseconds."""
PACK_SIZE_MAX: Final = 64 * 1024 * 1024
PACK_FRAMES_MAX: Final = 4096
PACK_ENTRY: Final = struct.Struct("<32sIII16s")
"""Chunk id, offset, length, raw length, xxh3-128 of the raw bytes."""
PACK_TRAILER: Final = struct.Struct("<16sQIIHH")
"""Pack id, footer offset, footer length, frame count, version, 0; then the BLAKE3 of footer and these; then magic."""
PACK_MAGIC: Final = b"vsPACK\r\n"
PACK_TAIL_SIZE: Final = PACK_TRAILER.size + 32 + len(PACK_MAGIC)
PACK_FOOTER_SIZE_MAX: Final = PACK_FRAMES_MAX * PACK_ENTRY.size + SEAL_GROWTH

SEGMENT_HEADER: Final = struct.Struct("<8sHHIIII")
"""Magic, version, 0, chunk size, slot count, entry count, pack count."""
SEGMENT_MAGIC: Final = b"vsSEGM\r\n"
SEGMENT_ENTRY: Final = struct.Struct("<32sIIII16s")
"""Chunk id, index in the pack table, offset, length, raw length, xxh3-128 of the raw bytes."""
SEGMENT_PLACE: Final = struct.Struct("<III16s")
"""The last four of these."""
SEGMENT_ENTRY_WITH_PLACE: Final = struct.Struct(f"<32sI{SEGMENT_PLACE.size}s")
"""An entry whose place is one piece: to be copied, and not looked at."""
SEGMENT_SLOT_ZERO: Final = 0xFFFF
SEGMENT_SIZE_MAX: Final = SEGMENT_HEADER.size + SEGMENT_CHUNKS * (16 + 2 + SEGMENT_ENTRY.size) + SEAL_GROWTH

INDEX_HEADER: Final = struct.Struct("<8sHHI")
"""Magic, version, 0, pack count; then per pack its id and frame count and entries; then the BLAKE3 of all before."""
INDEX_MAGIC: Final = b"vsINDX\r\n"
INDEX_PACK: Final = struct.Struct("<16sI")
INDEX_OBJECT_ENTRIES: Final = 65_536
"""Entries after which a writer closes an index object (about 4 MB)."""
INDEX_SIZE_MAX: Final = 64 * 1024 * 1024

MANIFEST_SIZE_MAX: Final = 256 * 1024 * 1024
DOCUMENT_SIZE_MAX: Final = 1024 * 1024
"""Bound for all checked documents but manifests."""

COMPRESSION: Final = "lz4-block"
HASH: Final = "blake3-256"
ENCRYPTION: Final[Mapping[str, str]] = MappingProxyType(
    {"cipher": "aes-256-gcm", "object_cipher": "aes-256-siv", "identity": "blake3-keyed"}
)
"""What the description of an encrypted store says besides."""
STORE_FORMAT: Final = "vmfs-stub store"


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """What ``vmfs-store.json`` says: fixed for the life of a store.

    ``version`` is the one that it was made with; see versions.py for the one that it is at.
    """

    store_id: StoreId
    chunk_size: int
    is_encrypted: bool = False
    version: int = STORE_VERSION


def check_chunk_size(chunk_size: int) -> None:
    """Refuse a chunk size that no store may have.

    Raises: ConfigError.
    """
    if not CHUNK_SIZE_MIN <= chunk_size <= CHUNK_SIZE_MAX or chunk_size & (chunk_size - 1):
        msg = f"a chunk size of {chunk_size} bytes is not a power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}"
        raise ConfigError(msg)


def encode_description(description: StoreDescription) -> bytes:
    """The bytes of ``vmfs-store.json``."""
    return documents.encode(
        STORE_FORMAT,
        description.version,
        {
            "store_id": description.store_id,
            "chunk_size": description.chunk_size,
            "compression": COMPRESSION,
            "hash": HASH,
            **({"required": [FEATURE_ENCRYPTION], **ENCRYPTION} if description.is_encrypted else {}),
        },
    )


def decode_description(data: bytes) -> StoreDescription:
    """Parse ``vmfs-store.json``.

    Raises: CorruptStoreObject when it is damaged; UnknownFormat when this version cannot use the store.
    """
    features = FEATURES_KNOWN | {FEATURE_ENCRYPTION}
    fields = documents.decode(data, STORE_KEY, STORE_FORMAT, version=STORE_VERSION, features=features)
    is_encrypted = FEATURE_ENCRYPTION in fields.texts("required")
    for name, known in {"compression": COMPRESSION, "hash": HASH, **(ENCRYPTION if is_encrypted else {})}.items():
        found = fields.text(name)
        if found != known:
            msg = f"{STORE_KEY}: {name} {found!r} is not known to this version; a newer vmfs-stub may read the store"
            raise UnknownFormat(msg)
    chunk_size = fields.integer("chunk_size")
    try:
        check_chunk_size(chunk_size)
    except ConfigError as exc:
        msg = f"{STORE_KEY}: {exc}"
        raise CorruptStoreObject(msg) from exc
    store_id = StoreId(fields.hex_id("store_id"))
    return StoreDescription(store_id, chunk_size, is_encrypted, fields.integer("version"))
