"""How VMs were used, as rows of the catalog: samples, readings, last uses; schema.sql describes them.

Purpose: the statements of the catalog's methods of the same names.  Rows that nobody can have measured, as of a damaged
file, are left out when they are read: what is missing is a gap, and a gap is never idleness.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import (
    DAY_S,
    FRESH_S,
    PLAN,
    SAMPLE_S_MAX,
    Counters,
    GuestState,
    Reading,
    Sample,
    apart,
    bucketed,
    is_sound,
    rolled_until,
)

_FRESH: Final = len(PLAN)
"""The tier of samples as they are taken; those they become count down, so that a VM's rows lie in order of time."""

_COLUMNS: Final = "start, length, off, running, cpu_max, disk_max, network_max, cpu, read, written, requests, network"
_INSERT: Final = f"INSERT OR REPLACE INTO samples (vm, tier, {_COLUMNS}) VALUES ({', '.join('?' * 14)})"
_SOUND: Final = (
    f"s.length > 0 AND s.length <= {int(SAMPLE_S_MAX * 1000)} AND s.off >= 0 AND s.running >= 0 AND s.cpu >= 0 "
    "AND s.off + s.running <= s.length AND s.read >= 0 AND s.written >= 0 AND s.requests >= 0 AND s.network >= 0 "
    "AND ifnull(s.cpu_max, 0) >= 0 AND ifnull(s.disk_max, 0) >= 0 AND ifnull(s.network_max, 0) >= 0"
)
"""What core.usage.is_sound says: asked before samples are put together, after which it could not be told."""
_COUNT_MAX: Final = 2**62
_DAY_MS: Final = int(DAY_S * 1000)
_CPU_UNITS: Final = 100
"""In a percent."""


@dataclass(frozen=True, slots=True)
class LastUse:
    """When a hypervisor last opened a disk of a VM, and last read or wrote one; None: never, as far as is known."""

    open_s: float | None = None
    io_s: float | None = None


def add_samples(connection: sqlite3.Connection, samples: Iterable[tuple[VmId, Sample]]) -> None:
    """Those that are not sound are left out."""
    rows = [(vm_id, sample) for vm_id, sample in samples if is_sound(sample)]
    numbers = _numbers(connection, [vm_id for vm_id, _ in rows])
    connection.executemany(_INSERT, [(numbers[vm_id], _FRESH, *_row(sample)) for vm_id, sample in rows])


def set_readings(connection: sqlite3.Connection, readings: Mapping[str, Reading]) -> None:
    """These, and no others."""
    connection.execute("DELETE FROM readings")
    connection.executemany(
        "INSERT INTO readings (domain, at, state, since, cpu, read, written, requests, network) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (uuid, each.at_s, each.state.value, each.state_since_s, *_counted(each.counters))
            for uuid, each in readings.items()
        ],
    )


def record_uses(connection: sqlite3.Connection, uses: Mapping[VmId, LastUse]) -> None:
    """What is older than what is known changes nothing."""
    _numbers(connection, list(uses))
    connection.executemany(
        "UPDATE sampled_vms SET last_open = nullif(max(ifnull(last_open, -1), ifnull(:open, -1)), -1), "
        "last_io = nullif(max(ifnull(last_io, -1), ifnull(:io, -1)), -1) WHERE vm = :vm",
        [{"vm": vm_id, "open": use.open_s, "io": use.io_s} for vm_id, use in uses.items()],
    )


def roll_samples(connection: sqlite3.Connection, now: float) -> None:
    """Merge what is old enough, and forget what is too old, with the VMs of which nothing is left."""
    oldest = now - PLAN[-1].kept_s
    for (number,) in connection.execute("SELECT number FROM sampled_vms").fetchall():
        kept_s = FRESH_S
        for tier, plan in zip(range(_FRESH, 0, -1), PLAN, strict=True):
            _roll(connection, number, tier, rolled_until(plan, kept_s, now_s=now), plan.resolution_s)
            kept_s = plan.kept_s
        connection.execute(
            "DELETE FROM samples WHERE vm = ? AND tier = 0 AND start + length <= ?", (number, ms(oldest))
        )
    connection.execute(
        "DELETE FROM sampled_vms WHERE max(ifnull(last_open, 0), ifnull(last_io, 0)) <= ? "
        "AND NOT EXISTS (SELECT 1 FROM samples WHERE samples.vm = number)",
        (oldest,),
    )


def forget_samples(connection: sqlite3.Connection, after_s: float) -> None:
    """Those that end after this time, and last uses after it are of this time."""
    connection.execute(
        "UPDATE sampled_vms SET last_open = min(last_open, :now), last_io = min(last_io, :now)", {"now": after_s}
    )
    connection.execute("DELETE FROM samples WHERE start + length > ?", (ms(after_s),))


SAMPLES: Final = (
    f"SELECT u.vm, {_COLUMNS} FROM sampled_vms AS u JOIN samples AS s ON s.vm = u.number "
    f"WHERE u.vm = :vm AND s.start + s.length > :since AND s.start < :until AND {_SOUND} ORDER BY s.tier, s.start"
)
"""Of one VM, those that reach into [:since, :until), in ms."""

