"""What a row of the bench is, and the things that rows share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

from scripts.lab.datastore import Datastore, Settings, copy_sparse, datastore_in, working_directory
from scripts.lab.disktrace import Extent, read_trace
from scripts.lab.guest import Guest, built_guest
from scripts.lab.qemu import Accelerator, Machine, boot, usable_accelerator
from scripts.lab.ratios import Target

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measures:
    """The two things that are measured alternately; each call gives one sample in the row's unit."""

    ours: Callable[[], float]
    baseline: Callable[[], float]


class Laboratory:
    """What rows share: a directory to work in, the guest, and the reads of its boot."""

    def __init__(self, home: Path, say: Callable[[str], None]) -> None:
        self.home = home
        self.say = say
        self._shared: dict[object, object] = {}
        self._ends = ExitStack()

    def close(self) -> None:
        """End what was `shared`."""
        self._ends.close()

    def shared(self, prepared: Callable[[Laboratory], AbstractContextManager[T]]) -> T:
        """What ``prepared`` gives, made when a row first needs it; it ends with the laboratory."""
        if prepared not in self._shared:
            self._shared[prepared] = self._ends.enter_context(prepared(self))
        return cast(T, self._shared[prepared])

    @cached_property
    def guest(self) -> Guest:
        """The guest, built when a row first needs it."""
        return built_guest(self.say)

    @cached_property
    def accelerator(self) -> Accelerator:
        """How guests run here."""
        return usable_accelerator(self.guest)

    @cached_property
    def boot_reads(self) -> tuple[Extent, ...]:
        """The reads of one full boot from a resident disk through the mount, in order, until the marker."""
        self.say("recording what one boot reads")
        with self.datastore() as datastore:
            disk = datastore.backing / "vm" / "disk.raw"
            disk.parent.mkdir()
            copy_sparse(self.guest.raw, disk)
            datastore.mount()
            machine = Machine(self.guest, datastore.mountpoint / "vm" / "disk.raw", "raw", self.accelerator)
            trace = datastore.home / "trace"
            done = boot(machine, trace=trace)
            return read_trace(trace, until_s=done.marker_at_s).reads

    @contextmanager
    def datastore(self, settings: Settings | None = None) -> Iterator[Datastore]:
        """A fresh datastore, not mounted yet; its directory is gone at the end, since images are large."""
        with working_directory(self.home) as home, datastore_in(home, settings) as datastore:
            yield datastore


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the bench: ours against a named baseline, ``pairs`` times alternately, and what it should be."""

    name: str
    title: str
    baseline: str
    unit: str
    target: Target
    pairs: int
    prepared: Callable[[Laboratory], AbstractContextManager[Measures]]
