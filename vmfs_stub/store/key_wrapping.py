"""Wraps a store's key, and opens what was wrapped: AES-256-GCM under a key made from a key file or a passphrase.

A key file's bytes become that key by BLAKE3, a passphrase by scrypt, whose parameters lie in the document.  The
wrapping is bound to the document's id and to what the store's description says, so that none of them can be exchanged.
This module must not know how documents are written or transported.
"""

from __future__ import annotations

import os
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vmfs_stub.store.format import StoreDescription
from vmfs_stub.store.key_documents import KEY_FORMAT, NONCE_SIZE, SALT_SIZE, KeyDocument, Scrypting
from vmfs_stub.store.key_sources import KeyKind, KeySource
from vmfs_stub.store.sealing import StoreKey

_KEY_FILE_CONTEXT: Final = "vmfs-stub 2026 key file: wrapping"


def wrap(
    key: StoreKey, description: StoreDescription, source: KeySource, *, key_id: str, created_s: float
) -> KeyDocument:
    """A copy of ``key`` that ``source`` opens."""
    scrypting = Scrypting(os.urandom(SALT_SIZE)) if source.kind is KeyKind.PASSPHRASE else None
    nonce = os.urandom(NONCE_SIZE)
    wrapped = AESGCM(_wrapping_key(source, scrypting)).encrypt(nonce, key.secret, _bound(description, key_id))
    return KeyDocument(key_id, description.store_id, source.kind, created_s, nonce, wrapped, scrypting)


def unwrap(document: KeyDocument, description: StoreDescription, source: KeySource) -> StoreKey | None:
    """The store's key; None when ``source`` does not open this document."""
    if (document.kind, document.store_id) != (source.kind, description.store_id):
        return None
    cipher = AESGCM(_wrapping_key(source, document.scrypting))
    try:
        return StoreKey(cipher.decrypt(document.nonce, document.wrapped, _bound(description, document.key_id)))
    except InvalidTag:
        return None


def _wrapping_key(source: KeySource, scrypting: Scrypting | None) -> bytes:
    if scrypting is None:
        return blake3(source.secret, derive_key_context=_KEY_FILE_CONTEXT).digest()
    return Scrypt(salt=scrypting.salt, length=32, n=scrypting.n, r=scrypting.r, p=scrypting.p).derive(source.secret)


def _bound(description: StoreDescription, key_id: str) -> bytes:
    return f"{KEY_FORMAT} {description.store_id} {description.chunk_size} {key_id}".encode("ascii")
