"""An object store that is opened when it is first needed, and again when it has gone.

A host whose store is away must still start: what is resident runs, and recalls work as soon as the store is back.  A
network filesystem that went and was mounted anew leaves descriptors that are dead for ever; they are then let go.
Thread-safe.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, drop_cache

T = TypeVar("T")

_GONE: Final = frozenset({errno.ENOTCONN, errno.ESTALE})
"""What calls give whose filesystem is no longer there."""


class LateObjects:
    """See ObjectStore for the calls; each raises what ``opener`` raises until that succeeds once."""

    def __init__(self, opener: Callable[[], ObjectStore]) -> None:
        self._opener = opener
        self._opened: ObjectStore | None = None
        self._lock = threading.Lock()

    def _with(self, call: Callable[[ObjectStore], T]) -> T:
        with self._lock:
            opened = self._opened = self._opened or self._opener()
        try:
            return call(opened)
        except StoreUnavailable as exc:
            if isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _GONE:
                with self._lock:
                    if self._opened is opened:
                        self._opened = None
            raise

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object."""
        return self._with(lambda inner: inner.get(key, size_max=size_max))

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes."""
        return self._with(lambda inner: inner.get_range(key, offset=offset, length=length))

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object, durably."""
        self._with(lambda inner: inner.put(key, data, if_absent=if_absent))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below a prefix."""
        return self._with(lambda inner: inner.list(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        self._with(lambda inner: inner.delete(key))

    def size(self, key: str) -> int:
        """Size in bytes."""
        return self._with(lambda inner: inner.size(key))

    def drop_cache(self, key: str) -> None:
        """Make the next read come from the medium, where the store can."""
        self._with(lambda inner: drop_cache(inner, key))
