"""The limit of the hour: which window is open, past midnight and at the ends, at every minute of a day."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.windows import MINUTES_PER_DAY, Window, Windows, minute_of

MINUTES = st.integers(0, MINUTES_PER_DAY - 1)


def walked(window: Window) -> set[int]:
    """The minutes of a window, by walking from its start to its end around the clock."""
    minutes, at = {window.start}, window.start
    while (at := (at + 1) % MINUTES_PER_DAY) != window.end:
        minutes.add(at)
    return minutes


@given(MINUTES, MINUTES)
def test_a_window_holds_the_minutes_from_its_start_to_its_end(start: int, end: int) -> None:
    window = Window(start, end, 1)
    assert {minute for minute in range(MINUTES_PER_DAY) if window.holds(minute)} == walked(window)


def test_a_night_goes_past_midnight() -> None:
    windows = Windows((Window(minute_of("22:00"), minute_of("06:00"), 200), Window(0, 0, 50)), outside=7)
    assert [windows.limit(minute_of(time)) for time in ("21:59", "22:00", "00:00", "05:59", "06:00")] == [
        50,
        200,
        200,
        200,
        50,
    ]


def test_outside_all_windows_the_other_limit_holds() -> None:
    windows = Windows((Window(60, 120, 0),), outside=10)
    assert [windows.limit(minute) for minute in (59, 60, 119, 120)] == [10, 0, 0, 10]
    assert not windows.are_unlimited
    assert Windows((Window(60, 120, 0),)).are_unlimited
    assert Windows().limit(3) == 0


@pytest.mark.parametrize(
    ("text", "minute"), [("00:00", 0), ("9:05", 545), ("23:59", 1439), ("24:00", 0), (" 06:00 ", 360)]
)
def test_times_of_day(text: str, minute: int) -> None:
    assert minute_of(text) == minute


@pytest.mark.parametrize("text", ["", "6", "6:5", "24:01", "25:00", "12:60", "-1:00", "12:00:00", "noon"])
def test_what_is_no_time_of_day(text: str) -> None:
    with pytest.raises(ValueError, match="not a time of day"):
        minute_of(text)
