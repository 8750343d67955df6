"""How commands speak: people read stdout through rich, or plain lines when it is no terminal; programs read JSON.

Diagnostics go to stderr.  Text from outside (names, messages) is never taken for markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

_SHOWN_MAX = 2**64
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def say(text: str) -> None:
    """One line for people, or a script that reads lines, on stdout."""
    print(text)


def warn(text: str) -> None:
    """A diagnostic on stderr."""
    print(f"vmfs-stub: {text}", file=sys.stderr)


def say_json(value: Any) -> None:
    """A JSON document on stdout."""
    print(json.dumps(value, indent=2))


def say_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """A table: drawn on a terminal, tab-separated lines otherwise; columns in ``right`` are numbers."""
    if not sys.stdout.isatty():
        for row in (headers, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def bytes_text(size: int) -> str:
    """``size`` bytes for people, in powers of 1024."""
    value = float(min(size, _SHOWN_MAX))
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
