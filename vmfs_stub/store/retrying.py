"""Retries around an object store; the only place of the project that retries store calls.

Invariants: only StoreUnavailable is retried, at most ``attempts_max`` calls in all, with growing, jittered pauses of
bounded length.  A conditional put that is retried may meet its own first attempt: it then compares the contents
(every object that is put conditionally has content of its own, by a fresh id, a nonce or a content address).
This module must not know any transport.
"""

from __future__ import annotations

import random as _random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreUnavailable
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, ObjectStore, drop_cache

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently: pause n is ``pause_s * 2**n`` up to ``pause_max_s``, times 0.5 to 1."""

    attempts_max: int = 4
    pause_s: float = 0.1
    pause_max_s: float = 2.0


class RetryingObjects:
    """Decorates an object store with retries; see ObjectStore for the calls."""

    def __init__(
        self,
        inner: ObjectStore,
        policy: RetryPolicy = RetryPolicy(),
        *,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.inner = inner
        self._policy = policy
        self._sleep = sleep
        self._random = random

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object."""
        return self._retried(lambda _: self.inner.get(key, size_max=size_max))

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes."""
        return self._retried(lambda _: self.inner.get_range(key, offset=offset, length=length))

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object; a lost answer to a conditional put is recognised by the content."""

        def attempt(number: int) -> None:
            try:
                self.inner.put(key, data, if_absent=if_absent)
            except ObjectExists:
                if number == 0 or self._there(key) != bytes(data):
                    raise

        self._retried(attempt)

    def put_anew(self, make: Callable[[], tuple[str, Buffer]]) -> str:
        """Put what ``make`` gives, another name each time; returns the one that was acknowledged."""

        def attempt(_: int) -> str:
            key, data = make()
            self.inner.put(key, data)
            return key

        return self._retried(attempt)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder; a listing that fails midway starts again and skips what was handed out."""
        handed: set[str] = set()
        for number in range(self._policy.attempts_max):
            try:
                for info in self.inner.list(prefix):
                    if info.key not in handed:
                        handed.add(info.key)
                        yield info
            except StoreUnavailable:
                self._pause_or_raise(number)
            else:
                return

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._retried(lambda _: self.inner.delete(key))

    def size(self, key: str) -> int:
        """Size in bytes."""
        return self._retried(lambda _: self.inner.size(key))

    def drop_cache(self, key: str) -> None:
        """Pass on, where the inner store has a cache to drop."""
        drop_cache(self.inner, key)

    def _there(self, key: str) -> bytes:
        try:
            return self.inner.get(key)
        except ObjectMissing as exc:
            msg = f"{key}: was there, and is not any more"
            raise StoreUnavailable(msg) from exc

    def _retried(self, attempt: Callable[[int], T]) -> T:
        number = 0
        while True:
            try:
                return attempt(number)
            except StoreUnavailable:
                self._pause_or_raise(number)
            number += 1

    def _pause_or_raise(self, number: int) -> None:
        """Called in an except clause: re-raise when ``number`` was the last attempt, else pause."""
        if number + 1 >= self._policy.attempts_max:
            raise  # noqa: PLE0704 - re-raises what the caller is handling
        pause_s = min(self._policy.pause_max_s, self._policy.pause_s * 2**number)
        self._sleep(pause_s * (0.5 + self._random() / 2))
