"""How a VM was used: readings of counters, and samples, each of a span of time.

A *reading* is what the hypervisor and the mount say at one moment: counters that only grow, and begin anew when a guest
starts.  A *sample* is what two readings say of the time between them.  Samples of the same VM never overlap; where
there is none, nobody looked: that is a gap, and a gap is never taken for idleness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Final

HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0
GAP_INTERVALS: Final = 3
"""Two readings that are further apart than so many sampling intervals say nothing of the time between them."""
SAMPLE_S_MAX: Final = 2 * DAY_S
"""No sample is longer: a day's, whose last part may reach into the next."""


class GuestState(Enum):
    """What a VM does, as far as anybody knows; `UNKNOWN` is never taken for `OFF`."""

    OFF = "off"
    SAVED = "saved"
    """Off, with its memory in a file of the hypervisor (managed save)."""
    RUNNING = "running"
    PAUSED = "paused"
    """It has its disks open, and does not run."""
    CRASHED = "crashed"
    UNKNOWN = "unknown"

    @property
    def is_off(self) -> bool:
        """Whether no process of a hypervisor has the VM's disks."""
        return self in (GuestState.OFF, GuestState.SAVED)

    @property
    def has_disks(self) -> bool:
        """Whether a process of a hypervisor has the VM's disks, and counts what it does with them."""
        return self in (GuestState.RUNNING, GuestState.PAUSED)


