"""The keys of an encrypted store: finds the one that opens it, adds others, removes them.

Purpose: the store's own key is made once; what changes hands are the files and passphrases that wrap it.  Taking one
away does not make what it could read unreadable to who kept a copy of its document: the store's key stays the same.

This module must not know configurations or command lines.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import (
    DAMAGE,
    CorruptStoreObject,
    IntegrityError,
    KeyMissing,
    NotFound,
    ObjectMissing,
    Refused,
    UnknownFormat,
    WrongKey,
)
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, StoreDescription, decode_description, encode_description
from vmfs_stub.store.key_documents import (
    KeyDocument,
    decode_key_document,
    encode_key_document,
    parse_key_document,
)
from vmfs_stub.store.key_sources import KeyKind, KeySource
from vmfs_stub.store.keys import KEYS, STORE_KEY, is_id, key_key
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.sealing import STORE_KEY_SIZE, StoreKey
from vmfs_stub.store.versions import version_of

KEYS_MAX: Final = 16
"""Copies of a key in one store, and passphrases that are tried: each try may take a second."""
KEYS_READ_MAX: Final = 256
"""Of more copies than there may be, how many are looked at."""
HOW_TO_GIVE_A_KEY: Final = (
    "name its key in [store] key_file or passphrase_file of the configuration, or with --key FILE or --passphrase FILE "
    "(`init`: --key-file FILE or --passphrase-file FILE)"
)


@dataclass(frozen=True, slots=True)
class SeenStore:
    """What has to be known of a store before it can be used: its description, and who can open it.

    ``damaged`` are the key documents that cannot be read; ``unread_count`` more were not looked at.
    """

    description: StoreDescription
    key_documents: tuple[KeyDocument, ...] = ()
    damaged: tuple[IntegrityError | UnknownFormat, ...] = ()
    unread_count: int = 0

    def unlock(self, source: KeySource | None) -> StoreKey | None:
        """The store's key; None of one that is not encrypted.  May take a second.

        Raises: KeyMissing, WrongKey; CorruptStoreObject, UnknownFormat when the right document may be a damaged one.
        """
        return self._opened(source)[1]

    def opened_by(self, source: KeySource | None) -> str | None:
        """The id of the document that ``source`` opens; raises as `unlock`."""
        return self._opened(source)[0]

    def _opened(self, source: KeySource | None) -> tuple[str | None, StoreKey | None]:
        store_id = self.description.store_id
        if not self.description.is_encrypted:
            if source is None:
                return None, None
            raise WrongKey(
                f"store {store_id} is not encrypted, and a key for it is given ({source.origin}): it is another store, "
                "or somebody has replaced its description; do not use it before you know which"
            )
        if source is None:
            raise KeyMissing(f"store {store_id} is encrypted: {HOW_TO_GIVE_A_KEY}")
        from vmfs_stub.store.key_wrapping import unwrap  # memory that plain stores do not need; likewise below

        suited = [document for document in self.key_documents if document.kind is source.kind]
        tried = suited[:KEYS_MAX] if source.kind is KeyKind.PASSPHRASE else suited
        for document in tried:
            key = unwrap(document, self.description, source)
            if key is not None:
                return document.key_id, key
        if self.damaged:
            raise self.damaged[0]
        untried = len(suited) - len(tried) + self.unread_count
        more = f" ({untried} more were not tried: the store has more keys than {KEYS_MAX})" if untried else ""
        raise WrongKey(
            f"{source.origin} opens none of the {len(self.key_documents)} keys of store {store_id}{more}; is it "
            "another store's, was it removed, or is the passphrase mistyped?"
        )

    def encode(self) -> bytes:
        """As it is kept on a host that may have to start without the store: the documents one after the other."""
        return encode_description(self.description) + b"".join(map(encode_key_document, self.key_documents))


def decode_seen(data: bytes) -> SeenStore:
    """Parse what `SeenStore.encode` made.

    Raises: CorruptStoreObject, UnknownFormat.
    """
    lines = data.splitlines(keepends=True)
    pairs = [b"".join(lines[at : at + 2]) for at in range(0, len(lines), 2)] or [b""]
    description = decode_description(pairs[0])
    return SeenStore(description, tuple(parse_key_document(pair, KEYS) for pair in pairs[1 : KEYS_READ_MAX + 1]))


def look_at(objects: ObjectStore) -> SeenStore:
    """Read what is needed to open a store.

    Raises: ObjectMissing when there is none; UnknownFormat, CorruptStoreObject, StoreUnavailable, StoreDenied.
    """
    description = decode_description(objects.get(STORE_KEY, size_max=DOCUMENT_SIZE_MAX))
    version_of(objects, description)
    if not description.is_encrypted:
        return SeenStore(description)
    names = sorted(info.key for info in objects.list(KEYS) if is_id(info.key.removeprefix(KEYS)))
    found, damaged = list[KeyDocument](), list[IntegrityError | UnknownFormat]()
    for name in names[:KEYS_READ_MAX]:
        try:
            found.append(decode_key_document(objects.get(name, size_max=DOCUMENT_SIZE_MAX), name))
        except ObjectMissing:
            continue  # removed since the listing
        except (IntegrityError, UnknownFormat) as exc:
            damaged.append(exc)
    if not found and not damaged:
        raise CorruptStoreObject(f"{KEYS}: is empty: nobody can open store {description.store_id}; bring it back")
    return SeenStore(description, tuple(found), tuple(damaged), max(0, len(names) - KEYS_READ_MAX))


def new_store_key() -> StoreKey:
    """The key of a store that is to be."""
    return StoreKey(secrets.token_bytes(STORE_KEY_SIZE))


def put_key(objects: ObjectStore, description: StoreDescription, key: StoreKey, source: KeySource) -> KeyDocument:
    """Store a copy of the key that ``source`` opens, read back and seen to be opened by it.

    Raises: CorruptStoreObject when it is not, and it is taken away again; StoreUnavailable, StoreDenied, StoreFull.
    """
    from vmfs_stub.store.key_wrapping import unwrap, wrap

    document = wrap(key, description, source, key_id=secrets.token_hex(16), created_s=time.time())
    name = key_key(document.key_id)
    objects.put(name, encode_key_document(document))
    try:
        read = decode_key_document(objects.get(name, size_max=DOCUMENT_SIZE_MAX), name)
        if unwrap(read, description, source) != key:
            raise CorruptStoreObject(f"{name}: does not open with what it was made for")
    except DAMAGE:
        withdraw_key(objects, document)
        raise
    return document


def withdraw_key(objects: ObjectStore, document: KeyDocument) -> None:
    """Take back a copy of a key that came to nothing.  Raises: StoreUnavailable, StoreDenied."""
    objects.delete(key_key(document.key_id))


def add_key(objects: ObjectStore, seen: SeenStore, source: KeySource, new: KeySource) -> KeyDocument:
    """Let ``new`` open the store besides ``source``, which does now.

    Raises: as `SeenStore.unlock` and `put_key`; Refused when the store is plain or has as many as it may.
    """
    key = seen.unlock(source)
    if key is None:
        raise Refused("the store is not encrypted: that is decided when it is made")
    count = len(seen.key_documents) + len(seen.damaged) + seen.unread_count
    if count >= KEYS_MAX:
        raise Refused(f"the store has {count} keys already, and may have {KEYS_MAX}; remove one first")
    return put_key(objects, seen.description, key, new)


def remove_key(objects: ObjectStore, seen: SeenStore, source: KeySource, key_id: str) -> KeyDocument | None:
    """Take a key of the store away; never the one that opens it here, so that one that works is always left.

    Of two who take away each other's at once, the later one finds its own gone, and makes a copy anew, which is
    returned: under another name, since the other's request to delete may come twice.
    Raises: as `SeenStore.unlock` and `put_key`; NotFound, Refused.
    """
    in_use, key = seen._opened(source)
    if in_use is None or key is None or key_id == in_use:
        raise Refused(f"{key_id} is the key that you use now; add another one, and use that to remove this")
    if not is_id(key_id) or key_key(key_id) not in {info.key for info in objects.list(KEYS)}:
        raise NotFound(f"the store has no key {key_id}; `vmfs-stub store keys` lists them")
    objects.delete(key_key(key_id))
    if exists(objects, key_key(in_use)):
        return None
    return put_key(objects, seen.description, key, source)
