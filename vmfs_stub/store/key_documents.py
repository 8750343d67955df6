"""Wrapped copies of a store's key: documents under ``keys/``, each of which one key file or passphrase opens.

What is wrapped in them, and how: `key_wrapping.py`.  Layout: docs/FORMAT.md.

Invariant: whatever a document says, opening it takes at most `SCRYPT_MEMORY_MAX` bytes and a second or so.
This module must not know how documents are transported.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import CorruptStoreObject
from vmfs_stub.core.ids import StoreId
from vmfs_stub.store import documents
from vmfs_stub.store.format import FEATURES_KNOWN
from vmfs_stub.store.key_sources import KeyKind
from vmfs_stub.store.keys import key_key
from vmfs_stub.store.sealing import STORE_KEY_SIZE

KEY_FORMAT: Final = "vmfs-stub store key"
KEY_VERSION: Final = 1
SCRYPT_MEMORY_MAX: Final = 256 << 20
"""Bytes; scrypt takes 128 * n * r of them."""
_N_MIN, _N_MAX, _R_MAX, _P_MAX = 1 << 14, 1 << 18, 8, 2
SALT_SIZE: Final = 16
NONCE_SIZE: Final = 12
_WRAPPED_SIZE: Final = STORE_KEY_SIZE + 16


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
        nonce=fields.binary("nonce", size=NONCE_SIZE),
        wrapped=fields.binary("wrapped", size=_WRAPPED_SIZE),
        scrypting=_scrypting(fields) if kind is KeyKind.PASSPHRASE else None,
    )


def _scrypting(fields: documents.Fields) -> Scrypting:
    n = fields.integer("scrypt_n", low=_N_MIN, high=_N_MAX)
    if n & (n - 1):
        raise fields.error("scrypt_n", "is not a power of two")
    return Scrypting(
        salt=fields.binary("scrypt_salt", size=SALT_SIZE),
        n=n,
        r=fields.integer("scrypt_r", low=1, high=_R_MAX),
        p=fields.integer("scrypt_p", low=1, high=_P_MAX),
    )


assert 128 * _N_MAX * _R_MAX <= SCRYPT_MEMORY_MAX


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