@dataclass(frozen=True, slots=True)
class Counters:
    """What a VM has used since it was started, or, of what the mount counts, since the daemon was.

    Bytes and requests are those of all its disks together.  None: nobody can tell.
    """

    cpu_s: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    requests: int | None = None
    network_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at ``at_s`` (seconds since the epoch); ``state_since_s`` is None when nobody knows."""

    at_s: float
    state: GuestState
    counters: Counters
    state_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """How a VM was used from ``start_s`` to ``end_s``; times in seconds since the epoch.

    ``off_s`` is for how long of it the VM is known to have been off, ``running_s`` for how long it ran or was paused;
    what is left is unknown.  The ``*_max`` are the highest mean of any reading's interval within: a sample that was
    made of shorter ones still knows of a busy one among them.  CPU in percent of one processor.  None: nobody could
    tell, which counts as use.
    """

    start_s: float
    end_s: float
    off_s: float
    running_s: float
    cpu_percent_max: float | None
    disk_bytes_per_s_max: float | None
    network_bytes_per_s_max: float | None
    cpu_s: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    requests: int = 0
    network_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tier:
    """Samples of about ``resolution_s`` are kept until they are ``kept_s`` old."""

    resolution_s: float
    kept_s: float


PLAN: Final = (Tier(HOUR_S, 35 * DAY_S), Tier(DAY_S, 730 * DAY_S))
"""What samples become with age, finest first; see `rows_max` for what that comes to."""
FRESH_S: Final = 2 * DAY_S
"""For so long samples stay as they were taken."""


def rows_max(interval_s: float) -> int:
    """How many samples a VM can have at most, of one each ``interval_s``, if they are rolled each hour.

    Each tier may hold what its age allows, a bucket of the next one that is not over yet, and what reaches over an end.
    """
    fresh = math.ceil((FRESH_S + PLAN[0].resolution_s + HOUR_S) / interval_s) + 1
    hours = math.ceil((PLAN[0].kept_s - FRESH_S + PLAN[1].resolution_s) / HOUR_S) + 2
    days = math.ceil((PLAN[1].kept_s - PLAN[0].kept_s) / DAY_S) + 2
    return fresh + hours + days


def sample_of(before: Reading, after: Reading, *, gap_s: float) -> Sample | None:
    """What two consecutive readings say of the time between; None if there is none, or it is longer than ``gap_s``.

    What nobody can tell stays open: of a state that is unknown, or changed in between, the time counts as neither off
    nor running, and the highest rates as unknown.  Of a guest that was started in between its counters say what it has
    used since.
    """
    span_s = after.at_s - before.at_s
    if not 0 < span_s <= gap_s:
        return None
    changed = after.state_since_s is not None and after.state_since_s >= before.at_s
    if before.state.is_off and after.state.is_off:
        if changed or any(_differ(before.counters, after.counters)):
            return _sample(before, after, _grown(before.counters, after.counters))
        return _sample(before, after, Counters(0.0, 0, 0, 0, 0), off_s=span_s, rates_s=span_s)
    if before.state.has_disks and after.state.has_disks and not _shrank(before.counters, after.counters):
        known_s = _since(after, span_s) if changed else span_s
        grown = _grown(before.counters, after.counters)
        return _sample(before, after, grown, running_s=known_s, rates_s=0.0 if changed else span_s)
    if after.state.has_disks and (before.state.is_off or before.state.has_disks):
        known_s = _since(after, span_s) if changed else 0.0
        return _sample(before, after, _used_since_start(before, after), running_s=known_s, rates_s=known_s)
    return _sample(before, after, _grown(before.counters, after.counters))


def merged(samples: Sequence[Sample]) -> Sample:
    """One sample of all the time of ``samples``, in their order, at least one: gaps in between stay unknown."""
    first, last = samples[0], samples[-1]
    span_s = last.end_s - first.start_s
    off_s = min(span_s, math.fsum(each.off_s for each in samples))
    return Sample(
        start_s=first.start_s,
        end_s=last.end_s,
        off_s=off_s,
        running_s=min(span_s - off_s, math.fsum(each.running_s for each in samples)),
        cpu_percent_max=_highest([each.cpu_percent_max for each in samples]),
        disk_bytes_per_s_max=_highest([each.disk_bytes_per_s_max for each in samples]),
        network_bytes_per_s_max=_highest([each.network_bytes_per_s_max for each in samples]),
        cpu_s=math.fsum(each.cpu_s for each in samples),
        read_bytes=sum(each.read_bytes for each in samples),
        written_bytes=sum(each.written_bytes for each in samples),
        requests=sum(each.requests for each in samples),
        network_bytes=sum(each.network_bytes for each in samples),
    )


def bucketed(samples: Sequence[Sample], resolution_s: float) -> list[Sample]:
    """``samples``, in order, with those that begin in the same ``resolution_s`` of the epoch merged."""
    return [merged(group) for group in _buckets(samples, resolution_s)]


def rolled_until(tier: Tier, kept_s: float, *, now_s: float) -> float:
    """What begins before this goes into ``tier``, when what is finer is kept for ``kept_s``: only whole buckets do."""
    return math.floor((now_s - kept_s) / tier.resolution_s) * tier.resolution_s


def spans(samples: Sequence[Sample], *, resolution_s: float, gap_s: float) -> Iterator[Sample]:
    """``samples``, in order, as they are shown to people: merged by ``resolution_s``, never over a gap of ``gap_s``."""
    part: list[Sample] = []
    for sample in samples:
        if part and (
            sample.start_s - part[-1].end_s >= gap_s
            or sample.start_s // resolution_s != part[0].start_s // resolution_s
        ):
            yield merged(part)
            part = []
        part.append(sample)
    if part:
        yield merged(part)


def is_sound(sample: Sample) -> bool:
    """Whether a sample can be what anybody measured; one that is not, such as a damaged one, says nothing."""
    span_s = sample.end_s - sample.start_s
    times = (sample.off_s, sample.running_s, sample.cpu_s)
    rates = (sample.cpu_percent_max, sample.disk_bytes_per_s_max, sample.network_bytes_per_s_max)
    counts = (sample.read_bytes, sample.written_bytes, sample.requests, sample.network_bytes)
    return (
        math.isfinite(sample.start_s)
        and 0 < span_s <= SAMPLE_S_MAX
        and all(math.isfinite(each) and each >= 0 for each in (*times, *counts))
        and all(each is None or (math.isfinite(each) and each >= 0) for each in rates)
        and sample.off_s + sample.running_s <= span_s + 0.001
    )


def apart(samples: Sequence[Sample]) -> list[Sample]:
    """Of samples in the order of their starts those that are sound and begin after the one before has ended."""
    found: list[Sample] = []
    for sample in samples:
        if is_sound(sample) and (not found or sample.start_s >= found[-1].end_s):
            found.append(sample)
    return found


def _buckets(samples: Sequence[Sample], resolution_s: float) -> Iterator[list[Sample]]:
    def bucket_of(sample: Sample) -> float:
        return sample.start_s // resolution_s

    return (list(group) for _, group in groupby(samples, bucket_of))


def _highest(rates: Sequence[float | None]) -> float | None:
    """The highest of them; None, which counts as use, where one of them is not known."""
    found = 0.0
    for rate in rates:
        if rate is None:
            return None
        found = max(found, rate)
    return found


def _fields(counters: Counters) -> tuple[float | None, ...]:
    return (
        counters.cpu_s,
        counters.read_bytes,
        counters.written_bytes,
        counters.requests,
        counters.network_bytes,
    )


def _differ(before: Counters, after: Counters) -> Iterator[bool]:
    pairs = zip(_fields(before), _fields(after), strict=True)
    return (old is not None and new is not None and old != new for old, new in pairs)


def _shrank(before: Counters, after: Counters) -> bool:
    pairs = zip(_fields(before), _fields(after), strict=True)
    return any(old is not None and new is not None and new < old for old, new in pairs)


def _grown(before: Counters, after: Counters) -> Counters:
    """What was used between two readings of the same guest; None where one of them does not know."""

    def grown(old: int | None, new: int | None) -> int | None:
        return None if old is None or new is None else max(0, new - old)

    return Counters(
        cpu_s=None if before.cpu_s is None or after.cpu_s is None else max(0.0, after.cpu_s - before.cpu_s),
        read_bytes=grown(before.read_bytes, after.read_bytes),
        written_bytes=grown(before.written_bytes, after.written_bytes),
        requests=grown(before.requests, after.requests),
        network_bytes=grown(before.network_bytes, after.network_bytes),
    )


def _used_since_start(before: Reading, after: Reading) -> Counters:
    """What a guest has used that was started in between; the mount's counters go on meanwhile."""
    if before.state.has_disks:
        return after.counters

    def since(old: int | None, new: int | None) -> int | None:
        return new if old is None or new is None or new < old else new - old

    old, new = before.counters, after.counters
    return Counters(
        cpu_s=new.cpu_s,
        read_bytes=since(old.read_bytes, new.read_bytes),
        written_bytes=since(old.written_bytes, new.written_bytes),
        requests=since(old.requests, new.requests),
        network_bytes=since(old.network_bytes, new.network_bytes),
    )


