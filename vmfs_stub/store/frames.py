"""Frames: one stored chunk each, and the batch encoding of a file's bytes into them.

A frame is a 32-byte header and a payload: one lz4 block when that is shorter, else the raw bytes.  The header carries
the raw length and the xxh3-128 of the raw bytes; both are also in every reference to the frame, so a frame is checked
against what its *user* expects, not only against itself.  In an encrypted store the payload is encrypted and the
checksum is not in the header (`sealing.py`).  Layout: docs/FORMAT.md.

Speed: the C calls here release the GIL for a 64 KiB chunk; everything else per chunk is kept to a few microseconds.
This module must not know packs, files or stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import lz4.block  # type: ignore[import-untyped]
from xxhash import xxh3_128_digest

from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, FrameRef
from vmfs_stub.core.errors import CorruptFrame
from vmfs_stub.core.ids import ChunkId
from vmfs_stub.store.format import FRAME_HEADER, FRAME_LENGTH_MAX, FRAME_LZ4, FRAME_MAGIC, FRAME_SEALED
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.sealing import PLAIN, PLAIN_FRAMES, FrameSeal, SealBroken, Sealing

_ZEROS = bytes(CHUNK_SIZE_MAX)
_HEADER_SIZE = FRAME_HEADER.size
_compress = lz4.block.compress
_decompress = lz4.block.decompress


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk ready to be laid into a pack: its identity, checksum and whole frame."""

    chunk_id: ChunkId
    checksum: bytes
    raw_length: int
    frame: memoryview


def identities(data: bytes | bytearray, chunk_size: int, sealing: Sealing = PLAIN) -> list[ChunkId | None]:
    """The identity of each chunk of ``data``; None for a chunk of zeros.

    ``data`` must be bytes or bytearray: ``startswith`` then compares with zeros in place, with no copy.
    """
    view = memoryview(data)
    zeros = _ZEROS[:chunk_size]
    found: list[ChunkId | None] = []
    for start in range(0, len(data), chunk_size):
        end = min(start + chunk_size, len(data))
        expected = zeros if end - start == chunk_size else zeros[: end - start]
        if not data[start] and not data[end - 1] and data.startswith(expected, start):
            found.append(None)
        else:
            found.append(sealing.chunk_id(view[start:end]))
    return found


def encode(raw: memoryview, chunk_id: ChunkId, *, into: memoryview, seal: FrameSeal = PLAIN_FRAMES) -> EncodedChunk:
    """Write the frame of one chunk to the start of ``into``.

    That has room for the header, the raw bytes and the ``growth`` of the seal.

    The copy keeps a pipeline of batches from holding one small allocation per chunk, and lets the caller use its own
    buffer again at once.
    """
    checksum = xxh3_128_digest(raw)
    size = len(raw)
    payload: Buffer = _compress(raw, store_size=False)
    flags = FRAME_LZ4
    # Less than 1/16 saved is not worth a decompression at each recall.
    if len(payload) > size - size // 16:
        payload, flags = raw, 0
    length = len(payload) + seal.growth
    frame = into[: _HEADER_SIZE + length]
    FRAME_HEADER.pack_into(frame, 0, FRAME_MAGIC, flags | seal.flag, size, length, seal.mark(checksum))
    seal.seal(frame, payload, chunk_id + checksum)
    return EncodedChunk(chunk_id, checksum, size, frame)


def decode(frame: memoryview, ref: FrameRef, seal: FrameSeal = PLAIN_FRAMES) -> bytes:
    """The raw bytes of a frame, verified against what ``ref`` expects.

    Raises: CorruptFrame.
    """
    if len(frame) != ref.length or len(frame) < _HEADER_SIZE or len(frame) > FRAME_LENGTH_MAX:
        raise _corrupt(ref, "has an impossible length")
    magic, flags, raw_length, payload_length, _ = FRAME_HEADER.unpack_from(frame)
    if (
        magic != FRAME_MAGIC
        or frame[5] | frame[6] | frame[7]
        or flags & ~(FRAME_LZ4 | FRAME_SEALED)
        or raw_length != ref.raw_length
        or raw_length > CHUNK_SIZE_MAX
        or payload_length != ref.length - _HEADER_SIZE
    ):
        raise _corrupt(ref, "has a damaged header")
    if flags & FRAME_SEALED != seal.flag:
        raise _corrupt(ref, "is not encrypted, in a store that is" if seal.flag else "is encrypted, in a plain store")
    try:
        payload = seal.open(frame, ref.chunk_id + ref.checksum)
    except SealBroken as exc:
        raise _corrupt(ref, str(exc)) from exc
    if flags & FRAME_LZ4:
        try:
            raw: bytes = _decompress(payload, uncompressed_size=raw_length)
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as exc:
            raise _corrupt(ref, "cannot be decompressed") from exc
    else:
        raw = bytes(payload)
    if len(raw) != raw_length or xxh3_128_digest(raw) != ref.checksum:
        raise _corrupt(ref, "has damaged content")
    return raw


def describes(ref: FrameRef, raw: memoryview) -> bool:
    """Whether a reference expects just these raw bytes (by length and checksum; its identity is known to match)."""
    return ref.raw_length == len(raw) and ref.checksum == xxh3_128_digest(raw)


def check_identity(raw: Buffer, ref: FrameRef, sealing: Sealing = PLAIN) -> None:
    """Check decoded bytes against the chunk's identity.

    Raises: CorruptFrame.
    """
    if sealing.chunk_id(raw) != ref.chunk_id:
        raise _corrupt(ref, "holds another chunk than its reference says")


def _corrupt(ref: FrameRef, problem: str) -> CorruptFrame:
    return CorruptFrame(
        f"the frame at {ref.offset}+{ref.length} of pack {ref.pack_id} {problem} (chunk {ref.chunk_id.hex()})"
    )
