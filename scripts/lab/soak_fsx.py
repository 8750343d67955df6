"""Exercises files that are resident, that come back meanwhile, and that graduate again and again.

Each course has two disks of one VM, both open by several handles, and takes one operation at a step.  What is done
is decided by the seed alone; how much is absent when it is done depends on the machine.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from scripts.lab.datastore import Datastore, Settings
from scripts.lab.failure import LabError
from scripts.lab.file_play import FilePlay
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient

_MIB: Final = 1 << 20
_DEADLINE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of course: the size of its disks and after how many operations it is archived again, 0 for never.

    ``graduates``: late in each round both files are waited for, so that the rest is played on files that graduated.
    """

    name: str
    size: int
    round_length: int = 0
    graduates: bool = False


KINDS: Final = (
    Kind(name="hydrating", size=16 * _MIB + 1234, round_length=700),
    Kind(name="resident", size=8 * _MIB + 77),
    Kind(name="graduating", size=5 * _MIB + 4097, round_length=600, graduates=True),
)
"""With the settings below, the first comes back during most of a round, and the last graduates within one."""
_SAMPLE_INTERVAL: Final = 100
"""Operations between two looks at the states of the files."""

SETTINGS: Final[Settings] = {
    "hydration": {"enabled": True, "bytes_per_s_max": 3 * _MIB},
    "archive": {"resident_head_bytes": 0, "resident_tail_bytes": 0, "placeholder_bytes_min": 4096},
}


class Course:
    """The two files of one kind.

    ``graduations`` counts the files that graduated while they were open and exercised, ``states`` how often a file was
    seen in which state.
    """

    def __init__(
        self, kind: Kind, chance: random.Random, *, mountpoint: Path, backing: Path, client: ControlClient
    ) -> None:
        self.kind = kind
        self.graduations = 0
        self.archives = 0
        self.states: Counter[str] = Counter()
        self.plays = [
            FilePlay(
                mountpoint / kind.name / name,
                backing=backing / kind.name / name,
                chance=random.Random(chance.getrandbits(64)),
                size=kind.size + extra,
            )
            for name, extra in (("a.raw", 0), ("b.raw", 123_457))
        ]
        self._chance = chance
        self._client = client
        self._done = 0

    def begin(self) -> None:
        """Make the files; archived, unless the kind says never."""
        for play in self.plays:
            play.create()
        if self.kind.round_length:
            self._begin_round()

    def step(self) -> str:
        """One operation on one of the files.  Raises LabError."""
        if self.kind.round_length and self._done % self.kind.round_length == 0 and self._done:
            self._begin_round()
        if self.kind.graduates and self._done % self.kind.round_length == self.kind.round_length * 3 // 4:
            self._wait_graduated()
        if self._done % _SAMPLE_INTERVAL == 0:
            self.states.update(self._states())
        self._done += 1
        return f"{self.kind.name}: {self._chance.choice(self.plays).step()}"

    def verify(self) -> None:
        """Compare all of both files, by the mount and, once they are resident, in the backing directory."""
        for play in self.plays:
            play.verify()
        self._wait_job(self._client.start_recall([self.kind.name]))
        for play in self.plays:
            play.verify_backing()

    def summary(self) -> str:
        """How often it was archived and graduated in use, in which states it was seen, and what was done how often."""
        counts = sum((play.counts for play in self.plays), Counter[str]())
        done = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        return (
            f"{self.kind.name}: archived {self.archives} times, {self.graduations} graduations in use, "
            f"seen {dict(self.states)}; {counts.total()} operations: {done}"
        )

    def close(self) -> None:
        """Close both files."""
        for play in self.plays:
            play.close()

    def _begin_round(self) -> None:
        if self.archives % 2:  # else what is absent stays so, and the next archive takes it over
            for play in self.plays:
                play.verify()
        for play in self.plays:
            play.refill()
            play.close()
        self._archive()
        for play in self.plays:
            play.open()
            play.forget_all()  # as long after an archive: nothing is served by the kernel's pages of before

    def _wait_graduated(self) -> None:
        """Both files become ordinary ones, open as they are; whatever is not coming back yet is read first."""
        for play in self.plays:
            play.verify()
        until_s = time.monotonic() + _DEADLINE_S
        while self._states() != ["resident"] * len(self.plays):
            if time.monotonic() > until_s:
                raise LabError(f"{self.kind.name} is {self._states()} {_DEADLINE_S:g} s after all of it was read")
            time.sleep(0.02)
        self.graduations += len(self.plays)

    def _archive(self) -> None:
        """Archive the VM; the kernel tells of a closed file a moment later, until then it counts as in use."""
        until_s = time.monotonic() + _DEADLINE_S
        while (error := self._wait_job(self._client.start_archive([self.kind.name]), may_fail=True)) is not None:
            if "InUse" not in error or time.monotonic() > until_s:
                raise LabError(f"archiving {self.kind.name} failed: {error}")
            time.sleep(0.05)
        if (states := self._states()) != ["placeholder"] * len(self.plays):
            raise LabError(f"{self.kind.name} is {states} after it was archived")
        self.archives += 1

    def _states(self) -> list[str]:
        return [row.state for row in self._client.list_disks(self.kind.name)]

    def _wait_job(self, job_id: str, *, may_fail: bool = False) -> str | None:
        info = self._client.wait_job(job_id, lambda _: None)  # type: ignore[arg-type]
        if info.error is None:
            return None
        if may_fail:
            return repr(info.error)
        raise LabError(f"a job failed: {info.error}")


class Courses:
    """A course of each kind on one datastore that is mounted."""

    def __init__(
        self,
        chance: random.Random,
        *,
        mountpoint: Path,
        backing: Path,
        client: ControlClient,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        self.all = [
            Course(kind, random.Random(chance.getrandbits(64)), mountpoint=mountpoint, backing=backing, client=client)
            for kind in kinds
        ]

    def __enter__(self) -> Self:
        try:
            for course in self.all:
                course.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for course in self.all:
            course.close()

    def step(self) -> str:
        """One operation on each kind.  Raises LabError."""
        return "; ".join(course.step() for course in self.all)

    def verify_all(self) -> None:
        """Compare every byte of every file."""
        for course in self.all:
            course.verify()

    def summary(self) -> str:
        """What was done, by kind of file."""
        return "\n".join(course.summary() for course in self.all)


class Fsx(Courses):
    """Single files, open by several handles: any operation at any offset, compared after each; three kinds of files."""

    settings: ClassVar[Settings] = SETTINGS

    def __init__(self, datastore: Datastore, chance: random.Random) -> None:
        client = ControlClient(load_config(datastore.config).socket_path, timeout_s=_DEADLINE_S)
        super().__init__(chance, mountpoint=datastore.mountpoint, backing=datastore.backing, client=client)
        self._datastore = datastore

    def __enter__(self) -> Self:
        self._datastore.mount()
        return super().__enter__()
