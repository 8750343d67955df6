"""Real stores for what is otherwise played over a fake: a directory, memory, and a bucket, perhaps behind troubles.

A place makes a store of its own for each play, with the fake's hooks in front, and lets a test look into it, and
tamper with it, past hooks and troubles.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from obstore.store import MemoryStore

from scripts.lab.s3_proxy import s3_proxy
from scripts.lab.s3_server import Bucket
from scripts.lab.s3_troubles import SeededTroubles
from tests.store_fakes import FakeObjects
from vmfs_stub.core.errors import ObjectMissing
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, exists
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy

PATIENT: Final = RetryPolicy(attempts_max=12, pause_s=0.005, pause_max_s=0.05)
PATIENCE_S: Final = 1.0
LAG_S: Final = 0.5

Place = Callable[[Path, int], AbstractContextManager[FakeObjects]]
"""From the directory and the seed of a play to its store."""


class StoredContents(MutableMapping[str, bytes]):
    """What is in a store, as the dict of a fake."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def __getitem__(self, key: str) -> bytes:
        try:
            return self._objects.get(key)
        except ObjectMissing:
            raise KeyError(key) from None

    def __setitem__(self, key: str, data: bytes) -> None:
        self._objects.put(key, data, if_absent=False)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._objects.delete(key)

    def __contains__(self, key: object) -> bool:
        return exists(self._objects, str(key))

    def __iter__(self) -> Iterator[str]:
        return iter([info.key for info in self._objects.list("")])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RealObjects(FakeObjects):
    """The hooks of the fake before a real store, ``inner``; ``quiet`` is the same store without any troubles."""

    def __init__(self, inner: ObjectStore, quiet: ObjectStore, *, lag_s: float = 0.0) -> None:
        super().__init__()
        self.lag_s = lag_s
        self.contents = StoredContents(quiet)
        self._inner = inner

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        self._called("get", key)
        return self._inner.get(key, size_max=size_max)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        self._called("get_range", key)
        return self._inner.get_range(key, offset=offset, length=length)

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        self._called("put", key)
        self._inner.put(key, data, if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.before("list", prefix)
        return iter([*self._inner.list(prefix)])

    def delete(self, key: str) -> None:
        self._called("delete", key)
        self._inner.delete(key)

    def size(self, key: str) -> int:
        self._called("size", key)
        return self._inner.size(key)


@contextmanager
def in_fake(base: Path, seed: int) -> Iterator[FakeObjects]:
    """Not real at all, and fast."""
    yield FakeObjects()


@contextmanager
def in_directory(base: Path, seed: int) -> Iterator[FakeObjects]:
    """A directory, as ``file://`` has it."""
    with contextlib.closing(LocalObjects(base / "store")) as local:
        yield RealObjects(RetryingObjects(local, PATIENT), local)


@contextmanager
def in_memory(base: Path, seed: int) -> Iterator[FakeObjects]:
    """Memory, as ``memory://`` has it."""
    memory = RemoteObjects(MemoryStore(), name="memory://test")
    yield RealObjects(RetryingObjects(memory, PATIENT), memory)


PLACES: Final[Mapping[str, Place]] = {"fake": in_fake, "file": in_directory, "memory": in_memory}
"""Those that need no server."""


@dataclass(frozen=True)
class InBucket:
    """A folder of a bucket; with ``troubled`` behind a proxy whose troubles the seed decides, and ``met`` counts."""

    bucket: Bucket
    troubled: bool = False
    met: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def __call__(self, base: Path, seed: int) -> Iterator[FakeObjects]:
        """See `Place`."""
        quiet = self.bucket.objects(base.name)
        if not self.troubled:
            yield RealObjects(RetryingObjects(quiet, PATIENT), quiet)
            return
        with s3_proxy(self.bucket.account.endpoint, lag_s=LAG_S) as proxy:
            proxy.plan = SeededTroubles(seed, patience_s=PATIENCE_S)
            objects = self.bucket.through(proxy.endpoint).objects(base.name, timeout_s=PATIENCE_S)
            try:
                yield RealObjects(RetryingObjects(objects, PATIENT), quiet, lag_s=LAG_S)
            finally:
                self.met.update(proxy.happened)
