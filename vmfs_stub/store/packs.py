"""Packs: objects of many frames, with a footer that lists them.

Layout: frames back to back from byte 0, then one entry per frame, then a trailer whose BLAKE3 covers entries and
trailer.  The trailer names the pack, so a pack stored under another name is found.  The footer alone rebuilds the
chunk index; in an encrypted store its entries are sealed, and its trailer is not.  Layout: docs/FORMAT.md.
This module must not know how packs are transported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blake3 import blake3

from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, FrameRef
from vmfs_stub.core.errors import CorruptPack, UnknownFormat
from vmfs_stub.core.ids import ChunkId, PackId
from vmfs_stub.store import frames
from vmfs_stub.store.format import (
    FRAME_HEADER,
    FRAME_LENGTH_MAX,
    PACK_ENTRY,
    PACK_FOOTER_SIZE_MAX,
    PACK_FRAMES_MAX,
    PACK_MAGIC,
    PACK_SIZE,
    PACK_SIZE_MAX,
    PACK_TAIL_SIZE,
    PACK_TRAILER,
    PACK_VERSION,
)
from vmfs_stub.store.frames import EncodedChunk
from vmfs_stub.store.keys import pack_key, writer_of
from vmfs_stub.store.objects import Buffer, ObjectStore
from vmfs_stub.store.sealing import PLAIN, Sealing

BUFFER_SIZE = PACK_SIZE + PACK_FOOTER_SIZE_MAX + PACK_TAIL_SIZE


@dataclass(frozen=True, slots=True)
class SealedPack:
    """A whole pack, ready to be put; ``buffer`` is ``data``'s memory and is reused once it is put."""

    pack_id: PackId
    data: memoryview
    refs: tuple[FrameRef, ...]
    buffer: bytearray


class OpenPack:
    """A pack being filled, in one preallocated buffer.  Not thread-safe."""

    def __init__(self, pack_id: PackId, buffer: bytearray | None = None, *, sealing: Sealing = PLAIN) -> None:
        self.pack_id = pack_id
        self._sealing = sealing
        self._buffer = bytearray(BUFFER_SIZE) if buffer is None else buffer
        self._view = memoryview(self._buffer)
        self._end = 0
        self._refs: list[FrameRef] = []

    def has_room(self, length: int) -> bool:
        """Whether a frame of ``length`` bytes still fits."""
        return self._end + length <= PACK_SIZE and len(self._refs) < PACK_FRAMES_MAX

    def add(self, chunk: EncodedChunk) -> FrameRef:
        """Copy a frame in; the caller has asked ``has_room``."""
        start = self._end
        end = start + len(chunk.frame)
        self._view[start:end] = chunk.frame
        self._end = end
        ref = FrameRef(chunk.chunk_id, self.pack_id, start, end - start, chunk.raw_length, chunk.checksum)
        self._refs.append(ref)
        return ref

    def seal(self) -> SealedPack:
        """Write footer and trailer; the pack takes no more frames."""
        footer = self._sealing.seal(encode_entries(self._refs), pack_key(self.pack_id))
        end = self._end + len(footer)
        self._view[self._end : end] = footer
        PACK_TRAILER.pack_into(
            self._buffer,
            end,
            bytes.fromhex(self.pack_id),
            self._end,
            len(footer),
            len(self._refs),
            PACK_VERSION,
            0,
        )
        end += PACK_TRAILER.size
        tail = blake3(self._view[self._end : end]).digest() + PACK_MAGIC
        self._view[end : end + len(tail)] = tail
        return SealedPack(self.pack_id, self._view[: end + len(tail)], tuple(self._refs), self._buffer)


def read_footer(objects: ObjectStore, pack_id: PackId, sealing: Sealing = PLAIN) -> list[FrameRef]:
    """The frames of a stored pack, by its footer.

    Raises: ObjectMissing, CorruptPack, UnknownFormat.
    """
    key = pack_key(pack_id)
    return _footer(
        lambda offset, length: objects.get_range(key, offset=offset, length=length), objects.size(key), pack_id, sealing
    )


