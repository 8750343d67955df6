"""The ways in which one call is made to go wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.datastore_harness import Fault, Killed, RigFiles
from tests.fake_hypervisor import FakeHypervisor
from tests.sited_hypervisor import ANSWERED, HYPERVISOR
from vmfs_stub.core.errors import HypervisorAway, StoreFull, StoreUnavailable

ALLOCATING = (
    "archive.record",
    "aside.clone",
    "aside.create",
    "aside.fill",
    "aside.mark",
    "aside.size",
    "aside.write",
    "changes.",
    "datastore.create",
    "datastore.write",
    "map.create",
    "map.write",
    "recall.fill",
    "reserve.fill",
    "restore.create",
    "restore.folder",
    "restore.size",
    "restore.symlink",
    "restore.write",
    "serving.create",
    "volatile.allocate",
    "volatile.create",
    "volatile.map",
    "write.",
)
"""Sites where a filesystem can be full."""
READING = (
    "aside.marks",
    "aside.read",
    "aside.take",
    "read.cached",
    "read.data",
    "archive.read",
    "changes.read",
    "datastore.read",
    "map.read",
    "volatile.read",
)
"""Sites where a read can be short."""
PLACES = ("store.", "replica.")
"""What the sites of calls on object stores begin with."""
AWAY = "away"
"""How a call goes wrong at which the hypervisor goes away."""
DATA = ("get", "get_range")
"""Calls on the store that return bytes."""


@dataclass(frozen=True)
class Spoiling:
    """The ``number``-th call at ``site`` goes wrong in the way ``kind``: an error, a kill (perhaps with the power
    going), an error after the call took effect, bytes that are too few or not those that were written; or from then on
    the hypervisor is away, until the next life.

    ``for_good``: and every later call of the site, until it is repaired.
    """

    site: str
    number: int
    kind: str
    for_good: bool = False

    @property
    def is_kill(self) -> bool:
        return self.kind in ("kill", "power")

    @property
    def power(self) -> bool:
        return self.kind == "power"

    def plan(self, files: RigFiles, hypervisor: FakeHypervisor | None = None) -> None:
        """Make it so in a life of the rig, whose guests the hypervisor runs."""
        if self.kind == AWAY:
            assert hypervisor is not None, "nothing can go away"
            files.spoil(self.site, self.number, Fault(change=partial(self._go_away, hypervisor)))
        else:
            files.spoil(self.site, self.number, self._fault())

    def _go_away(self, hypervisor: FakeHypervisor, done: Any) -> Any:
        hypervisor.away = True
        if self.site.startswith(HYPERVISOR) and self.site.endswith(ANSWERED):
            raise HypervisorAway("planted")
        return done

    def _fault(self) -> Fault:
        if self.is_kill:
            return Fault(Killed())
        change = CHANGES.get(self.kind)
        if change is not None:
            return Fault(change=change, for_good=self.for_good)
        code = errno.ENOSPC if self.kind == "full" else errno.EIO
        error: BaseException = OSError(code, os.strerror(code))
        if self.site.startswith(PLACES):
            error = StoreFull("planted") if self.kind == "full" else StoreUnavailable("planted")
        elif self.site.startswith(HYPERVISOR):
            error = HypervisorAway("planted")
        # A descriptor is gone whatever close says.
        return Fault(error, late=self.kind == "late" or self.site == "mount.close", for_good=self.for_good)

    def __str__(self) -> str:
        return f"{self.site}:{self.number}:{self.kind}{':for good' if self.for_good else ''}"


def shortened(done: Any) -> Any:
    """Half of what was read, but not nothing, which is the end of a file; of a count, half of it."""
    return (done + 1) // 2 if isinstance(done, int) else done[: (len(done) + 1) // 2]


def altered(data: bytes) -> bytes:
    """One bit differs."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CHANGES: dict[str, Callable[[Any], Any]] = {"short": shortened, "wrong": altered}


def kinds_at(site: str, *, has_guest: bool = False) -> Iterator[tuple[str, bool]]:
    """Every way in which a call of this site can go wrong, and whether for good; the most telling first.

    ``has_guest``: with a hypervisor that can go away.
    """
    yield "kill", False
    yield "error", False
    yield "error", True
    yield "late", False
    yield "power", False
    if has_guest:
        yield AWAY, False
    if site.startswith(ALLOCATING) or site.endswith(".put"):
        yield "full", False
        yield "full", True
    if site.startswith(PLACES) and site.endswith(tuple(f".{call}" for call in DATA)):
        yield from (("wrong", False), ("wrong", True), ("short", False), ("short", True))
    if site in READING:
        yield from (("short", False), ("short", True))


def numbers(count: int, others: Iterable[int] = ()) -> list[int]:
    """Which of ``count`` calls are spoiled: the first, the second, the last, and ``others``."""
    return sorted({number for number in (1, 2, count, *others) if number <= count})
