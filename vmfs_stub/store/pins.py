"""Pins: "a placeholder depends on this restore point", so it is never pruned.

A pin is a checked document under ``pins/<vm id>/<point id>/<placeholder id>``.  Its name is never used again: a
placeholder id is fresh for each archive.  ``nonce`` tells a retried put from somebody else's.
A host that may not delete makes a pin *void* by a mark under ``unpinned/``; garbage collection deletes both.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from vmfs_stub.core.errors import StoreDenied
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.store import documents
from vmfs_stub.store.format import FEATURES_KNOWN, PIN_VERSION
from vmfs_stub.store.keys import PINS, UNPINNED, pin_key, unpinned_key
from vmfs_stub.store.objects import ObjectInfo, ObjectStore, put_mark

PIN_FORMAT = "vmfs-stub pin"


@dataclass(frozen=True, slots=True)
class Pin:
    """One placeholder's dependence; ``created_s`` is Unix time, ``datastore`` and ``host`` say where it lies."""

    placeholder_id: PlaceholderId
    host: str
    datastore: str
    created_s: float
    nonce: str = ""


def new_pin(placeholder_id: PlaceholderId, *, host: str, datastore: str) -> Pin:
    """A pin that is made now."""
    return Pin(placeholder_id, host, datastore, time.time(), secrets.token_hex(8))


def remove_pin(objects: ObjectStore, vm_id: VmId, point_id: PointId, placeholder_id: PlaceholderId) -> None:
    """Take a pin away, or make it void; a missing one is fine.  Raises: StoreUnavailable, StoreDenied, StoreFull."""
    try:
        objects.delete(pin_key(vm_id, point_id, placeholder_id))
    except StoreDenied:
        put_mark(objects, unpinned_key(vm_id, point_id, placeholder_id))


def valid_pins(objects: ObjectStore, folder: str) -> list[ObjectInfo]:
    """The pins in a folder of pins that are not void.  Raises: StoreUnavailable, StoreDenied."""
    void = {PINS + mark.key.removeprefix(UNPINNED) for mark in objects.list(UNPINNED + folder.removeprefix(PINS))}
    return [info for info in objects.list(folder) if info.key not in void]


def encode_pin(pin: Pin, vm_id: VmId, point_id: PointId) -> bytes:
    """The bytes of a pin."""
    return documents.encode(
        PIN_FORMAT,
        PIN_VERSION,
        {
            "vm_id": vm_id,
            "point_id": point_id,
            "placeholder_id": pin.placeholder_id,
            "host": pin.host,
            "datastore": pin.datastore,
            "created_s": pin.created_s,
            "nonce": pin.nonce,
        },
    )


def decode_pin(data: bytes, key: str) -> Pin:
    """Parse the pin that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, PIN_FORMAT, version=PIN_VERSION, features=FEATURES_KNOWN)
    pin = Pin(
        placeholder_id=PlaceholderId(fields.hex_id("placeholder_id")),
        host=fields.text("host"),
        datastore=fields.text("datastore"),
        created_s=fields.number("created_s"),
        nonce=fields.text("nonce"),
    )
    named = f"pins/{fields.hex_id('vm_id')}/{fields.hex_id('point_id')}/{pin.placeholder_id}"
    if named != key:
        raise fields.error("placeholder_id", f"belongs to {named}, not here")
    return pin
