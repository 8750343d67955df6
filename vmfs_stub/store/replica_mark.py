"""The mark of a replica, by which a store takes no backups and no garbage is collected in it.

A replica has no leases and no pins: what is being copied to it would look like garbage there, and what placeholders
need like what nobody does.  Who makes it the store takes the mark away.
"""

from __future__ import annotations

from vmfs_stub.core.errors import Refused
from vmfs_stub.store.keys import REPLICA_KEY
from vmfs_stub.store.objects import ObjectStore, exists, put_mark


def mark_replica(objects: ObjectStore) -> None:
    """From now on this is a replica.  Raises: StoreUnavailable, StoreDenied, StoreFull."""
    put_mark(objects, REPLICA_KEY)


def refuse_replica(objects: ObjectStore) -> None:
    """See that these are not the objects of a replica.  Raises: Refused; StoreUnavailable, StoreDenied."""
    if exists(objects, REPLICA_KEY):
        raise Refused("this is the replica of a store: use the store; the README says how a replica is made the store")
