"""Sealing of an encrypted store: AES-256-GCM for frames, AES-SIV for whole objects, BLAKE3 keyed for identities.

Of the *store key*, 32 random bytes, come a key for frames (and of that one for each job), one for whole objects and one
for identities.  A frame is bound to the chunk that it is, an object to the name that it has: neither can stand in for
another.  Layout and threats: docs/FORMAT.md; why so: docs/adr/encryption.md.

This module must not know where keys come from, nor log or show any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

from vmfs_stub.core.errors import UnknownFormat
from vmfs_stub.core.ids import ChunkId, WriterId
from vmfs_stub.store.format import (
    FRAME_HEADER,
    FRAME_MARK_AT,
    FRAME_SEALED,
    FRAME_TAG_SIZE,
    SEAL_GROWTH,
    SEAL_HEADER,
    SEAL_MAGIC,
    SEAL_VERSION,
)
from vmfs_stub.store.keys import CONDEMNED, KEYS, PACKS, PROBES, SEGMENTS, STORE_KEY, damage
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, drop_cache, put_anew
from vmfs_stub.store.sealing import FrameSeal, SealBroken, Sealing, StoreKey

_CONTEXT: Final = "vmfs-stub 2026 store key: "
"""Begins the contexts of BLAKE3's key derivation; part of the format."""
_NOT_SEALED_BY_NAME: Final = (STORE_KEY, KEYS, PACKS, SEGMENTS, CONDEMNED, PROBES)
"""What says nothing of content, and what is sealed piece by piece by whoever makes it.  All else is sealed whole."""
_HEADER_SIZE: Final = FRAME_HEADER.size
_NONCE_SIZE: Final = 12


class _AesFrames:
    """AES-256-GCM with a random nonce; the header and ``names`` are authenticated, and where the frame lies is not.

    So a copy of a frame opens in any pack of the same job, always as the chunk that it is.
    """

    flag = FRAME_SEALED
    growth = FRAME_TAG_SIZE

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def mark(self, checksum: bytes) -> bytes:
        return os.urandom(_NONCE_SIZE) + bytes(_HEADER_SIZE - FRAME_MARK_AT - _NONCE_SIZE)

    def seal(self, frame: memoryview, payload: Buffer, names: bytes) -> None:
        self._cipher.encrypt_into(_nonce(frame), payload, _bound(frame, names), frame[_HEADER_SIZE:])

    def open(self, frame: memoryview, names: bytes) -> Buffer:
        try:
            return self._cipher.decrypt(_nonce(frame), frame[_HEADER_SIZE:], _bound(frame, names))
        except InvalidTag as exc:
            raise SealBroken("cannot be decrypted: it is damaged, or another chunk") from exc


def _nonce(frame: memoryview) -> memoryview:
    return frame[FRAME_MARK_AT : FRAME_MARK_AT + _NONCE_SIZE]


def _bound(frame: memoryview, names: bytes) -> bytes:
    return bytes(frame[:_HEADER_SIZE]) + names


class AesSealing:
    """Of an encrypted store.

    Whole objects are sealed by AES-SIV, which needs no nonce: equal segments stay equal, and nothing has to be
    remembered of what was sealed before.
    """

    def __init__(self, key: StoreKey) -> None:
        self._identity = _subkey(key, "identity", 32)
        self._frames = _subkey(key, "frames", 32)
        self._objects = AESSIV(_subkey(key, "objects", 64))

    def chunk_id(self, raw: Buffer) -> ChunkId:
        """See Sealing; keyed, so that who does not have the key cannot tell by it what a store holds."""
        return ChunkId(blake3(raw, key=self._identity).digest())

    def frame_seal(self, writer_id: WriterId) -> FrameSeal:
        """See Sealing; a key for each writer, so that no key has more random nonces than it can bear."""
        return _AesFrames(blake3(writer_id.encode("ascii"), key=self._frames).digest())

    def seal(self, data: bytes, key: str) -> bytes:
        """See Sealing."""
        header = SEAL_HEADER.pack(SEAL_MAGIC, SEAL_VERSION, 0)
        return header + self._objects.encrypt(data, [header, _place(key)])

    def open(self, data: bytes, key: str) -> bytes:
        """See Sealing."""
        if len(data) < SEAL_GROWTH or not data.startswith(SEAL_MAGIC):
            raise damage(key)(f"{key}: is not encrypted, or cut short, in a store that is encrypted")
        _, version, zero = SEAL_HEADER.unpack_from(data)
        if version != SEAL_VERSION or zero:
            msg = f"{key}: encryption of version {version} is not known to this version; use a newer vmfs-stub"
            raise UnknownFormat(msg)
        try:
            return self._objects.decrypt(memoryview(data)[SEAL_HEADER.size :], [data[: SEAL_HEADER.size], _place(key)])
        except InvalidTag as exc:
            msg = f"{key}: cannot be decrypted: the object is damaged, or is another one under this name"
            raise damage(key)(msg) from exc

    def around(self, objects: ObjectStore) -> ObjectStore:
        """See Sealing."""
        return _SealedObjects(objects, self)


def _subkey(key: StoreKey, use: str, size: int) -> bytes:
    return blake3(key.secret, derive_key_context=_CONTEXT + use).digest(length=size)


def _place(key: str) -> bytes:
    """What an object is bound to: its name, which of a segment is not known before it is sealed."""
    return (SEGMENTS if key.startswith(SEGMENTS) else key).encode("ascii")


class _SealedObjects:
    """Decorates an object store; see ObjectStore for the calls."""

    def __init__(self, inner: ObjectStore, sealing: Sealing) -> None:
        self._inner = inner
        self._sealing = sealing

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object; ``size_max`` is of what it holds."""
        if key.startswith(_NOT_SEALED_BY_NAME):
            return self._inner.get(key, size_max=size_max)
        return self._sealing.open(self._inner.get(key, size_max=size_max + SEAL_GROWTH), key)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read a part of an object that is not sealed whole."""
        assert key.startswith(_NOT_SEALED_BY_NAME), f"{key}: a part of what is sealed whole"
        return self._inner.get_range(key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object."""
        self._inner.put(key, self._sealed(key, data), if_absent=if_absent)

    def put_anew(self, make: Callable[[], tuple[str, Buffer]]) -> str:
        """Pass on, where the inner store makes calls again."""

        def sealed() -> tuple[str, Buffer]:
            key, data = make()
            return key, self._sealed(key, data)

        return put_anew(self._inner, sealed)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder, with their sizes as stored."""
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._inner.delete(key)

    def size(self, key: str) -> int:
        """Size as stored."""
        return self._inner.size(key)

    def drop_cache(self, key: str) -> None:
        """Pass on, where the inner store has a cache to drop."""
        drop_cache(self._inner, key)

    def _sealed(self, key: str, data: Buffer) -> Buffer:
        return data if key.startswith(_NOT_SEALED_BY_NAME) else self._sealing.seal(bytes(data), key)
