"""Forgotten marks: "this restore point is not wanted any more", so that garbage collection may remove it.

A mark is a checked document under ``forgotten/<vm id>/<point id>``.  It is what lets a host forget that may not delete.
It counts by its name alone, and is never taken back: a collector that has read it may be at work already.  ``nonce``
tells a retried put from somebody else's.  This module must not know which points are not wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.errors import ObjectExists
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.store import documents
from vmfs_stub.store.format import FEATURES_KNOWN, FORGOTTEN_VERSION
from vmfs_stub.store.keys import forgotten_key
from vmfs_stub.store.objects import ObjectStore

FORGOTTEN_FORMAT = "vmfs-stub forgotten"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Who forgot a restore point, when (``forgotten_s`` is Unix time), and why: "by hand", or the rules in words."""

    host: str
    forgotten_s: float
    why: str
    nonce: str = ""


def encode_forgotten(mark: Forgotten, vm_id: VmId, point_id: PointId) -> bytes:
    """The bytes of a mark."""
    return documents.encode(
        FORGOTTEN_FORMAT,
        FORGOTTEN_VERSION,
        {
            "vm_id": vm_id,
            "point_id": point_id,
            "host": mark.host,
            "forgotten_s": mark.forgotten_s,
            "why": mark.why,
            "nonce": mark.nonce,
        },
    )


def put_forgotten(objects: ObjectStore, mark: Forgotten, vm_id: VmId, point_id: PointId) -> bool:
    """Put a mark; False where there is one, which stays.  Raises: StoreUnavailable, StoreDenied, StoreFull."""
    try:
        objects.put(forgotten_key(vm_id, point_id), encode_forgotten(mark, vm_id, point_id))
    except ObjectExists:
        return False
    return True


def decode_forgotten(data: bytes, key: str) -> Forgotten:
    """Parse the mark that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, FORGOTTEN_FORMAT, version=FORGOTTEN_VERSION, features=FEATURES_KNOWN)
    named = f"forgotten/{fields.hex_id('vm_id')}/{fields.hex_id('point_id')}"
    if named != key:
        raise fields.error("point_id", f"belongs to {named}, not here")
    return Forgotten(
        host=fields.text("host"),
        forgotten_s=fields.number("forgotten_s"),
        why=fields.text("why"),
        nonce=fields.text("nonce"),
    )
