"""Half-open ranges and sets of them.

An ExtentSet keeps its extents sorted, disjoint and not touching, so two sets are equal exactly when they hold the same
points.  Units are the caller's (bytes, blocks or chunks); this module knows arithmetic only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """The points from ``start`` up to, and without, ``end``."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class ExtentSet:
    """An immutable set of points, kept as extents."""

    __slots__ = ("_extents",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._extents = _normal_form(extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtentSet) and self._extents == other._extents

    def __hash__(self) -> int:
        return hash(self._extents)

    def __bool__(self) -> bool:
        return bool(self._extents)

    def __repr__(self) -> str:
        return f"ExtentSet({list(self._extents)!r})"

    @property
    def length(self) -> int:
        """Number of points in the set."""
        return sum(extent.length for extent in self._extents)

    def union(self, other: ExtentSet) -> ExtentSet:
        return ExtentSet((*self._extents, *other._extents))

    def intersection(self, other: ExtentSet) -> ExtentSet:
        return ExtentSet(
            Extent(max(a.start, b.start), min(a.end, b.end))
            for a in self._extents
            for b in other._extents
            if a.start < b.end and b.start < a.end
        )

    def difference(self, other: ExtentSet) -> ExtentSet:
        rest: list[Extent] = []
        for extent in self._extents:
            at = extent.start
            for hole in other._extents:
                if hole.end <= at or hole.start >= extent.end:
                    continue
                rest.append(Extent(at, max(at, hole.start)))
                at = hole.end
            rest.append(Extent(at, max(at, extent.end)))
        return ExtentSet(rest)


def _normal_form(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    merged: list[Extent] = []
    for extent in sorted(e for e in extents if e.start < e.end):
        if merged and extent.start <= merged[-1].end:
            merged[-1] = Extent(merged[-1].start, max(merged[-1].end, extent.end))
        else:
            merged.append(extent)
    return tuple(merged)
