"""Which restore points are kept: against the rules in other words, and the properties that operators count on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.ids import PointId
from vmfs_stub.core.retention import NEWEST, DatedPoint, Retention, kept

RULES = [each.name for each in fields(Retention)]
HOUR, DAY = 3600, 86400
START = datetime(2024, 2, 27, 23, 30, tzinfo=UTC).timestamp()

times = st.lists(st.integers(0, 3 * 365 * 24 * 4).map(lambda quarter: START + quarter * 900), max_size=40)
counts = st.fixed_dictionaries({rule: st.integers(0, 6) for rule in RULES})


def points_of(created: list[float]) -> list[DatedPoint]:
    return [DatedPoint(PointId(f"{number:032x}"), at) for number, at in enumerate(created)]


def period(rule: str, at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(
        {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G %V", "monthly": "%Y-%m", "yearly": "%Y"}[rule]
    )


def kept_by(rule: str, count: int, points: list[DatedPoint]) -> set[PointId]:
    """The rule in other words: the newest of each of the last groups of a period; the oldest if they are too few."""
    ordered = sorted(points, key=lambda point: (point.created_s, point.point_id))
    if not count or not ordered:
        return set()
    if rule == "last":
        return {point.point_id for point in ordered[-count:]}
    groups: dict[str, PointId] = {}
    for point in ordered:
        groups.pop(period(rule, point.created_s), None)
        groups[period(rule, point.created_s)] = point.point_id
    found = set(list(groups.values())[-count:])
    return found | ({ordered[0].point_id} if len(groups) < count else set())


@given(times, counts)
def test_a_point_is_kept_when_any_rule_keeps_it(created: list[float], numbers: dict[str, int]) -> None:
    points = points_of(created)
    found = kept(points, Retention(**numbers), zone=UTC)
    wanted = set[PointId]()
    for rule, count in numbers.items():
        wanted |= kept_by(rule.removeprefix("keep_"), count, points)
    assert set(found) == (wanted if any(numbers.values()) else {point.point_id for point in points})


@given(times, counts, st.sampled_from(RULES))
def test_more_of_a_rule_keeps_no_less(created: list[float], numbers: dict[str, int], rule: str) -> None:
    points, retention = points_of(created), Retention(**numbers)
    if retention.keeps_all:
        return
    more = replace(retention, **{rule: numbers[rule] + 1})
    lost = set(kept(points, retention, zone=UTC)) - set(kept(points, more, zone=UTC))
    assert not lost


@given(times, counts)
def test_the_newest_is_kept_and_to_forget_again_changes_nothing(created: list[float], numbers: dict[str, int]) -> None:
    points, retention = points_of(created), Retention(**numbers)
    found = kept(points, retention, zone=UTC)
    if points:
        assert max(points, key=lambda point: (point.created_s, point.point_id)).point_id in found
    left = [point for point in points if point.point_id in found]
    assert set(kept(left, retention, zone=UTC)) == set(found)


def test_a_night_by_night_year() -> None:
    """What is left after a year in which points were made each night and forgotten each morning."""
    retention = Retention(keep_daily=7, keep_weekly=4, keep_monthly=12)
    points: list[DatedPoint] = []
    for night in range(400):
        points.append(DatedPoint(PointId(f"{night:032x}"), START + night * DAY))
        found = kept(points, retention, zone=UTC)
        points = [point for point in points if point.point_id in found]
    dates = [datetime.fromtimestamp(point.created_s, UTC).date().isoformat() for point in points]
    assert dates[-7:] == [f"2025-03-{day:02}" for day in range(26, 32)] + ["2025-04-01"]
    assert [date for date in dates if date.startswith("2024")] == [
        "2024-05-31", "2024-06-30", "2024-07-31", "2024-08-31", "2024-09-30", "2024-10-31", "2024-11-30", "2024-12-31",
    ]  # fmt: skip


@pytest.mark.parametrize(("hours", "is_two_days"), [(0, True), (5, False)])
def test_days_are_those_of_the_zone(hours: int, is_two_days: bool) -> None:
    at = datetime(2024, 2, 29, 22, tzinfo=UTC).timestamp()
    points = points_of([at, at + 3 * HOUR])
    found = kept(points, Retention(keep_daily=1), zone=timezone(timedelta(hours=hours)))
    assert len(found) == 1
    both = kept(points, Retention(keep_daily=5), zone=timezone(timedelta(hours=hours)))
    assert list(both.values()) == [(NEWEST, "daily"), ("daily",) if is_two_days else ("oldest daily",)]


def test_each_point_has_its_reasons() -> None:
    points = points_of([START, START + DAY, START + DAY + HOUR / 4, START + 2 * DAY])
    found = kept(points, Retention(keep_last=1, keep_daily=2), zone=UTC)
    assert list(found.values()) == [(NEWEST, "last", "daily"), ("daily",)]
    assert list(found)[1] == points[2].point_id  # the later of that day
    assert list(kept(points, Retention(), zone=UTC).values()) == [(NEWEST,), (), (), ()]


def test_a_week_across_new_year_is_one_week() -> None:
    days = [datetime(2024, 12, 26, tzinfo=UTC), datetime(2024, 12, 30, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)]
    points = points_of([START, *(day.timestamp() for day in days)])
    assert list(kept(points, Retention(keep_weekly=2), zone=UTC)) == [points[3].point_id, points[1].point_id]


def test_rules_in_words() -> None:
    rules = Retention(keep_daily=7, keep_last=3)
    assert (rules.words, rules.keeps_all) == ("keep_last 3, keep_daily 7", False)
    assert (Retention().words, Retention().keeps_all) == ("", True)


@pytest.fixture
def central_europe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process lives there, for as long as the test runs."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("central_europe")
def test_a_repeated_hour_is_one_hour() -> None:
    """Where clocks are set back, an hour is there twice; its points are one period, and none is counted twice."""
    second_hour = datetime(2024, 10, 27, 1, 30, tzinfo=UTC).timestamp()  # 2:30, for the second time
    points = points_of([second_hour - 2 * HOUR, second_hour - HOUR, second_hour, second_hour + HOUR])
    found = kept(points, Retention(keep_hourly=3), zone=None)
    assert list(found) == [points[3].point_id, points[2].point_id, points[0].point_id]
