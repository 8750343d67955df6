"""Which restore points of one VM to keep, and by which rule each: what restic calls ``forget``.

A rule keeps the newest point of each of the last so many periods that have one; a point is kept when any rule keeps it.
As long as there are not so many periods, a rule also keeps the oldest point, so that what is to become the monthly one
of a year ago is not forgotten before there are twelve.  Without any rule all is kept, and the newest always is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo
from typing import Final

from vmfs_stub.core.ids import PointId

NEWEST: Final = "newest"
"""The reason to keep a VM's newest point, whatever the rules say."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many points to keep by each rule; 0 is no rule."""

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether there is no rule."""
        return not self.words

    @property
    def words(self) -> str:
        """The rules as they are configured, such as "keep_last 3, keep_daily 7"; empty when there is none."""
        rules = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return ", ".join(f"{name} {count}" for name, count in rules if count)


@dataclass(frozen=True, slots=True)
class DatedPoint:
    """A restore point and when it was made (Unix time)."""

    point_id: PointId
    created_s: float


_PERIODS: Final[Mapping[str, Callable[[datetime], tuple[int, ...]]]] = {
    "hourly": lambda at: (at.year, at.month, at.day, at.hour),
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: (at.year,),
}
"""For each rule which points are of one period."""


def kept(points: Iterable[DatedPoint], retention: Retention, *, zone: tzinfo | None) -> dict[PointId, tuple[str, ...]]:
    """The points to keep, newest first, each with the names of the rules that keep it; the newest also as NEWEST.

    Periods are those of ``zone``, of this host's when it is None; points of the same time are ordered by their ids.
    Raises OverflowError, ValueError or OSError for a time that no calendar has, which callers sort out before.
    """
    newest_first = sorted(points, key=lambda point: (point.created_s, point.point_id), reverse=True)
    reasons: dict[PointId, list[str]] = {point.point_id: [] for point in newest_first}
    for point in newest_first[:1]:
        reasons[point.point_id].append(NEWEST)
    for point in newest_first[: retention.keep_last]:
        reasons[point.point_id].append("last")
    for rule, period_of in _PERIODS.items():
        left, before = getattr(retention, f"keep_{rule}"), None
        for point in newest_first:
            if not left:
                break
            period = period_of(datetime.fromtimestamp(point.created_s, zone))
            is_oldest = point is newest_first[-1]
            if period != before or is_oldest:
                reasons[point.point_id].append(rule if period != before else f"oldest {rule}")
                before, left = period, left - 1
    return {point_id: tuple(rules) for point_id, rules in reasons.items() if rules or retention.keeps_all}
