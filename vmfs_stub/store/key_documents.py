"""Wrapped copies of a store's key: documents under ``keys/``, each of which one key file or passphrase opens.

The wrapping is AES-256-GCM under a key that is made from the key file's bytes (BLAKE3) or from the passphrase
(scrypt, whose parameters lie in the document).  It is bound to the document's id and to what the store's description
says, so that none of them can be exchanged.  Layout: docs/FORMAT.md.

Invariant: whatever a document says, opening it takes at most `SCRYPT_MEMORY_MAX` bytes and a second or so.
This module must not know how documents are transported.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vmfs_stub.core.errors import CorruptStoreObject
from vmfs_stub.core.ids import StoreId
from vmfs_stub.store import documents
from vmfs_stub.store.format import FEATURES_KNOWN, StoreDescription
from vmfs_stub.store.key_sources import KeyKind, KeySource
from vmfs_stub.store.keys import key_key
from vmfs_stub.store.sealing import STORE_KEY_SIZE, StoreKey

KEY_FORMAT: Final = "vmfs-stub store key"
KEY_VERSION: Final = 1
SCRYPT_MEMORY_MAX: Final = 256 << 20
"""Bytes; scrypt takes 128 * n * r of them."""
_N_MIN, _N_MAX, _R_MAX, _P_MAX = 1 << 14, 1 << 18, 8, 2
_SALT_SIZE: Final = 16
_NONCE_SIZE: Final = 12
_WRAPPED_SIZE: Final = STORE_KEY_SIZE + 16
_KEY_FILE_CONTEXT: Final = "vmfs-stub 2026 key file: wrapping"


@dataclass(frozen=True, slots=True)
class Scrypting:
    """How a passphrase becomes a key: scrypt's parameters."""

    salt: bytes
    n: int = 1 << 17
    r: int = 8
    p: int = 1


@dataclass(frozen=True, slots=True)
class KeyDocument:
    """One wrapped copy of a store's key; ``created_s`` is Unix time, ``scrypting`` only of a passphrase's."""

    key_id: str
    store_id: StoreId
    kind: KeyKind
    created_s: float
    nonce: bytes
    wrapped: bytes
    scrypting: Scrypting | None = None


def wrap(
    key: StoreKey, description: StoreDescription, source: KeySource, *, key_id: str, created_s: float
) -> KeyDocument:
    """A copy of ``key`` that ``source`` opens."""
    scrypting = Scrypting(os.urandom(_SALT_SIZE)) if source.kind is KeyKind.PASSPHRASE else None
    nonce = os.urandom(_NONCE_SIZE)
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


def encode_key_document(document: KeyDocument) -> bytes:
    """The bytes of a key document."""
    scrypting = document.scrypting
    return documents.encode(
        KEY_FORMAT,
        KEY_VERSION,
        {
            "key_id": document.key_id,
            "store_id": document.store_id,
            "kind": document.kind.value,
            "created_s": document.created_s,
            "nonce": _base64(document.nonce),
            "wrapped": _base64(document.wrapped),
            **(
                {}
                if scrypting is None
                else {
                    "scrypt_salt": _base64(scrypting.salt),
                    "scrypt_n": scrypting.n,
                    "scrypt_r": scrypting.r,
                    "scrypt_p": scrypting.p,
                }
            ),
        },
    )


def decode_key_document(data: bytes, key: str) -> KeyDocument:
    """Parse the key document that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    document = parse_key_document(data, key)
    if key_key(document.key_id) != key:
        raise CorruptStoreObject(f"{key}: is {key_key(document.key_id)} under another name")
    return document


def parse_key_document(data: bytes, key: str) -> KeyDocument:
    """Parse a key document wherever it lies; ``key`` is for messages.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, KEY_FORMAT, version=KEY_VERSION, features=FEATURES_KNOWN)
    try:
        kind = KeyKind(fields.text("kind"))
    except ValueError as exc:
        raise fields.error("kind", "is neither a key file nor a passphrase") from exc
    return KeyDocument(
        key_id=fields.hex_id("key_id"),
        store_id=StoreId(fields.hex_id("store_id")),
        kind=kind,
        created_s=fields.number("created_s"),
        nonce=fields.binary("nonce", size=_NONCE_SIZE),
        wrapped=fields.binary("wrapped", size=_WRAPPED_SIZE),
        scrypting=_scrypting(fields) if kind is KeyKind.PASSPHRASE else None,
    )


def _scrypting(fields: documents.Fields) -> Scrypting:
    n = fields.integer("scrypt_n", low=_N_MIN, high=_N_MAX)
    if n & (n - 1):
        raise fields.error("scrypt_n", "is not a power of two")
    return Scrypting(
        salt=fields.binary("scrypt_salt", size=_SALT_SIZE),
        n=n,
        r=fields.integer("scrypt_r", low=1, high=_R_MAX),
        p=fields.integer("scrypt_p", low=1, high=_P_MAX),
    )


assert 128 * _N_MAX * _R_MAX <= SCRYPT_MEMORY_MAX


def _wrapping_key(source: KeySource, scrypting: Scrypting | None) -> bytes:
    if scrypting is None:
        return blake3(source.secret, derive_key_context=_KEY_FILE_CONTEXT).digest()
    return Scrypt(salt=scrypting.salt, length=32, n=scrypting.n, r=scrypting.r, p=scrypting.p).derive(source.secret)


def _bound(description: StoreDescription, key_id: str) -> bytes:
    return f"{KEY_FORMAT} {description.store_id} {description.chunk_size} {key_id}".encode("ascii")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
