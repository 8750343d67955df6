"""The clients of a store and of its replica, which can be replaced by others of the same places while they are used.

Purpose: credentials change while a daemon runs.  A call that has begun goes on with the client that it began with; the
next one takes the new client.  What goes wrong is counted by kind on the way.  This module must not know who asks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, VmfsStubError
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, drop_cache, put_anew
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.s3 import STANDARD_CHAIN

_ANSWERS = (ObjectMissing, ObjectExists)
"""What a store says in the course of things."""

ErrorsByPlace: TypeAlias = Mapping[tuple[str, str], int]
"""How many calls failed, by where ("store" or "replica") and the name of the error's class."""


class ErrorCounts:
    """How many calls failed, by the name of the error's class; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, error: VmfsStubError) -> None:
        """One more."""
        with self._lock:
            self._counts[type(error).__name__] += 1

    def all(self) -> Mapping[str, int]:
        """All so far."""
        with self._lock:
            return dict(self._counts)


class ReplaceableObjects:
    """Decorates an object store that can be replaced; see ObjectStore for the calls.

    Attributes: ``inner`` is what the next call takes; ``errors`` are those of all calls, whoever answered.
    """

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.errors = ErrorCounts()

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object."""
        with self._counted():
            return self.inner.get(key, size_max=size_max)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes."""
        with self._counted():
            return self.inner.get_range(key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object."""
        with self._counted():
            self.inner.put(key, data, if_absent=if_absent)

    def put_anew(self, make: Callable[[], tuple[str, Buffer]]) -> str:
        """Put what ``make`` gives, with retries where the inner store has them."""
        with self._counted():
            return put_anew(self.inner, make)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder; a listing ends with the client that it began with."""
        with self._counted():
            yield from self.inner.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object."""
        with self._counted():
            self.inner.delete(key)

    def size(self, key: str) -> int:
        """Size in bytes."""
        with self._counted():
            return self.inner.size(key)

    def drop_cache(self, key: str) -> None:
        """Pass on, where the inner store has a cache to drop."""
        drop_cache(self.inner, key)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except _ANSWERS:
            raise
        except VmfsStubError as exc:
            self.errors.add(exc)
            raise


class StoreClients:
    """Those of one store, and of its replica where there is one; opens no connection.  Raises: ConfigError.

    Attributes: ``store`` and ``replica`` stay the same objects for ever.
    """

    def __init__(self, store: StoreAt, replica: StoreAt | None) -> None:
        self._store_at = store
        self._replica_at = replica
        self.store = ReplaceableObjects(open_objects(store))
        self.replica = None if replica is None else ReplaceableObjects(open_objects(replica))

    def errors(self) -> ErrorsByPlace:
        """Those of all calls so far, retries not counted."""
        places = {"store": self.store, "replica": self.replica}
        return {
            (name, error): count
            for name, objects in places.items()
            if objects is not None
            for error, count in objects.errors.all().items()
        }

    def prepare(self, store: StoreAt, replica: StoreAt | None) -> PreparedClients:
        """New clients of the same places, for use once they are taken.  Raises: ConfigError."""
        new_store = open_objects(store) if _has_changed(self._store_at, store) else None
        new_replica = open_objects(replica) if replica is not None and _has_changed(self._replica_at, replica) else None
        return PreparedClients(self, (store, replica), new_store, new_replica)

    def take(self, prepared: PreparedClients) -> None:
        """From now on these are asked; never fails."""
        self._store_at, self._replica_at = prepared.places
        if prepared.store is not None:
            self.store.inner = prepared.store
        if prepared.replica is not None and self.replica is not None:
            self.replica.inner = prepared.replica


def _has_changed(old: StoreAt | None, new: StoreAt) -> bool:
    """Whether a new client may ask otherwise: what the standard chain says is not in the configuration."""
    return old != new or (new.is_far and new.credentials == STANDARD_CHAIN)


class PreparedClients:
    """Clients that nobody uses yet; None where nothing changes."""

    def __init__(
        self,
        clients: StoreClients,
        places: tuple[StoreAt, StoreAt | None],
        store: ObjectStore | None,
        replica: ObjectStore | None,
    ) -> None:
        self._clients = clients
        self.places = places
        self.store = store
        self.replica = replica

    @property
    def is_change(self) -> bool:
        """Whether there is anything to take."""
        return self.store is not None or self.replica is not None

    def take(self) -> None:
        """See StoreClients."""
        self._clients.take(self)
