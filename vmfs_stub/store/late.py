"""An object store that is opened when it is first needed, and again while that fails.

A host whose store is away must still start: what is resident runs, and recalls work as soon as the store is back.
Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, CacheDropping, ObjectInfo, ObjectStore


class LateObjects:
    """See ObjectStore for the calls; each raises what ``opener`` raises until that succeeds once."""

    def __init__(self, opener: Callable[[], ObjectStore]) -> None:
        self._opener = opener
        self._opened: ObjectStore | None = None
        self._lock = threading.Lock()

    def _inner(self) -> ObjectStore:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._opener()
        return self._opened

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object."""
        return self._inner().get(key, size_max=size_max)

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes."""
        return self._inner().get_range(key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object, durably."""
        self._inner().put(key, data, if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below a prefix."""
        return self._inner().list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        self._inner().delete(key)

    def size(self, key: str) -> int:
        """Size in bytes."""
        return self._inner().size(key)

    def drop_cache(self, key: str) -> None:
        """Make the next read come from the medium, where the store can."""
        inner = self._inner()
        if isinstance(inner, CacheDropping):
            inner.drop_cache(key)
