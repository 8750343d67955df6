"""A small object store in a dict, with failures and latency on demand; held to the same contract as the real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreDenied
from vmfs_stub.core.ids import PackId
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.store import keys
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.keys import CONDEMNED, PACKS, check_key, check_prefix
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, oversized, truncated


class FakeObjects:
    """``before`` is called with (call, key) ahead of every call and may raise; ``contents`` may be tampered with.

    Listings may lack the changes of the last ``lag_s``.
    """

    lag_s = 0.0

    def __init__(self, before: Callable[[str, str], None] = lambda call, key: None) -> None:
        self.contents: MutableMapping[str, bytes] = {}
        self.before = before
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        data = self._found("get", key)
        if len(data) > size_max:
            raise oversized(key, size=len(data), size_max=size_max)
        return data

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        data = self._found("get_range", key)
        if offset < 0 or length < 0 or offset + length > len(data):
            raise truncated(key, offset=offset, length=length)
        return data[offset : offset + length]

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        self._called("put", key)
        with self._lock:
            if if_absent and key in self.contents:
                raise ObjectExists(key)
            self.contents[key] = bytes(data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        self.before("list", prefix)
        with self._lock:
            found = [ObjectInfo(key, len(data)) for key, data in self.contents.items() if key.startswith(prefix)]
        return iter(found)

    def delete(self, key: str) -> None:
        self._called("delete", key)
        with self._lock:
            self.contents.pop(key, None)

    def size(self, key: str) -> int:
        return len(self._found("size", key))

    def _called(self, call: str, key: str) -> None:
        check_key(key)
        self.calls.append((call, key))
        self.before(call, key)

    def _found(self, call: str, key: str) -> bytes:
        self._called(call, key)
        with self._lock:
            if key not in self.contents:
                raise ObjectMissing(key)
            return self.contents[key]


KINDS = {
    keys.STORE_KEY: "description",
    keys.REPLICA_KEY: "replica_mark",
    keys.PACKS: "pack",
    keys.SEGMENTS: "segment",
    keys.MANIFESTS: "manifest",
    keys.INDEX: "index",
    keys.PINS: "pin",
    keys.FORGOTTEN: "forgotten",
    keys.CLAIMS: "claim",
    keys.CONDEMNED: "condemned",
    keys.LEASES: "lease",
    keys.DEAD: "dead",
    keys.UNPINNED: "unpinned",
    keys.QUARANTINED: "quarantine",
    keys.MOVED: "moved",
    keys.PROBES: "probe",
    keys.KEYS: "key",
    keys.VERSIONS: "version",
}


def store_site(call: str, key: str, place: str = "store") -> str:
    """The site tag of a call on a store: what kind of object is meant, and what is done with it."""
    kind = next(kind for start, kind in KINDS.items() if key.startswith(start))
    return f"{place}.{'pending' if key.endswith(keys.PENDING_SUFFIX) else kind}.{call}"


class SitedObjects:
    """Makes every call on an object store under a site tag, so that a test makes exactly that one fail.

    ``place`` is what the tags begin with: store, or replica.
    """

    def __init__(self, inner: ObjectStore, files: FileCalls, place: str = "store") -> None:
        self._inner = inner
        self._files = files
        self._place = place

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        return self._files.call(store_site("get", key, self._place), self._inner.get, key, size_max=size_max)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        return self._files.call(
            store_site("get_range", key, self._place), self._inner.get_range, key, offset=offset, length=length
        )

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        self._files.call(store_site("put", key, self._place), self._inner.put, key, data, if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._files.call(store_site("list", prefix, self._place), self._inner.list, prefix)

    def delete(self, key: str) -> None:
        self._files.call(store_site("delete", key, self._place), self._inner.delete, key)

    def size(self, key: str) -> int:
        return self._files.call(store_site("size", key, self._place), self._inner.size, key)


@contextmanager
def packs_condemned(contents: MutableMapping[str, bytes]) -> Iterator[None]:
    """Within the block garbage collection is about to remove every pack that is there; then it is not."""
    packs = frozenset(PackId(key.rpartition("/")[2]) for key in contents if key.startswith(PACKS))
    contents[f"{CONDEMNED}{'c' * 32}"] = encode_condemned(Condemned(packs=packs), "nonce")
    try:
        yield
    finally:
        del contents[f"{CONDEMNED}{'c' * 32}"]


@contextmanager
def refused_deletes(objects: FakeObjects) -> Iterator[None]:
    """Within the block this host may not delete."""
    before = objects.before

    def refuse(call: str, key: str) -> None:
        before(call, key)
        if call == "delete":
            raise StoreDenied(f"{key}: delete is not allowed")

    objects.before = refuse
    try:
        yield
    finally:
        objects.before = before
