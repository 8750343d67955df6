"""The version that a store is at, which says what may be written to it.

Purpose: programs of several versions share a store.  ``vmfs-store.json`` says the version that the store was made with,
and is never written again; ``versions/<n>`` is an empty mark that it was raised to n.  Marks are put in order, each if
absent, and are never taken back: so nobody lowers a version, whoever raises it at the same time, and who knows versions
up to n needs to look for one name, n + 1, to know that he knows the store's.

A program writes what the store's version has, and reads that of all versions that it knows.
"""

from __future__ import annotations

from typing import Final

from vmfs_stub.core.errors import UnknownFormat
from vmfs_stub.store import format as store_format
from vmfs_stub.store.format import StoreDescription
from vmfs_stub.store.keys import version_key
from vmfs_stub.store.objects import ObjectStore, exists, put_mark

NEWER: Final = "use a newer vmfs-stub on this host"


def is_known(objects: ObjectStore) -> bool:
    """Whether this program knows the version that the store is at.  Raises: StoreUnavailable, StoreDenied."""
    return not exists(objects, version_key(store_format.STORE_VERSION + 1))


def version_of(objects: ObjectStore, description: StoreDescription) -> int:
    """The version that the store is at.

    Raises: UnknownFormat when this program does not know it; StoreUnavailable, StoreDenied.
    """
    if not is_known(objects):
        raise UnknownFormat(
            f"store {description.store_id} was raised by `store upgrade` to a later version than "
            f"{store_format.STORE_VERSION}, the newest that this program knows; {NEWER}"
        )
    version = description.version
    while version < store_format.STORE_VERSION and exists(objects, version_key(version + 1)):
        version += 1
    return version


def raise_version(objects: ObjectStore, description: StoreDescription, to: int) -> int:
    """Raise the store to a version that this program knows; the one that it is at then.

    Programs that do not know it refuse the store from then on, and do not commit what they have begun.
    Raises: as `version_of`; StoreFull.
    """
    for version in range(version_of(objects, description) + 1, to + 1):
        put_mark(objects, version_key(version))  # which somebody else may do at the same time
    return version_of(objects, description)