ALL_SAMPLES: Final = (
    "SELECT u.vm, min(s.start), max(s.start + s.length) - min(s.start), sum(s.off), sum(s.running), "
    "CASE WHEN count(s.cpu_max) = count(*) THEN max(s.cpu_max) END, "
    "CASE WHEN count(s.disk_max) = count(*) THEN max(s.disk_max) END, "
    "CASE WHEN count(s.network_max) = count(*) THEN max(s.network_max) END, "
    "total(s.cpu), total(s.read), total(s.written), total(s.requests), total(s.network) "
    "FROM sampled_vms AS u CROSS JOIN samples AS s ON s.vm = u.number AND s.tier IN (0, 1, 2) "
    f"AND s.start > :since - {int(SAMPLE_S_MAX * 1000)} WHERE s.start + s.length > :since AND {_SOUND} "
    "GROUP BY s.vm, s.tier, s.start / :resolution"
)
"""Of all VMs, merged as core.usage.bucketed does it: of 10,000 VMs single ones would be too many.  Times in ms."""

READINGS: Final = "SELECT domain, at, state, since, cpu, read, written, requests, network FROM readings"
USES: Final = "SELECT vm, last_open, last_io FROM sampled_vms WHERE coalesce(last_open, last_io) IS NOT NULL"


def samples_of(rows: Iterable[Sequence[Any]]) -> dict[VmId, list[Sample]]:
    """By VM and in order of time, what does not overlap; ``rows`` are sound, and those of a VM together."""
    found: dict[VmId, list[Sample]] = {}
    for vm_id, group in groupby(rows, lambda row: row[0]):
        kept: list[Sequence[Any]] = []
        end = -_COUNT_MAX
        # By start: in a damaged catalog the tiers need not follow each other.
        for row in sorted(group, key=lambda row: int(row[1])):
            if row[1] >= end:
                kept.append(row[1:])
                end = row[1] + row[2]
        found[VmId(vm_id)] = [_sample(row) for row in kept]
    return found


def without_repetition(rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """``rows`` with those of the same day put together in which a VM was off all the time, which most are."""
    last: Sequence[Any] | None = None
    for row in rows:
        if last is not None and _goes_on(last, row):
            last = (*last[:2], last[2] + row[2], last[3] + row[3], *last[4:])
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _goes_on(last: Sequence[Any], row: Sequence[Any]) -> bool:
    return (
        last[0] == row[0]
        and last[1] + last[2] == row[1]
        and last[2] == last[3]
        and row[2] == row[3]
        and last[1] // _DAY_MS == row[1] // _DAY_MS
        and not any(last[5:])
        and not any(row[5:])
        and None not in (*last[5:8], *row[5:8])
    )


def readings_of(rows: Iterable[Sequence[Any]]) -> dict[str, Reading]:
    """By the domain's UUID; one that is damaged was not taken."""
    found = {}
    for uuid, at_s, state, since_s, *counters in rows:
        try:
            found[uuid] = Reading(at_s, GuestState(state), Counters(*counters), since_s)
        except ValueError:
            continue
    return found


def uses_of(rows: Iterable[Sequence[Any]]) -> dict[VmId, LastUse]:
    """By VM."""
    return {VmId(vm_id): LastUse(open_s, io_s) for vm_id, open_s, io_s in rows}


def _roll(connection: sqlite3.Connection, number: int, tier: int, until_s: float, resolution_s: float) -> None:
    where, values = "vm = ? AND tier = ? AND start < ?", (number, tier, ms(until_s))
    found = f"SELECT {_COLUMNS} FROM samples AS s WHERE {where} AND {_SOUND} ORDER BY start"
    rows = connection.execute(found, values).fetchall()
    if not rows:
        return
    connection.execute(f"DELETE FROM samples WHERE {where}", values)
    coarse = bucketed(apart([_sample(row) for row in rows]), resolution_s)
    connection.executemany(_INSERT, [(number, tier - 1, *_row(sample)) for sample in coarse])


def _numbers(connection: sqlite3.Connection, vm_ids: Sequence[VmId]) -> dict[VmId, int]:
    if not vm_ids:
        return {}
    connection.executemany("INSERT OR IGNORE INTO sampled_vms (vm) VALUES (?)", [(vm_id,) for vm_id in vm_ids])
    return {VmId(vm): number for vm, number in connection.execute("SELECT vm, number FROM sampled_vms")}


def ms(seconds: float) -> int:
    """A time as samples have it."""
    return round(max(-_COUNT_MAX, min(seconds * 1000, _COUNT_MAX)))


def _row(sample: Sample) -> tuple[int | None, ...]:
    start = ms(sample.start_s)
    length = ms(sample.end_s) - start
    off = min(ms(sample.off_s), length)
    return (
        start,
        length,
        off,
        min(ms(sample.running_s), length - off),
        None if sample.cpu_percent_max is None else _up(sample.cpu_percent_max * _CPU_UNITS),
        None if sample.disk_bytes_per_s_max is None else _up(sample.disk_bytes_per_s_max),
        None if sample.network_bytes_per_s_max is None else _up(sample.network_bytes_per_s_max),
        _up(sample.cpu_s * 1000),
        _up(sample.read_bytes),
        _up(sample.written_bytes),
        _up(sample.requests),
        _up(sample.network_bytes),
    )


def _up(amount: float) -> int:
    return math.ceil(min(amount, _COUNT_MAX))


def _counted(counters: Counters) -> Iterator[float | None]:
    yield counters.cpu_s
    counts = (counters.read_bytes, counters.written_bytes, counters.requests, counters.network_bytes)
    yield from (None if count is None else min(count, _COUNT_MAX) for count in counts)


def _sample(row: Sequence[Any]) -> Sample:
    start, length, off, running, cpu_max, disk_max, network_max, cpu, *counts = row
    return Sample(
        start / 1000,
        (start + length) / 1000,
        off / 1000,
        running / 1000,
        None if cpu_max is None else cpu_max / _CPU_UNITS,
        None if disk_max is None else float(disk_max),
        None if network_max is None else float(network_max),
        cpu / 1000,
        *(int(count) for count in counts),
    )
