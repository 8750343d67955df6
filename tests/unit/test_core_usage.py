"""What readings say of the time between them: no more than is known, and never idleness where it is not."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.usage import (
    DAY_S,
    FRESH_S,
    HOUR_S,
    PLAN,
    Counters,
    GuestState,
    Reading,
    Sample,
    apart,
    bucketed,
    is_sound,
    merged,
    rolled_until,
    rows_max,
    sample_of,
    spans,
)

OFF, SAVED, RUNNING, PAUSED = GuestState.OFF, GuestState.SAVED, GuestState.RUNNING, GuestState.PAUSED
CRASHED, UNKNOWN = GuestState.CRASHED, GuestState.UNKNOWN
START = 1_790_000_000.0
GAP_S = 900.0
NOTHING = Counters()
EARLIER = Counters(cpu_s=10.0, read_bytes=1000, written_bytes=500, requests=30, network_bytes=70)
LATER = Counters(cpu_s=40.0, read_bytes=4000, written_bytes=3500, requests=90, network_bytes=370)


def reading(at_s: float, state: GuestState, counters: Counters = NOTHING, since_s: float | None = None) -> Reading:
    return Reading(START + at_s, state, counters, None if since_s is None else START + since_s)


def between(before: Reading, after: Reading) -> Sample:
    found = sample_of(before, after, gap_s=GAP_S)
    assert found is not None
    assert is_sound(found)
    assert (found.start_s, found.end_s) == (before.at_s, after.at_s)
    return found


def rates(sample: Sample) -> tuple[float | None, float | None, float | None]:
    return sample.cpu_percent_max, sample.disk_bytes_per_s_max, sample.network_bytes_per_s_max


def test_a_guest_that_runs() -> None:
    found = between(reading(0, RUNNING, EARLIER), reading(300, PAUSED, LATER))
    assert (found.off_s, found.running_s) == (0, 300)
    assert rates(found) == (10.0, 20.0, 1.0)
    used = (found.cpu_s, found.read_bytes, found.written_bytes, found.requests, found.network_bytes)
    assert used == (30.0, 3000, 3000, 60, 300)


@pytest.mark.parametrize("since", [None, -500, -1])
@pytest.mark.parametrize(("first", "second"), [(OFF, OFF), (SAVED, SAVED), (OFF, SAVED)])
def test_off_is_what_both_readings_say(first: GuestState, second: GuestState, since: float | None) -> None:
    found = between(reading(0, first, since_s=since), reading(300, second, since_s=since))
    assert (found.off_s, found.running_s) == (300, 0)
    assert rates(found) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("since", [0, 200, 300, 400])
def test_a_vm_that_was_started_and_stopped_in_between_was_not_off(since: float) -> None:
    found = between(reading(0, OFF), reading(300, OFF, since_s=since))
    assert (found.off_s, found.running_s, rates(found)) == (0, 0, (None, None, None))


def test_a_vm_whose_disks_were_used_was_not_off() -> None:
    used = between(reading(0, OFF, Counters(read_bytes=5)), reading(300, OFF, Counters(read_bytes=6)))
    assert (used.off_s, used.running_s, used.read_bytes, rates(used)) == (0, 0, 1, (None, None, None))


@pytest.mark.parametrize("other", [UNKNOWN, CRASHED])
@pytest.mark.parametrize("known", [OFF, SAVED, RUNNING, PAUSED])
def test_a_state_that_is_unknown_is_neither(known: GuestState, other: GuestState) -> None:
    for first, second in ((known, other), (other, known), (other, other)):
        found = between(reading(0, first, EARLIER), reading(300, second, LATER))
        assert (found.off_s, found.running_s, rates(found)) == (0, 0, (None, None, None))
        assert found.read_bytes == 3000


def test_a_start_counts_from_when_it_is_known() -> None:
    found = between(reading(0, OFF), reading(300, RUNNING, LATER, since_s=200))
    assert (found.off_s, found.running_s, found.cpu_s) == (0, 100, 40.0)
    assert rates(found) == (40.0, 75.0, 3.7)
    unknown = between(reading(0, OFF), reading(300, RUNNING, LATER))
    assert (unknown.off_s, unknown.running_s, unknown.cpu_s, rates(unknown)) == (0, 0, 40.0, (None, None, None))


def test_a_start_does_not_count_what_the_mount_had_counted_before() -> None:
    found = between(reading(0, OFF, Counters(read_bytes=1000)), reading(300, RUNNING, Counters(read_bytes=1500)))
    assert found.read_bytes == 500


def test_a_restart_counts_what_the_new_guest_used() -> None:
    """Also what has grown beyond what the old one had used: reads alone would not tell."""
    smaller = replace(LATER, cpu_s=4.0)
    found = between(reading(0, RUNNING, EARLIER), reading(300, RUNNING, smaller, since_s=250))
    assert (found.running_s, found.cpu_s, found.read_bytes) == (50, 4.0, 4000)
    assert rates(found)[0] == 8.0
    unknown = between(reading(0, RUNNING, EARLIER), reading(300, RUNNING, smaller))
    assert (unknown.running_s, unknown.read_bytes, rates(unknown)) == (0, 4000, (None, None, None))


def test_where_a_guest_may_have_been_restarted_its_rates_are_unknown() -> None:
    found = between(reading(0, RUNNING, EARLIER), reading(300, RUNNING, LATER, since_s=100))
    assert (found.running_s, found.read_bytes, rates(found)) == (200, 3000, (None, None, None))


def test_a_stop_is_not_known_to_have_been_anything() -> None:
    found = between(reading(0, RUNNING, EARLIER), reading(300, OFF, since_s=100))
    assert (found.off_s, found.running_s, found.cpu_s, rates(found)) == (0, 0, 0.0, (None, None, None))


def test_what_nobody_counts_is_unknown() -> None:
    found = between(reading(0, RUNNING, Counters(read_bytes=1, written_bytes=1)), reading(300, RUNNING, LATER))
    assert rates(found) == (None, (3999 + 3499) / 300, None)


@pytest.mark.parametrize("after_s", [0, -1, -GAP_S, GAP_S + 1])
def test_no_time_time_that_went_back_and_a_gap_are_no_sample(after_s: float) -> None:
    assert sample_of(reading(0, OFF), reading(after_s, OFF), gap_s=GAP_S) is None


states = st.sampled_from(GuestState)
amounts = st.none() | st.integers(0, 10**12)
counted = st.builds(Counters, st.none() | st.floats(0, 1e6), amounts, amounts, amounts, amounts)


@given(states, states, counted, counted, st.floats(0.1, GAP_S), st.none() | st.floats(-1e4, 1e4))
def test_whatever_is_read_a_sample_is_sound_and_off_only_where_both_say_so(
    first: GuestState, second: GuestState, old: Counters, new: Counters, span_s: float, since_s: float | None
) -> None:
    found = between(reading(0, first, old), reading(span_s, second, new, since_s))
    if found.off_s:
        assert first.is_off
        assert second.is_off
        assert since_s is None or START + since_s < START
        assert found.read_bytes + found.written_bytes + found.requests + found.network_bytes == 0
    if not found.off_s and not found.running_s:
        assert rates(found) == (None, None, None)


# Merging

EIGHTH = 0.125
"""Times in eighths of a second, so that sums are exact."""


@st.composite
def series(draw: st.DrawFn, *, size_max: int = 60) -> list[Sample]:
    """Samples in order, with gaps, of anything that a VM may have done."""
    found, at_s = [], START + draw(st.integers(0, 10**6)) * EIGHTH
    for _ in range(draw(st.integers(1, size_max))):
        at_s += draw(st.just(0) | st.integers(1, 80_000)) * EIGHTH
        length = draw(st.integers(1, 7200))
        off = draw(st.integers(0, length))
        rate = st.none() | st.integers(0, 10**9).map(float)
        count = st.integers(0, 10**12)
        found.append(
            Sample(
                start_s=at_s,
                end_s=at_s + length * EIGHTH,
                off_s=off * EIGHTH,
                running_s=draw(st.integers(0, length - off)) * EIGHTH,
                cpu_percent_max=draw(rate),
                disk_bytes_per_s_max=draw(rate),
                network_bytes_per_s_max=draw(rate),
                cpu_s=draw(st.integers(0, 10**6)) * EIGHTH,
                read_bytes=draw(count),
                written_bytes=draw(count),
                requests=draw(count),
                network_bytes=draw(count),
            )
        )
        at_s += length * EIGHTH
    return found


def totals(samples: list[Sample]) -> tuple[float, ...]:
    names = ("off_s", "running_s", "cpu_s", "read_bytes", "written_bytes", "requests", "network_bytes")
    return tuple(sum(getattr(each, name) for each in samples) for name in names)


def highest(samples: list[Sample]) -> tuple[float | None, ...]:
    """In other words than the code's: None is above all."""
    found = []
    for number in range(3):
        values = [math.inf if (rate := rates(each)[number]) is None else rate for each in samples]
        found.append(None if math.inf in values else max(values))
    return tuple(found)


