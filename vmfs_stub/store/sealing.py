"""Whether what a store holds is encrypted, and how: the one place that knows.

Purpose: everything that writes or reads content is given a `Sealing` and asks no more.  A store is plain or encrypted
from its making on; what is sealed in a plain store, or not sealed in an encrypted one, is damage.

Here is what is asked for, and the plain way; `aes_sealing.py` has the other one.  Layout and threats: docs/FORMAT.md;
why so: docs/adr/encryption.md.

This module must not know where keys come from (`keyring.py`), nor log or show any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from blake3 import blake3

from vmfs_stub.core.errors import KeyMissing
from vmfs_stub.core.ids import ChunkId, WriterId
from vmfs_stub.store.format import FRAME_HEADER, FRAME_MARK_AT, StoreDescription
from vmfs_stub.store.objects import Buffer, ObjectStore

STORE_KEY_SIZE: Final = 32
_HEADER_SIZE: Final = FRAME_HEADER.size


@dataclass(frozen=True, slots=True)
class StoreKey:
    """The key of an encrypted store, in memory only; travels to the mover, and is shown nowhere."""

    secret: bytes = field(repr=False)


class SealBroken(Exception):
    """What was sealed is not what was expected; says how it differs, in the form "the frame …"."""


class FrameSeal(Protocol):
    """Seals and opens the payloads of one job's frames; thread-safe.

    ``names`` are the 32 bytes of the chunk's identity and the 16 of its checksum.  ``flag`` is set in the header of
    each frame; ``growth`` is how many bytes a payload gets longer.
    """

    @property
    def flag(self) -> int: ...
    @property
    def growth(self) -> int: ...
    def mark(self, checksum: bytes) -> bytes:
        """The last 16 bytes of a new frame's header."""
        ...

    def seal(self, frame: memoryview, payload: Buffer, names: bytes) -> None:
        """Write the payload behind the header that ``frame`` has; it has just the room."""
        ...

    def open(self, frame: memoryview, names: bytes) -> Buffer:
        """The payload of a frame.  Raises: SealBroken."""
        ...


class Sealing(Protocol):
    """How a store's content is sealed; thread-safe."""

    def chunk_id(self, raw: Buffer) -> ChunkId:
        """The identity of a chunk."""
        ...

    def frame_seal(self, writer_id: WriterId) -> FrameSeal:
        """For the frames of the packs of one writer, which `keys.writer_of` tells."""
        ...

    def seal(self, data: bytes, key: str) -> bytes:
        """The bytes to store under ``key``; the same ones each time.

        A segment's name is the hash of these bytes, so its ``key`` is just ``segments/``.
        """
        ...

    def open(self, data: bytes, key: str) -> bytes:
        """What was sealed to be stored under ``key``.

        Raises: the integrity error of the key; UnknownFormat.
        """
        ...

    def around(self, objects: ObjectStore) -> ObjectStore:
        """The same objects, those sealed whole in the clear; packs and segments are left to who knows their parts."""
        ...


class _PlainFrames:
    flag = 0
    growth = 0

    def mark(self, checksum: bytes) -> bytes:
        return checksum

    def seal(self, frame: memoryview, payload: Buffer, names: bytes) -> None:
        frame[_HEADER_SIZE:] = payload

    def open(self, frame: memoryview, names: bytes) -> Buffer:
        if frame[FRAME_MARK_AT:_HEADER_SIZE] != names[32:]:
            raise SealBroken("has a damaged header")
        return frame[_HEADER_SIZE:]


class PlainSealing:
    """Of a store that is not encrypted: everything is stored as it is."""

    def chunk_id(self, raw: Buffer) -> ChunkId:
        """See Sealing."""
        return ChunkId(blake3(raw).digest())

    def frame_seal(self, writer_id: WriterId) -> FrameSeal:
        """See Sealing."""
        return PLAIN_FRAMES

    def seal(self, data: bytes, key: str) -> bytes:
        """See Sealing."""
        return data

    def open(self, data: bytes, key: str) -> bytes:
        """See Sealing."""
        return data

    def around(self, objects: ObjectStore) -> ObjectStore:
        """See Sealing."""
        return objects


PLAIN_FRAMES: Final[FrameSeal] = _PlainFrames()
PLAIN: Final[Sealing] = PlainSealing()


def sealing_of(description: StoreDescription, key: StoreKey | None) -> Sealing:
    """How the store of that description is sealed; a plain one has no key.

    Raises: KeyMissing.
    """
    if not description.is_encrypted:
        return PLAIN
    if key is None:
        raise KeyMissing(f"store {description.store_id} is encrypted, and its key was not given")
    from vmfs_stub.store.aes_sealing import AesSealing  # 8 MiB of memory, of which plain stores have no use

    return AesSealing(key)
