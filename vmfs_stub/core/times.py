"""How times are told to people."""

from __future__ import annotations

from datetime import datetime
from typing import Final

_UNITS: Final = ((86400, "day"), (3600, "hour"), (60, "minute"))


def time_text(seconds: float | None) -> str:
    """Local time of ``seconds`` since the epoch; "-" for None and for what no calendar has."""
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"


def age_text(seconds: float) -> str:
    """A length of time of ``seconds`` in whole days, hours or minutes, whichever is the largest that fits."""
    for length, unit in _UNITS:
        count = int(seconds // length)
        if count > 0:
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"


def span_text(seconds: float) -> str:
    """A length of time of ``seconds`` in its largest unit, with one decimal where that says more: ``1.5 days``."""
    for length, unit in _UNITS:
        if seconds >= length:
            count = f"{seconds / length:.1f}".removesuffix(".0")
            return f"{count} {unit}{'' if count == '1' else 's'}"
    return f"{max(seconds, 0):.0f} s"
