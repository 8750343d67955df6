"""Whether a store does what all else relies on: tried out, since some take a request and ignore a part of it.

This module must not know what objects mean.
"""

from __future__ import annotations

import secrets

from vmfs_stub.core.errors import ObjectExists, StoreDenied, Unsupported
from vmfs_stub.store.keys import PROBES
from vmfs_stub.store.objects import ObjectStore

_FIRST, _SECOND = b"the first that was put", b"the second that was put"


def probe(objects: ObjectStore) -> bool:
    """Put, read and remove an object of our own; returns whether this host may remove objects.

    Raises: Unsupported when a conditional put replaces what is there, or other bytes are read; StoreError.
    """
    key = f"{PROBES}{secrets.token_hex(8)}"
    objects.put(key, _FIRST)
    try:
        _try_out(objects, key)
    finally:
        may_remove = _removed(objects, key)
    return may_remove


def _removed(objects: ObjectStore, key: str) -> bool:
    try:
        objects.delete(key)
    except StoreDenied:
        return False
    return True


def _try_out(objects: ObjectStore, key: str) -> None:
    try:
        objects.put(key, _SECOND)
    except ObjectExists:
        pass
    else:
        raise Unsupported(
            "the store replaced an object that it was told to leave alone (If-None-Match: *): of two hosts, one would "
            "undo what the other did; use a store that honours conditional puts"
        )
    if objects.get(key) != _FIRST or objects.get_range(key, offset=4, length=5) != _FIRST[4:9]:
        raise Unsupported("the store does not return the bytes that were put; use another one")