def unknown_s(sample: Sample) -> float:
    return sample.end_s - sample.start_s - sample.off_s - sample.running_s


@given(series())
def test_merging_keeps_totals_maxima_and_gaps(samples: list[Sample]) -> None:
    one = merged(samples)
    assert (one.start_s, one.end_s) == (samples[0].start_s, samples[-1].end_s)
    assert totals([one]) == totals(samples)
    assert rates(one) == highest(samples)
    missing = sum(later.start_s - earlier.end_s for earlier, later in pairwise(samples))
    assert unknown_s(one) == sum(map(unknown_s, samples)) + missing


@given(series(), st.integers(1, 10))
def test_merging_in_steps_is_merging_at_once(samples: list[Sample], step: int) -> None:
    parts = [merged(samples[at : at + step]) for at in range(0, len(samples), step)]
    assert merged(parts) == merged(samples)


@given(series(), st.sampled_from([HOUR_S, DAY_S]))
def test_buckets_keep_everything_and_are_one_for_each(samples: list[Sample], resolution_s: float) -> None:
    found = bucketed(samples, resolution_s)
    assert totals(found) == totals(samples)
    assert len({each.start_s // resolution_s for each in found}) == len(found)
    assert bucketed(found, resolution_s) == found
    assert apart(found) == found
    assert bucketed(bucketed(samples, HOUR_S), DAY_S) == bucketed(samples, DAY_S)


@given(series(), st.integers(0, 3600))
def test_what_is_shown_never_hides_a_gap(samples: list[Sample], gap_s: int) -> None:
    found = list(spans(samples, resolution_s=HOUR_S, gap_s=gap_s))
    assert totals(found) == totals(samples)
    edges = {each.end_s for each in found}
    for earlier, later in pairwise(samples):
        if later.start_s - earlier.end_s >= gap_s:
            assert earlier.end_s in edges


@given(series())
def test_what_overlaps_or_is_not_sound_is_left_out(samples: list[Sample]) -> None:
    broken = [replace(samples[0], off_s=-1.0), *samples, samples[-1], replace(samples[-1], cpu_percent_max=math.nan)]
    assert apart(broken) == samples


@pytest.mark.parametrize(
    "changes",
    [
        {"off_s": 1e9},
        {"off_s": math.nan},
        {"running_s": -1.0},
        {"end_s": START},
        {"end_s": START + 3 * DAY_S, "off_s": 0.0},
        {"start_s": -math.inf},
        {"end_s": math.inf},
        {"disk_bytes_per_s_max": -1.0},
        {"network_bytes_per_s_max": math.inf},
        {"read_bytes": -1},
        {"cpu_s": -1.0},
    ],
)
def test_a_sample_that_nobody_can_have_measured_is_not_sound(changes: dict[str, float]) -> None:
    sound = Sample(START, START + 300, 300.0, 0.0, 0.0, 0.0, 0.0)
    assert is_sound(sound)
    assert not is_sound(replace(sound, **changes))  # type: ignore[arg-type]


def test_only_whole_buckets_are_rolled() -> None:
    hours, days = PLAN
    assert rolled_until(hours, FRESH_S, now_s=FRESH_S + 10 * HOUR_S - 1) == 9 * HOUR_S
    assert rolled_until(hours, FRESH_S, now_s=FRESH_S + 10 * HOUR_S) == 10 * HOUR_S
    assert rolled_until(days, hours.kept_s, now_s=hours.kept_s + 3.9 * DAY_S) == 3 * DAY_S


def test_the_bound_of_the_default_interval_is_what_is_promised() -> None:
    assert rows_max(300) <= 2200
