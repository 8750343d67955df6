"""Quarantine marks: packs that are damaged, so that no backup refers to them any more where it can store afresh.

A mark is a checked document under ``quarantined/<pack id>``.  It counts by its name alone, for the whole pack: what is
whole in it is stored once more when it is met, which is cheap, and needs no trust in the rest.  It is never taken back;
garbage collection deletes it after the pack.  This module must not know how damage is found.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import CorruptStoreObject, ObjectExists, ObjectMissing
from vmfs_stub.core.ids import PackId
from vmfs_stub.store import documents
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, FEATURES_KNOWN, PACK_SIZE_MAX, QUARANTINE_VERSION
from vmfs_stub.store.keys import QUARANTINED, is_id, quarantine_key
from vmfs_stub.store.objects import ObjectStore

QUARANTINE_FORMAT: Final = "vmfs-stub quarantine"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What was found first: when (``found_s`` is Unix time), and the offsets in bytes of damaged frames.

    No offsets: which frames are damaged is not known, or the pack is missing.  ``nonce`` tells a retried put from
    somebody else's.
    """

    found_s: float
    offsets: tuple[int, ...]
    problem: str
    nonce: str = ""


def encode_quarantine(mark: Quarantine, pack_id: PackId) -> bytes:
    """The bytes of a mark."""
    body = {
        "pack_id": pack_id,
        "found_s": mark.found_s,
        "offsets": list(mark.offsets),
        "problem": mark.problem,
        "nonce": mark.nonce,
    }
    return documents.encode(QUARANTINE_FORMAT, QUARANTINE_VERSION, body)


def decode_quarantine(data: bytes, key: str) -> Quarantine:
    """Parse the mark that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, QUARANTINE_FORMAT, version=QUARANTINE_VERSION, features=FEATURES_KNOWN)
    if quarantine_key(PackId(fields.hex_id("pack_id"))) != key:
        raise fields.error("pack_id", "is that of another mark")
    return Quarantine(
        fields.number("found_s"),
        tuple(fields.integers("offsets", high=PACK_SIZE_MAX)),
        fields.text("problem"),
        fields.text("nonce"),
    )


def put_quarantine(objects: ObjectStore, mark: Quarantine, pack_id: PackId) -> None:
    """Put a mark; the first one stays.  Raises: StoreUnavailable, StoreDenied, StoreFull."""
    with suppress(ObjectExists):
        objects.put(quarantine_key(pack_id), encode_quarantine(mark, pack_id))


def read_quarantine(objects: ObjectStore, pack_id: PackId) -> Quarantine | None:
    """The mark of a pack; None when there is none that can be read.  Raises: UnknownFormat, StoreUnavailable."""
    key = quarantine_key(pack_id)
    try:
        return decode_quarantine(objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
    except (ObjectMissing, CorruptStoreObject):
        return None


def quarantined_packs(objects: ObjectStore) -> frozenset[PackId]:
    """All packs that have a mark, from the names alone.  Raises: StoreUnavailable, StoreDenied."""
    names = (info.key.removeprefix(QUARANTINED) for info in objects.list(QUARANTINED))
    return frozenset(PackId(name) for name in names if is_id(name))
