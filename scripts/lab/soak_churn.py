"""Churn: one disk is read, written, synced, archived, recalled, remounted and its daemon killed, in random order.

The model is an ordinary file beside the datastore that gets the same writes.  A write that was acknowledged before
the daemon was killed must be there afterwards: the page cache of the host survives the daemon.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from types import TracebackType
from typing import ClassVar, Self

from scripts.lab.datastore import Datastore, Settings
from scripts.lab.failure import LabError

_DISK_SIZE = 96 << 20
_TRANSFER_MAX = 1 << 20
_VM = "churn"


class Churn:
    """One disk under random reads, writes, archives, recalls, remounts and kills of the daemon."""

    settings: ClassVar[Settings] = {}

    def __init__(self, datastore: Datastore, chance: random.Random) -> None:
        self._datastore = datastore
        self._chance = chance
        self._disk = datastore.mountpoint / _VM / "disk.raw"
        self._model_path = datastore.home / "model"
        self._model = -1
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        content = b"".join(self._content(_TRANSFER_MAX) for _ in range(_DISK_SIZE // _TRANSFER_MAX))
        self._model_path.write_bytes(content)
        backing = self._datastore.backing / _VM / "disk.raw"
        backing.parent.mkdir()
        backing.write_bytes(content)
        self._model = os.open(self._model_path, os.O_RDWR)
        self._datastore.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._model)

    def step(self) -> str:
        """One random thing; raises LabError when a byte is wrong."""
        actions = {self._read: 40, self._write: 30, self._archive: 10, self._recall: 4, self._remount: 2, self._kill: 2}
        action = self._chance.choices(list(actions), weights=list(actions.values()))[0]
        what = action()
        self._counts[what] += 1
        return what

    def summary(self) -> str:
        """What was done."""
        return ", ".join(f"{what} {count}" for what, count in self._counts.most_common())

    def verify_all(self) -> None:
        """Compare the whole disk with the model."""
        descriptor = os.open(self._disk, os.O_RDONLY)
        try:
            for offset in range(0, _DISK_SIZE, _TRANSFER_MAX):
                self._compare(descriptor, offset, _TRANSFER_MAX)
        finally:
            os.close(descriptor)

    def _content(self, size: int) -> bytes:
        kind = self._chance.random()
        if kind < 0.2:
            return bytes(size)
        return self._chance.randbytes(size) if kind < 0.6 else (self._chance.randbytes(64) * (size // 64 + 1))[:size]

    def _place(self) -> tuple[int, int]:
        """Offset and size, half of them whole blocks as guests write them."""
        unit = 4096 if self._chance.random() < 0.5 else 1
        size = max(unit, self._chance.randint(1, _TRANSFER_MAX) // unit * unit)
        return self._chance.randrange(0, _DISK_SIZE - size + 1) // unit * unit, size

    def _compare(self, descriptor: int, offset: int, size: int) -> None:
        found, wanted = os.pread(descriptor, size, offset), os.pread(self._model, size, offset)
        if found != wanted:
            at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(found))
            raise LabError(f"WRONG BYTES: {size} bytes at {offset} differ from byte {offset + at} on")

    def _read(self) -> str:
        descriptor = os.open(self._disk, os.O_RDONLY)
        try:
            for _ in range(self._chance.randint(1, 20)):
                self._compare(descriptor, *self._place())
        finally:
            os.close(descriptor)
        return "reads"

    def _write(self) -> str:
        descriptor = os.open(self._disk, os.O_RDWR)
        try:
            for _ in range(self._chance.randint(1, 10)):
                offset, size = self._place()
                content = self._content(size)
                if os.pwrite(descriptor, content, offset) != size:
                    raise LabError(f"a write of {size} bytes at {offset} was short")
                os.pwrite(self._model, content, offset)
            if self._chance.random() < 0.5:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return "writes"

    def _archive(self) -> str:
        if self._state() == "resident":
            self._datastore.vmfs("archive", _VM)
        return "archive"

    def _recall(self) -> str:
        self._datastore.vmfs("recall", _VM)
        if self._state() != "resident":
            raise LabError("the disk is not resident after a recall")
        return "recall"

    def _state(self) -> str:
        return self._datastore.disks()[0].state

    def _remount(self) -> str:
        self._datastore.unmount()
        self._datastore.mount()
        return "remount"

    def _kill(self) -> str:
        self._datastore.kill()
        self._datastore.mount()
        return "kill -9 and mount"
