"""One disk of a mount under several threads, each with its own part, and what it must hold after the daemon's death.

It may lose its name while it is open: its threads go on as before, and after the daemon's death it is gone.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal

from scripts.lab.content import BLOCK, random_content
from scripts.lab.failure import LabError
from scripts.lab.lane import GONE, Lane

_MIB: Final = 1 << 20
_PIECE: Final = 256 << 10
_NAMES_LOG_LENGTH: Final = 6
_JOIN_DEADLINE_S: Final = 60.0
"""More than the longest time that the program lets anybody wait for a recall."""
OTHER: Final = b"another file, which took the disk's name" * 100

Naming = Literal["rename", "unlink", "replace"]


class KillDisk:
    """A disk of ``vm``, made of lanes; ``mountpoint`` and ``backing`` are the datastore's."""

    def __init__(self, vm: str, name: str, *, size: int, mountpoint: Path, backing: Path) -> None:
        self.vm = vm
        self.label = f"{vm}/{name}"
        self.is_gone = True
        self.lanes: list[Lane] = []
        self._name = name
        self._stem = Path(name).stem
        self._size = size
        self._folders = (mountpoint / vm, backing / vm)
        self._names_lock = threading.Lock()
        self._naming: tuple[Naming, str] | None = None
        self._names_log: deque[str] = deque(maxlen=_NAMES_LOG_LENGTH)
        self._threads: list[threading.Thread] = []
        self._problems: list[str] = []
        self._stop = threading.Event()
        self.compared_in_use = 0
        self._counts: Counter[str] = Counter()

    @property
    def path(self) -> Path:
        """Where the mount shows it."""
        return self._folders[0] / self._name

    @property
    def is_being_named(self) -> bool:
        """Whether a name is being changed or taken away now."""
        return self._naming is not None

    @property
    def backing(self) -> Path:
        """Where it lies."""
        return self._folders[1] / self._name

    def content(self) -> bytes:
        """What it must hold."""
        return b"".join(lane.model for lane in self.lanes)

    def counts(self) -> Counter[str]:
        """How often its lanes did what, also those of the disks that had its place before."""
        return sum((lane.counts for lane in self.lanes), self._counts)

    def change_under_way(self) -> str:
        """What the threads are doing, or were doing when the daemon died."""
        doing = [lane.change.what if lane.change else lane.doing for lane in self.lanes]
        naming = [] if self._naming is None else [f"{self._naming[0]} to {self._naming[1]}"]
        return ", ".join(filter(None, doing + naming)) or "nothing"

    # Opener: what lanes need of it

    def open(self, flags: int) -> int | None:
        """As Opener."""
        with self._names_lock:
            return None if self.is_gone else os.open(self.path, flags)

    def truncate(self, size: int) -> bool:
        """As Opener."""
        with self._names_lock:
            if not self.is_gone:
                os.truncate(self.path, size)
            return not self.is_gone

    def forget(self, fd: int, offset: int, length: int) -> None:
        """As Opener."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        with self._names_lock, suppress(FileNotFoundError):
            below = os.open(self.backing, os.O_RDONLY)
            try:
                os.posix_fadvise(below, offset, length, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(below)

    # A life

    def create(self, chance: random.Random) -> None:
        """Make it anew, under another name first; whatever has its name is replaced."""
        self._folders[0].mkdir(exist_ok=True)
        parts = [random_content(chance, _PIECE) for _ in range(-(-self._size // _PIECE))]
        content = b"".join(parts)[: self._size]
        new = self.path.with_suffix(".new")
        new.write_bytes(content)
        new.rename(self.path)
        self._counts = self.counts()
        borders = [0, self._size // 3 + 1234, self._size * 2 // 3 // BLOCK * BLOCK, self._size]
        self.lanes = [
            Lane(self, start=start, model=bytearray(content[start:end]), size_max=size_max)
            for start, end, size_max in zip(
                borders, borders[1:], (None, None, self._size + self._size // 4), strict=False
            )
        ]
        self.is_gone = False
        self._names_log.append(f"made as {self._name}")

    def begin(self, seed: str, *, doom: threading.Event, naming: Naming | None = None) -> None:
        """Start the threads: one for each lane, one that reads anywhere, and one that changes names if ``naming``."""
        self._stop.clear()
        for number, lane in enumerate(self.lanes):
            self._start(f"lane {number}", partial(lane.play, stop=self._stop, doom=doom), seed)
        self._start("reader", partial(self._read_anywhere, doom=doom), seed)
        if naming is not None:
            self._start("names", partial(self._change_names, naming=naming, doom=doom), seed)

    def finish(self) -> None:
        """Wait until all threads have ended and everything is closed.  Raises LabError with what they found."""
        self._stop.set()
        until_s = time.monotonic() + _JOIN_DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                raise LabError(f"{self.label}: {thread.name} hangs: {self.change_under_way()}")
        self._threads.clear()
        if self._problems:
            raise LabError("\n".join(self._problems))

    def _start(self, name: str, play: Callable[[random.Random], None], seed: str) -> None:
        chance = random.Random(f"{seed} {self.label} {name}")

        def run() -> None:
            try:
                play(chance)
            except Exception as exc:
                self._problems.append(f"{self.label}, {name}: {exc}")

        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    def _read_anywhere(self, chance: random.Random, *, doom: threading.Event) -> None:
        with _until(doom):
            fd = self.open(os.O_RDONLY)
            if fd is None:
                return
            try:
                while not self._stop.is_set():
                    lane = chance.choice(self.lanes)
                    length = chance.randint(1, 64 << 10)
                    offset = lane.start + chance.randrange(len(lane.model))
                    if chance.random() < 0.3:
                        self.forget(fd, offset, length)
                    self.compared_in_use += lane.compare_if_quiet(fd, offset, length)
                    time.sleep(0.001)
            finally:
                with suppress(OSError):
                    os.close(fd)

    def _change_names(self, chance: random.Random, *, naming: Naming, doom: threading.Event) -> None:
        """Rename it to and fro; at last take its name away, if that is what ``naming`` says."""
        with _until(doom):
            for _ in range(chance.randint(1, 12)):
                if self._stop.wait(chance.random() * 0.03):
                    break
                self._rename(f"{self._stem}-{chance.getrandbits(16)}.raw")  # which no other disk ever has
            if naming != "rename":
                self._drop(naming)

    def _rename(self, name: str) -> None:
        with self._names_lock:
            self._naming = ("rename", name)
            self.path.rename(self.path.with_name(name))
            self._name, self._naming = name, None
            self._names_log.append(f"renamed to {name}")

    def _drop(self, naming: Naming) -> None:
        if naming == "replace":
            other = self.path.with_suffix(".other")
            other.write_bytes(OTHER)
        with self._names_lock:
            self._naming = (naming, "")
            if naming == "replace":
                other.rename(self.path)
            else:
                self.path.unlink()
            self.is_gone, self._naming = True, None
            self._names_log.append(naming)

    # After it

    def settle(self) -> None:
        """After the daemon's death: what became of names and changes.  Raises LabError."""
        self._settle_name()
        self.path.with_suffix(".other").unlink(missing_ok=True)
        if self.is_gone:
            for lane in self.lanes:
                lane.change = None
            return
        with self._judged() as fd:
            for lane in reversed(self.lanes):  # the last one knows the size
                lane.settle(fd)

    def compare(self, *, whole: bool) -> None:
        """Size, and every byte, or those that were changed since the last whole comparison.  Raises LabError."""
        if self.is_gone:
            return
        with self._judged() as fd:
            if (size := os.fstat(fd).st_size) != self.lanes[-1].end:
                raise LabError(f"the size is {size} instead of {self.lanes[-1].end}")
            for lane in self.lanes:
                lane.compare(fd, whole=whole)
                if whole:
                    lane.touched.clear()

    def _settle_name(self) -> None:
        naming, self._naming = self._naming, None
        if naming is not None:
            kind, name = naming
            self._names_log.append(f"{kind} {name} cut short")
            if kind == "rename":
                there = [each for each in (self._name, name) if self.path.with_name(each).exists()]
                if len(there) != 1:
                    raise LabError(f"{self.label}: renaming {self._name} to {name} was cut short, and left {there}")
                self._name = there[0]
            elif kind == "unlink":
                self.is_gone = not self.path.exists()
            else:
                self.is_gone = self.path.stat().st_size == len(OTHER)
        has_name = self.path.exists() and self.path.stat().st_size != len(OTHER)
        if has_name == self.is_gone:
            raise LabError(f"{self.label}: {self._name} is {'there' if has_name else 'not there'}")

    @contextmanager
    def _judged(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                yield fd
            finally:
                os.close(fd)
        except (LabError, OSError) as exc:
            raise LabError(f"{self.label}: {exc}; {self._seen()}") from exc

    def _seen(self) -> str:
        """What there is through the mount and behind it, when they differ from each other or from memory."""
        found = []
        for where, path in (("the mount has", self.path), ("behind it is", self.backing)):
            with suppress(OSError):
                st = path.stat()
                found.append(f"{where} {path.name}, inode {st.st_ino} of {st.st_size} bytes")
        return ", ".join([*found, f"what was done to its name: {'; '.join(self._names_log)}"])

    def last_operations(self) -> str:
        """The last operations of each lane, the newest last."""
        return "\n".join(
            f"  {self.label} lane {number}: {'; '.join(lane.log)}" for number, lane in enumerate(self.lanes)
        )


@contextmanager
def _until(doom: threading.Event) -> Iterator[None]:
    """What fails since the daemon is dying is no failure."""
    try:
        yield
    except OSError as exc:
        if not (doom.is_set() and exc.errno in GONE):
            raise
