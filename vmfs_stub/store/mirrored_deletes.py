"""What garbage collection deletes in a store is deleted in its replica after that.

Only names that were just deleted in the store are deleted in the replica, so that a store that was emptied or replaced
empties no replica.  Nor does a store that has lost manifests: before anything else than manifests goes, each one of the
replica is seen to be in the store, too, or to be of a forgotten point.

A replica that does not answer, or has such a manifest, is left alone for the rest of the run: then restore points of
which the manifest is there keep what they need there.  The mark of a forgotten point stays in the store until its
manifest has gone from both, so the next run goes on with it; packs and segments that are left take room, and nothing
else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from vmfs_stub.core.errors import StoreConflict, StoreError
from vmfs_stub.store.keys import FORGOTTEN, MANIFESTS, PENDING_SUFFIX, forgotten_key, is_manifest, point_of
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, exists
from vmfs_stub.store.replica import REPLICATED

log = logging.getLogger(__name__)


class MirroredDeletes:
    """Decorates the objects of a store, for a collector; see ObjectStore for the calls.

    What puts documents of moved frames (`put_anew`) or reads past caches is given the store's own objects instead.
    Attributes: ``left`` is how many objects were not deleted in the replica, ``problem`` why.
    """

    def __init__(self, inner: ObjectStore, replica: ObjectStore) -> None:
        self._inner = inner
        self._replica = replica
        self._lock = threading.Lock()
        self._is_compared = False
        self.left = 0
        self.problem: StoreError | None = None

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object."""
        return self._inner.get(key, size_max=size_max)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read a part of one."""
        return self._inner.get_range(key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object, here alone."""
        self._inner.put(key, data, if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder, as they are here."""
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object, and its copy."""
        if key.startswith(FORGOTTEN) and self.problem is not None:
            return
        self._inner.delete(key)
        if key.startswith(REPLICATED) and not key.endswith(PENDING_SUFFIX):
            self._delete_copy(key)

    def size(self, key: str) -> int:
        """Size here."""
        return self._inner.size(key)

    def _delete_copy(self, key: str) -> None:
        with self._lock:
            if self.problem is None and not (self._is_compared or key.startswith(MANIFESTS)):
                self.problem, self._is_compared = self._lost(), True
        problem = self.problem
        if problem is None:
            try:
                self._replica.delete(key)
            except StoreError as exc:
                problem = exc
        if problem is not None:
            with self._lock:
                self.left += 1
                self.problem = problem

    def _lost(self) -> StoreError | None:
        """What is wrong when the replica has restore points that the store has not, though nobody forgot them."""
        try:
            # In this order: a point is in the store before it is in the replica.
            copied = {info.key for info in self._replica.list(MANIFESTS) if is_manifest(info.key)}
            for info in self._inner.list(MANIFESTS):
                copied.discard(info.key)
            lost = sorted(filter(self._is_lost, copied))
        except StoreError as exc:
            return exc
        if not lost:
            return None
        vm_id, point_id = point_of(lost[0])
        more = f" and {len(lost) - 1} others" if lost[1:] else ""
        return StoreConflict(
            f"restore point {point_id} of VM {vm_id}{more} can be read there, and nowhere else. If the store has lost "
            "it, write it out with `vmfs-stub restore --store` and the replica's URL; if a host that does not know of "
            f"the replica has forgotten it and collected garbage, delete {lost[0]} there"
        )

    def _is_lost(self, key: str) -> bool:
        return not exists(self._inner, key) and not exists(self._inner, forgotten_key(*point_of(key)))