def check_pack(data: Buffer, pack_id: PackId, sealing: Sealing = PLAIN) -> None:
    """See that the bytes of a pack are whole: its footer, and every frame by its checksum.

    Raises: CorruptPack, CorruptFrame, UnknownFormat.
    """
    view, seal = memoryview(data), sealing.frame_seal(writer_of(pack_id))
    for ref in _footer(lambda offset, length: view[offset : offset + length], len(view), pack_id, sealing):
        frames.decode(view[ref.offset : ref.end], ref, seal)


def _footer(read: Callable[[int, int], Buffer], size: int, pack_id: PackId, sealing: Sealing) -> list[FrameRef]:
    """The frames of a pack of ``size`` bytes, of which ``read`` gives those at an offset, of a length."""
    key = pack_key(pack_id)
    if not PACK_TAIL_SIZE <= size <= PACK_SIZE_MAX:
        msg = f"{key}: has an impossible size of {size} bytes"
        raise CorruptPack(msg)
    tail = bytes(read(size - PACK_TAIL_SIZE, PACK_TAIL_SIZE))
    if not tail.endswith(PACK_MAGIC):
        msg = f"{key}: does not end as a pack does: cut short or not a pack"
        raise CorruptPack(msg)
    named, offset, length, count, version, zero = PACK_TRAILER.unpack_from(tail)
    if offset + length + PACK_TAIL_SIZE != size or length > PACK_FOOTER_SIZE_MAX:
        msg = f"{key}: its trailer does not fit its size"
        raise CorruptPack(msg)
    footer = bytes(read(offset, length))
    digest = blake3(footer + tail[: PACK_TRAILER.size]).digest()
    if digest != tail[PACK_TRAILER.size : PACK_TRAILER.size + 32]:
        msg = f"{key}: the checksum of its footer does not match"
        raise CorruptPack(msg)
    if version != PACK_VERSION or zero:
        msg = f"{key}: pack version {version} is not known to this version; use a newer vmfs-stub"
        raise UnknownFormat(msg)
    if named.hex() != pack_id:
        msg = f"{key}: is pack {named.hex()} under another name"
        raise CorruptPack(msg)
    entries = sealing.open(footer, key)
    if len(entries) != count * PACK_ENTRY.size or count > PACK_FRAMES_MAX:
        msg = f"{key}: its footer does not have the {count} frames that its trailer says"
        raise CorruptPack(msg)
    return decode_entries(entries, pack_id, frames_end=offset)


def encode_entries(refs: Iterable[FrameRef]) -> bytes:
    """What a footer, or an index object, says of the frames of one pack."""
    return b"".join(PACK_ENTRY.pack(r.chunk_id, r.offset, r.length, r.raw_length, r.checksum) for r in refs)


def decode_entries(entries: bytes | memoryview, pack_id: PackId, *, frames_end: int) -> list[FrameRef]:
    """Parse the entries of one pack; its frames must fill bytes 0 to ``frames_end`` without a gap.

    Raises: CorruptPack.
    """
    refs: list[FrameRef] = []
    end = 0
    for chunk_id, offset, length, raw_length, checksum in PACK_ENTRY.iter_unpack(entries):
        if offset != end or not FRAME_HEADER.size < length <= FRAME_LENGTH_MAX or not 0 < raw_length <= CHUNK_SIZE_MAX:
            break
        refs.append(FrameRef(ChunkId(chunk_id), pack_id, offset, length, raw_length, checksum))
        end = offset + length
    if end != frames_end or len(refs) * PACK_ENTRY.size != len(entries):
        msg = f"{pack_key(pack_id)}: its footer lists frames that do not fit together"
        raise CorruptPack(msg)
    return refs
