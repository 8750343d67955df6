"""What a scrub tells: which objects are damaged, and who needs what cannot be read of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.ids import PointId, VmId

DAMAGES_MAX: Final = 1000
"""Damaged objects that are told; the rest is counted."""
NEEDS_MAX: Final = 1000
"""Of each damage; more say nothing new."""


@dataclass(frozen=True, slots=True)
class Need:
    """A file that needs what is damaged: ``chunk_count`` chunks of it.

    ``path`` is empty for a whole point; ``pin_count`` placeholders depend on the point.
    """

    vm_id: VmId
    vm_name: str
    point_id: PointId
    pin_count: int
    path: str
    chunk_count: int


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged object; ``needs`` are those that cannot be restored for it, the ones with placeholders first.

    ``need_count`` is how many there are, of which no more than NEEDS_MAX are told.
    ``since_s`` (Unix time) is when a pack was found damaged first; None for anything else.
    ``frame_count`` frames of a pack are damaged and needed, of which ``repaired_count`` can be read elsewhere.
    """

    key: str
    problem: str
    needs: tuple[Need, ...]
    need_count: int
    frame_count: int = 0
    repaired_count: int = 0
    since_s: float | None = None


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """One round; ``read_bytes`` are those of this run, ``more_damages`` are beside those that are told."""

    point_count: int
    segment_count: int
    pack_count: int
    read_bytes: int
    damages: tuple[Damage, ...]
    more_damages: int

    @property
    def is_whole(self) -> bool:
        """Whether all that restore points need can be read."""
        return not any(damage.needs for damage in self.damages)


def damage_of(key: str, problem: str, needs: Sequence[Need]) -> Damage:
    """A damaged object, with those who need it, in whatever order."""
    ordered = sorted(needs, key=lambda need: (not need.pin_count, need.vm_name, need.point_id, need.path))
    return Damage(key, problem, tuple(ordered[:NEEDS_MAX]), len(needs))


def urgency(damage: Damage) -> tuple[bool, bool, str]:
    """What damages are sorted by: what placeholders depend on first, then what any point needs."""
    return not (damage.needs and damage.needs[0].pin_count), not damage.needs, damage.key
