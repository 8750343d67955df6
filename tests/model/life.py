"""One life of a daemon as fate has it: the call at which it is killed, the sync that fails, the store that is away."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from tests.datastore_harness import Killed, RigFiles
from tests.medium import ALL_SYNCS, SYNCS, Key, Medium, key_of_fd
from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.paced_io import write_buffers
from vmfs_stub.primary.files import punch_hole, write_fully

P = ParamSpec("P")
T = TypeVar("T")

CAN_BE_LATE: tuple[Callable[..., Any], ...] = (write_buffers, write_fully, os.pwrite, punch_hole, os.ftruncate)
LATE_MAX = 3


@dataclass(frozen=True)
class LateCall:
    """A call that was in progress when the daemon was killed; ``fd`` is its own."""

    function: Callable[..., Any]
    fd: int
    rest: tuple[Any, ...]

    def happen(self) -> None:
        try:
            self.function(self.fd, *self.rest)
        finally:
            self.drop()

    def drop(self) -> None:
        """It was not in progress after all."""
        os.close(self.fd)


class Life(RigFiles):
    """Takes its decisions from ``chosen``.

    ``kill_in`` counts calls of the files from now on, ``kill_in_writes`` those that may happen late, ``kill_in_syncs``
    and ``fail_sync_in`` those that make something durable, ``kill_in_store`` calls of the store; 0 is never.
    """

    def __init__(self, medium: Medium, chosen: random.Random) -> None:
        super().__init__(medium)
        self.chosen = chosen
        self._fate = threading.Lock()
        self.kill_in = 0
        self.kill_in_writes = 0
        self.kill_in_syncs = 0
        self.kill_in_store = 0
        self.fail_sync_in = 0
        self.failed_sync: Key | None = None
        """The file of which a sync has failed."""
        self.is_store_away = False
        self.refuses_to_unpin = False
        self.fetch_s = 0.0
        """How long the store takes for a range."""

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._fate:
            if self.dead or self._is_killed_at(function):
                self.kill()
                self._perhaps_late(function, args)
                raise Killed
            if function in SYNCS and self._is_due("fail_sync_in"):
                fd = int(args[0])  # type: ignore[call-overload]
                self.failed_sync = key_of_fd(fd)
                self.medium.drop_dirty(fd)
                raise OSError(errno.EIO, "planted")
        return super().call(site, function, *args, **kwargs)

    def store_call(self, call: str, key: str) -> None:
        """Ahead of every call of the store."""
        with self._fate:
            if self.dead or self._is_due("kill_in_store"):
                self.kill()
                raise Killed
        if self.is_store_away or (self.refuses_to_unpin and call == "delete" and key.startswith("pins/")):
            raise StoreUnavailable("away")
        if call == "get_range" and self.fetch_s:
            time.sleep(self.fetch_s)

    def _is_killed_at(self, function: Callable[..., Any]) -> bool:
        at_write = function in CAN_BE_LATE and self._is_due("kill_in_writes")
        at_sync = function in ALL_SYNCS and self._is_due("kill_in_syncs")
        return self._is_due("kill_in") or at_write or at_sync

    def _is_due(self, counter: str) -> bool:
        left = int(getattr(self, counter))
        setattr(self, counter, max(0, left - 1))
        return left == 1

    def _perhaps_late(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A thread that was in this call may still be in it: the call happens later."""
        if function in CAN_BE_LATE and len(self.late) < LATE_MAX and self.chosen.random() < 0.8:
            data = bytes(args[1]) if isinstance(args[1], (bytes, bytearray, memoryview)) else args[1]
            self.late.append(LateCall(function, os.dup(args[0]), (data, *args[2:])))
