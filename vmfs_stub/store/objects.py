"""The object store that everything else in ``store`` is built on: six blocking calls.

Purpose: one interface for a local directory, memory and S3-compatible stores.  Implementations are thread-safe and
translate every foreign exception.  tests/contract runs one suite over all of them.

Contract: an object that ``put`` has acknowledged is durable and readable at once; objects are never changed in place,
only replaced whole or deleted.  This module must not know what the objects mean (only whose damage is which error).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol, TypeAlias, TypeVar, runtime_checkable

from vmfs_stub.core.errors import IntegrityError, ObjectExists, ObjectMissing
from vmfs_stub.store.keys import damage

T = TypeVar("T")
R = TypeVar("R")
Name = TypeVar("Name", bound=str)
Buffer: TypeAlias = bytes | bytearray | memoryview

OBJECT_SIZE_MAX: Final = 256 * 1024 * 1024
"""Default bound of a whole-object read, so that a damaged store cannot exhaust memory."""
ASKED_AT_ONCE: Final = 16
"""Requests at a time of one job that has many to make."""
NEAR_S: Final = 0.001
"""An answer that takes less is not waited for in threads."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object; ``size`` in bytes."""

    key: str
    size: int


class ObjectStore(Protocol):
    """Named, immutable byte strings; blocking and thread-safe.

    All calls may raise StoreUnavailable or StoreDenied, and ConfigError for an invalid key.
    """

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object.

        Raises: ObjectMissing; the integrity error of the key when it is larger than ``size_max`` bytes.
        """
        ...

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes.

        Raises: ObjectMissing; the integrity error of the key when the object ends before that.
        """
        ...

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object, durably when this returns.

        With ``if_absent`` an object of that name is left alone and ObjectExists raised; otherwise it is replaced,
        and readers see the old or the new one whole.  Raises: StoreFull.
        """
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder (empty, or a name that ends with ``/``), at any depth, in no order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        ...

    def size(self, key: str) -> int:
        """Size in bytes.

        Raises: ObjectMissing.
        """
        ...


@runtime_checkable
class CacheDropping(Protocol):
    """A store whose reads may be answered from a cache that proves nothing about the medium."""

    def drop_cache(self, key: str) -> None:
        """Make the next read of ``key`` come from the medium, as far as the system allows; never fails."""
        ...


@runtime_checkable
class Retrying(Protocol):
    """A store that makes calls again which failed, and puts nothing twice by `put_anew`."""

    def put_anew(self, make: Callable[[], tuple[str, Buffer]]) -> str:
        """See the function."""
        ...


def put_anew(objects: ObjectStore, make: Callable[[], tuple[str, Buffer]]) -> str:
    """Put an object under a name of which there is one put alone: each try has what ``make`` gives then, a fresh one.

    So no late try puts again what was deleted meanwhile.  Returns the name; failed tries may have left others.
    Raises: StoreUnavailable, StoreDenied, StoreFull.
    """
    if isinstance(objects, Retrying):
        return objects.put_anew(make)
    key, data = make()
    objects.put(key, data)
    return key


def exists(objects: ObjectStore, key: str) -> bool:
    """Whether there is such an object.  Raises: StoreUnavailable, StoreDenied."""
    try:
        objects.size(key)
    except ObjectMissing:
        return False
    return True


def asked(call: Callable[[T], R], of: Collection[T]) -> list[R]:
    """What ``call``, which asks the store, gives of each; several are asked for at a time where the store is far away.

    A disk of 2 TiB has 30,000 packs, and such a store may take 20 ms to tell whether one is there.  One that answers at
    once, as the first answers show, is slowed down by threads: 600 answers of a directory took 90 ms longer.
    """
    began_s = time.monotonic()
    left = iter(of)
    found = [call(each) for each in islice(left, ASKED_AT_ONCE)]
    if time.monotonic() - began_s < NEAR_S * len(found):
        return [*found, *map(call, left)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
        return [*found, *executor.map(call, left)]


def absent(objects: ObjectStore, names: Iterable[Name], key_of: Callable[[Name], str]) -> set[Name]:
    """Those of these names of which there is no object.  Raises: StoreUnavailable, StoreDenied."""
    ordered = sorted(names)
    are_there = asked(lambda name: exists(objects, key_of(name)), ordered)
    return {name for name, is_there in zip(ordered, are_there, strict=True) if not is_there}


def put_mark(objects: ObjectStore, key: str) -> None:
    """Put an empty object, of which only the name counts; one that is there is fine.

    Raises: StoreUnavailable, StoreDenied, StoreFull.
    """
    with suppress(ObjectExists):
        objects.put(key, b"")


def drop_cache(objects: ObjectStore, key: str) -> None:
    """Make the next read of ``key`` come from the medium, if a cache may answer it; never fails."""
    if isinstance(objects, CacheDropping):
        objects.drop_cache(key)


def truncated(key: str, *, offset: int, length: int) -> IntegrityError:
    """The error for an object that ends before ``offset + length``."""
    return damage(key)(f"{key}: ends before byte {offset + length}: the object is cut short; run verify")


def oversized(key: str, *, size: int, size_max: int) -> IntegrityError:
    """The error for an object larger than anything vmfs-stub writes under that name."""
    return damage(key)(f"{key}: has {size} bytes where at most {size_max} are valid: the object is damaged")
