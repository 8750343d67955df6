"""Leases: who is writing packs and segments that no manifest names yet, so that garbage collection leaves them alone.

A lease is a checked document under ``leases/``, named after the writer, with a counter that the writer moves on.  It is
dead for whoever sees the counter stand still for long enough on a clock of his own: no clocks are compared.
What is under a dead lease may be deleted, after a mark is put that the writer is dead; it may yet wake up, and finds
that mark when it commits.  So a lease saves work, and no restore point depends on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

from vmfs_stub.core.errors import StoreError
from vmfs_stub.core.ids import WriterId
from vmfs_stub.store import documents
from vmfs_stub.store.format import FEATURES_KNOWN, LEASE_VERSION
from vmfs_stub.store.keys import lease_key
from vmfs_stub.store.objects import ObjectStore

log = logging.getLogger(__name__)

LEASE_FORMAT: Final = "vmfs-stub lease"
LEASE_INTERVAL_S: Final = 20.0
"""How often a writer moves its counter on."""
LEASE_DEAD_S: Final = 3 * LEASE_INTERVAL_S
"""A counter that stands still for so long is that of a dead lease."""


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What a lease says."""

    writer_id: WriterId
    counter: int


def encode_lease(state: LeaseState) -> bytes:
    """The bytes of a lease."""
    body = {"writer_id": state.writer_id, "counter": state.counter}
    return documents.encode(LEASE_FORMAT, LEASE_VERSION, body)


def decode_lease(data: bytes, key: str) -> LeaseState:
    """Parse the lease that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, LEASE_FORMAT, version=LEASE_VERSION, features=FEATURES_KNOWN)
    state = LeaseState(WriterId(fields.text("writer_id")), fields.integer("counter"))
    if lease_key(state.writer_id) != key:
        raise fields.error("writer_id", "is that of another lease")
    return state


class Lease:
    """A writer's own lease.  Not thread-safe: its owner makes one call at a time."""

    def __init__(self, objects: ObjectStore, writer_id: WriterId) -> None:
        """Put it.  Raises: StoreUnavailable, StoreDenied, StoreFull."""
        self._objects = objects
        self._state = LeaseState(writer_id, 0)
        objects.put(lease_key(writer_id), encode_lease(self._state))

    def renew(self) -> None:
        """Move the counter on; one that cannot be moved on now is by the next call."""
        state = replace(self._state, counter=self._state.counter + 1)
        try:
            self._objects.put(lease_key(state.writer_id), encode_lease(state), if_absent=False)
        except StoreError as exc:
            log.warning("the lease of a job under way could not be renewed: %s", exc)
        else:
            self._state = state

    def end(self) -> None:
        """Remove it; one that stays is dead."""
        try:
            self._objects.delete(lease_key(self._state.writer_id))
        except StoreError as exc:
            log.info("the lease of a job that has ended stays until garbage collection: %s", exc)
