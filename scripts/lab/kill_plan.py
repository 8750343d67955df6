"""What happens between two kills: decided by the seed and the number of the life alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from scripts.lab.datastore import Setting
from scripts.lab.kill_disk import Naming

Condition = Literal["resident", "placeholder", "recalled", "archived", "backed up", "named"]
"""What a VM goes through in a life.

An ordinary file in use; a placeholder in use; one that an operator also recalls, so that it graduates; archived or
backed up by a job that runs, opened when that is done or in the midst of it; renamed, unlinked or replaced while open.
"""
Aim = Literal[
    "any moment", "copy", "commit", "release", "hydration", "graduation", "sync", "resize", "mapped write", "naming"
]
"""What is waited for before the kill."""
Victim = Literal["daemon", "mover"]

_CONDITIONS: Final[Sequence[Condition]] = ("resident", "placeholder", "recalled", "archived", "backed up", "named")
_NEEDED: Final[Mapping[Aim, Sequence[Condition]]] = {
    "copy": ("archived", "backed up"),
    "commit": ("archived",),
    "release": ("archived",),
    "hydration": ("recalled",),
    "graduation": ("recalled",),
    "naming": ("named",),
}
_AIMS: Final[Mapping[Aim, int]] = {
    "any moment": 6,
    "copy": 2,
    "commit": 3,
    "release": 3,
    "hydration": 2,
    "graduation": 3,
    "sync": 2,
    "resize": 2,
    "mapped write": 1,
    "naming": 2,
}
_MOVER_AIMS: Final[Mapping[Aim, int]] = {"any moment": 2, "copy": 3, "commit": 1, "hydration": 3}
_HYDRATIONS: Final[Sequence[Mapping[str, Setting]]] = (
    {"enabled": False, "bytes_per_s_max": 0},
    {"enabled": True, "bytes_per_s_max": 4 << 20},
    {"enabled": True, "bytes_per_s_max": 0},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start that is killed: ``delay_s`` after the daemon took the lock of the datastore, or after its launch."""

    after_lock: bool
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """From one kill to the next; ``opened_s`` are the VMs that are opened while a job has them, and when.

    ``hydration`` and ``starts`` are of the daemon that follows.
    """

    conditions: Mapping[str, Condition]
    naming: Naming
    opened_s: Mapping[str, float]
    aim: Aim
    victim: Victim
    delay_s: float
    starts: Sequence[Start]
    hydration: Mapping[str, Setting]

    def __str__(self) -> str:
        vms = ", ".join(f"{vm} {condition}" for vm, condition in self.conditions.items())
        starts = f", {len(self.starts)} starts killed after it" if self.starts else ""
        return f"{self.victim} killed {self.delay_s * 1000:.0f} ms after {self.aim!r}{starts}; {vms}"


def plan_life(chance: random.Random, vms: Sequence[str]) -> Life:
    """One life of these VMs, all in different conditions."""
    victim: Victim = "mover" if chance.random() < 0.15 else "daemon"
    aims = _AIMS if victim == "daemon" else _MOVER_AIMS
    (aim,) = chance.choices(list(aims), list(aims.values()))
    needed = chance.choice(_NEEDED.get(aim, _CONDITIONS))
    others = chance.sample([each for each in _CONDITIONS if each != needed], len(vms) - 1)
    conditions = dict(zip(chance.sample(list(vms), len(vms)), [needed, *others], strict=True))
    long = aim == "any moment"
    return Life(
        conditions=conditions,
        naming=chance.choice(("rename", "unlink", "replace")),
        opened_s={vm: chance.random() * 0.3 for vm in vms if chance.random() < 0.3},
        aim=aim,
        victim=victim,
        delay_s=chance.random() * (0.6 if long else chance.choice((0.0, 0.003, 0.02))),
        starts=[_plan_start(chance) for _ in range(chance.choice((0, 0, 0, 0, 1, 2)))] if victim == "daemon" else [],
        hydration=chance.choice(_HYDRATIONS),
    )


def _plan_start(chance: random.Random) -> Start:
    after_lock = chance.random() < 0.7
    return Start(after_lock=after_lock, delay_s=chance.random() * (0.15 if after_lock else 1.0))
