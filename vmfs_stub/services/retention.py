"""Forgetting restore points by rules: the same for the command and for the daemon after a backup.

Points are judged first, by what is known of them, then forgotten one by one.  What is not certain is kept: a point that
cannot be read counts for no rule and is forgotten by none, and no rule is applied while a clock seems to be wrong.
This module must not know where rules come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmfs_stub.core.errors import IntegrityError, PointPinned, Refused, UnknownFormat, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.retention import DatedPoint, Retention, kept
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.points import PointSummary
from vmfs_stub.store.store import Store

DAY_S: Final = 86_400
CLOCK_SLACK_S: Final = DAY_S
"""Of two hosts that have their clocks set, none is ahead of the other by so much."""
_FROM_THE_FUTURE: Final = (
    "a restore point of this VM is from the future: the clock of this host, or of the one that made it, is wrong; set "
    "the clock, or forget that point by its name"
)
"""It would stand in the others' place, and what a wrong clock makes would be old already."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a restore point, and why: rules in words, or what kept it from being forgotten: ``error``."""

    point: PointSummary
    is_kept: bool
    why: str
    error: VmfsStubError | None = None


def by_rules(points: Sequence[PointSummary], rules: Retention, *, now_s: float) -> list[Verdict]:
    """What the rules say of the points of a VM that exists, in their order; ``now_s`` is Unix time."""
    if (kept_all := _kept_for_the_clock(points, now_s)) is not None:
        return kept_all
    dated = [DatedPoint(point.point_id, point.created_s) for point in points if point.damaged is None]
    reasons = kept(dated, rules, zone=None)
    return [_by_rules(point, reasons.get(point.point_id), rules) for point in points]


def by_age(points: Sequence[PointSummary], days: int, *, now_s: float) -> list[Verdict]:
    """All points of a VM that was deleted: forgotten when the newest is older than ``days``, else all kept.

    When it was deleted is not known; the age of its newest point stands in for that.
    """
    if (kept_all := _kept_for_the_clock(points, now_s)) is not None:
        return kept_all
    if any(point.damaged is not None for point in points):
        return keep_all(points, "deleted, but a restore point cannot be read, so that the newest is not known")
    is_old = all(now_s - point.created_s > days * DAY_S for point in points)
    why = f"deleted, and the newest is {'older' if is_old else 'no older'} than keep_deleted_days {days}"
    return [Verdict(point, not is_old, why) for point in points]


def _kept_for_the_clock(points: Sequence[PointSummary], now_s: float) -> list[Verdict] | None:
    if not any(point.created_s > now_s + CLOCK_SLACK_S for point in points):
        return None
    return keep_all(points, _FROM_THE_FUTURE, Refused(f"VM {points[0].vm_id}: {_FROM_THE_FUTURE}"))


def keep_all(points: Sequence[PointSummary], why: str, error: VmfsStubError | None = None) -> list[Verdict]:
    """All are kept, for the same reason."""
    return [Verdict(point, True, why, error) for point in points]


def problem_of(verdicts: Iterable[Verdict]) -> VmfsStubError | None:
    """What kept a point from being forgotten, and an operator should look at: the first; pins are as they should be."""
    errors = (verdict.error for verdict in verdicts if verdict.error is not None)
    return next((error for error in errors if not isinstance(error, PointPinned)), None)


def carry_out(store: Store, verdict: Verdict, *, host: str, dry_run: bool = False) -> Verdict:
    """Forget the point if that is the verdict, as ``host``; with ``dry_run`` only see whether it could be.

    The verdict that is returned says that it is kept when placeholders depend on it, or may.
    Raises StoreUnavailable, StoreDenied, StoreFull.
    """
    if verdict.is_kept:
        return verdict
    vm_id, point_id = verdict.point.vm_id, verdict.point.point_id
    try:
        if dry_run:
            store.check_unpinned(vm_id, point_id)
        else:
            store.forget(vm_id, point_id, host=host, why=verdict.why)
    except (PointPinned, IntegrityError, UnknownFormat) as exc:
        return replace(verdict, is_kept=True, why=str(exc), error=exc)
    return verdict


async def apply_rules(
    threads: Threads, store: Store, vm_id: VmId, rules: Retention, *, host: str, now_s: float
) -> list[Verdict]:
    """Apply the rules to a VM that exists, and carry out what they say.

    Raises StoreUnavailable, StoreDenied, StoreFull: some may be forgotten then and others not yet.
    """
    points = await threads.transfer(store.points, vm_id, with_damaged=True)
    verdicts = by_rules(points, rules, now_s=now_s)
    return [await threads.background(carry_out, store, verdict, host=host) for verdict in verdicts]


def _by_rules(point: PointSummary, reasons: tuple[str, ...] | None, rules: Retention) -> Verdict:
    if point.damaged is not None:
        return Verdict(point, True, f"cannot be read: {point.damaged}")  # which `verify` is to make known
    if reasons is None:
        return Verdict(point, False, f"not kept by {rules.words}")
    return Verdict(point, True, "no rules are set" if rules.keeps_all else ", ".join(reasons))