def _since(after: Reading, span_s: float) -> float:
    """For how long of the time before ``after`` it was in its state, which it came to in that time."""
    return 0.0 if after.state_since_s is None else min(span_s, max(0.0, after.at_s - after.state_since_s))


def _sample(
    before: Reading,
    after: Reading,
    used: Counters,
    *,
    off_s: float = 0.0,
    running_s: float = 0.0,
    rates_s: float = 0.0,
) -> Sample:
    """``rates_s`` is the time in which ``used`` was used; 0: nobody knows."""

    def rate(amount: float | None) -> float | None:
        return None if amount is None or rates_s <= 0 else amount / rates_s

    disk = None if used.read_bytes is None or used.written_bytes is None else used.read_bytes + used.written_bytes
    cpu = rate(used.cpu_s)
    return Sample(
        start_s=before.at_s,
        end_s=after.at_s,
        off_s=off_s,
        running_s=running_s,
        cpu_percent_max=None if cpu is None else cpu * 100,
        disk_bytes_per_s_max=rate(disk),
        network_bytes_per_s_max=rate(used.network_bytes),
        cpu_s=used.cpu_s or 0.0,
        read_bytes=used.read_bytes or 0,
        written_bytes=used.written_bytes or 0,
        requests=used.requests or 0,
        network_bytes=used.network_bytes or 0,
    )
