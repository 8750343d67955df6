"""A world of hosts that share one store, one at a time and in an order that a seed decides.

Every call on the store is a point at which any other host may go on, or this one may be stopped for long.  Time is
virtual.  Listings lag, answers to puts are lost, and requests that were given up arrive late, all within bounds that
the product assumes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreUnavailable
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo

LAG_S = 10.0
"""How long a listing may miss a change, and a request that was given up be under way."""
PAUSE_S = 3600.0


class Stopped(BaseException):
    """The world ends; raised in every host that still runs."""


@dataclass(eq=False)
class Host:
    """One thread of control."""

    name: str
    wakes_s: float = 0.0
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_over: bool = False
    error: BaseException | None = None


@dataclass(slots=True)
class _Object:
    data: bytes | None
    changed_s: float
    before: bytes | None
    """What was there before the last change."""


class World:
    """The store's state, the time, and whose turn it is."""

    def __init__(self, seed: int, *, lag_s: float = LAG_S) -> None:
        self.random = Random(seed)
        self.now_s = 0.0
        self.lag_s = lag_s
        self.objects: dict[str, _Object] = {}
        self._hosts: list[Host] = []
        self._late: list[tuple[float, str, bytes, bool]] = []
        self._done = threading.Semaphore(0)
        self._stops = False
        self.is_calm = False
        """No faults and no pauses any more."""

    def start(self, name: str, life: Callable[[Host], None]) -> Host:
        """A host that lives ``life``; it begins at the next `run`."""
        host = Host(name)

        def run() -> None:
            host.turn.acquire()
            try:
                if not self._stops:
                    life(host)
            except Stopped:
                pass
            except BaseException as exc:
                host.error = exc
            finally:
                host.is_over = True
                self._done.release()

        threading.Thread(target=run, daemon=True).start()
        self._hosts.append(host)
        return host

    def run(self, *, until: Callable[[], bool]) -> None:
        """Let the hosts take turns until ``until``, or until all are over; raises what one of them raised."""
        while not until():
            running = [host for host in self._hosts if not host.is_over]
            if not running:
                break
            ready = [host for host in running if host.wakes_s <= self.now_s]
            if not ready:
                self.now_s = min(host.wakes_s for host in running)
                continue
            self._give_turn(self.random.choice(ready))
        self._raise()

    def stop(self) -> None:
        """End every host where it is."""
        self._stops = True
        for host in self._hosts:
            if not host.is_over:
                self._give_turn(host)
        self._raise()

    def _raise(self) -> None:
        for host in self._hosts:
            if host.error is not None:
                raise host.error

    def _give_turn(self, host: Host) -> None:
        host.turn.release()
        self._done.acquire()
        for late in [late for late in self._late if late[0] <= self.now_s]:
            self._late.remove(late)
            self._apply_put(late[1], late[2], if_absent=late[3])

    # For hosts

    def pause(self, host: Host, seconds: float) -> None:
        """This host goes on after that time."""
        host.wakes_s = self.now_s + seconds
        self._done.release()
        host.turn.acquire()
        if self._stops:
            raise Stopped

    def step(self, host: Host) -> None:
        """A moment at which others may go on; now and then a very long one."""
        self.now_s += self.random.random() * 0.2
        if self.is_calm:
            return
        stops_for_long = self.random.random() < 0.01
        self.pause(host, self.random.random() * (PAUSE_S if stops_for_long else 0.5))

    def may_fail(self) -> bool:
        return not self.is_calm and self.random.random() < 0.01

    # The state

    def data(self, key: str) -> bytes:
        found = self.objects.get(key)
        if found is None or found.data is None:
            raise ObjectMissing(key)
        return found.data

    def put(self, key: str, data: bytes, *, if_absent: bool) -> None:
        if self.may_fail():
            self._late.append((self.now_s + self.random.random() * self.lag_s, key, data, if_absent))
            raise StoreUnavailable(f"{key}: the request was given up")
        exists = not self._apply_put(key, data, if_absent=if_absent)
        if self.may_fail():
            raise StoreUnavailable(f"{key}: the answer was lost")
        if exists:
            raise ObjectExists(key)

    def _apply_put(self, key: str, data: bytes, *, if_absent: bool) -> bool:
        before = self.objects.get(key)
        if if_absent and before is not None and before.data is not None:
            return False
        self._change(key, data)
        return True

    def delete(self, key: str) -> None:
        if self.may_fail():
            raise StoreUnavailable(f"{key}: not deleted")
        if key in self.objects and self.objects[key].data is not None:
            self._change(key, None)

    def _change(self, key: str, data: bytes | None) -> None:
        before = self.objects.get(key)
        self.objects[key] = _Object(data, self.now_s, None if before is None else before.data)

    def listed(self, prefix: str) -> list[ObjectInfo]:
        found = []
        for key, each in self.objects.items():
            if key.startswith(prefix):
                seen_at_s = self.now_s - (0 if self.is_calm else self.random.random() * self.lag_s)
                data = each.data if each.changed_s <= seen_at_s else each.before
                if data is not None:
                    found.append(ObjectInfo(key, len(data)))
        return found


class HostObjects:
    """The store as one host has it; see ObjectStore for the calls."""

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self._host = host

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        self._world.step(self._host)
        return self._world.data(key)

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        self._world.step(self._host)
        return self._world.data(key)[offset : offset + length]

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        self._world.step(self._host)
        self._world.put(key, bytes(data), if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._world.step(self._host)
        return iter(self._world.listed(prefix))

    def delete(self, key: str) -> None:
        self._world.step(self._host)
        self._world.delete(key)

    def size(self, key: str) -> int:
        self._world.step(self._host)
        return len(self._world.data(key))
