"""The bench: measures rows, prints them as a table and says which fall short of their target.

Exit code 0 when all that was asked for was measured, also when rows fall short (``--strict`` makes that 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from scripts.lab import rows_backup, rows_boot, rows_far, rows_io, rows_large, rows_move, rows_quiet, rows_store
from scripts.lab.datastore import end_on_signals, working_directory
from scripts.lab.failure import LabError
from scripts.lab.ratios import Comparison, Verdict, alternate, compare
from scripts.lab.row import Laboratory, Row

ROWS: tuple[Row, ...] = (
    *rows_io.ROWS,
    *rows_move.ROWS,
    *rows_boot.ROWS,
    *rows_quiet.ROWS,
    *rows_store.ROWS,
    *rows_backup.ROWS,
    *rows_far.ROWS,
    *rows_large.ROWS,
)


@dataclass(frozen=True, slots=True)
class Result:
    """A row that was measured, and how long that took."""

    row: Row
    found: Comparison
    took_s: float

    @property
    def verdict(self) -> Verdict:
        """Whether the row is where it should be."""
        return self.found.verdict(self.row.target)


def measure(row: Row, laboratory: Laboratory, *, pairs: int | None) -> Result:
    """Measure one row; raises LabError when that is not possible."""
    started_s = time.monotonic()
    with row.prepared(laboratory) as measures:
        ours, baseline = alternate(measures.ours, measures.baseline, pairs=pairs or row.pairs)
    return Result(row, compare(ours, baseline), time.monotonic() - started_s)


def table_of(results: Sequence[Result]) -> Table:
    """What people read; the titles and baselines of the rows are in ``--list`` and beside each row while it runs."""
    table = Table(title="Ours against a baseline: ratio of medians taken alternately")
    for heading in ("row", "ours", "baseline", "ratio", "95 % interval", "target", "verdict"):
        table.add_column(heading, justify="right" if heading in {"ours", "baseline", "ratio"} else "left", no_wrap=True)
    for result in results:
        row, found = result.row, result.found
        table.add_row(
            row.name,
            readable(median(found.ours), row.unit),
            readable(median(found.baseline), row.unit),
            f"{found.ratio:.2f}",
            f"{found.low:.2f} to {found.high:.2f}",
            str(row.target),
            f"[{'red' if result.verdict is Verdict.SHORT else 'green'}]{result.verdict.value}[/]",
        )
    return table


def readable(value: float, unit: str) -> str:
    """A value with its unit, as a person reads it."""
    if unit == "s":
        return f"{value:.3g} s"
    return f"{value / (1 << 20):,.1f} Mi{unit}"


def document_of(results: Sequence[Result]) -> dict[str, object]:
    """What programs read: every sample, so that the statistics can be done again."""
    machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    rows = [
        {
            "name": result.row.name,
            "title": result.row.title,
            "baseline": result.row.baseline,
            "unit": result.row.unit,
            "target": str(result.row.target),
            "verdict": result.verdict.name.lower(),
            "ratio": result.found.ratio,
            "low": result.found.low,
            "high": result.found.high,
            "ours_samples": result.found.ours,
            "baseline_samples": result.found.baseline,
            "took_s": result.took_s,
        }
        for result in results
    ]
    return {"version": 1, "machine": machine, "rows": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument(
        "--row", action="append", choices=[row.name for row in ROWS], help="measure this row only; repeatable"
    )
    parser.add_argument(
        "--pairs", type=int, help="so many pairs of samples for each row, instead of the row's own number"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a row falls short")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the bench."""
    options = parse()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if options.list:
        for row in ROWS:
            console.print(
                f"{row.name:18} {row.title} / {row.baseline}; {row.target}; {row.pairs} pairs", soft_wrap=True
            )
        return
    end_on_signals()
    failed: list[str] = []
    results: list[Result] = []
    try:
        with (
            working_directory() as home,
            closing(Laboratory(home, lambda text: console.print(f"[dim]{text}[/]", soft_wrap=True))) as laboratory,
        ):
            for row in [row for row in ROWS if not options.row or row.name in options.row]:
                console.print(f"[dim]measuring {row.name}: {row.title} / {row.baseline}[/]", soft_wrap=True)
                try:
                    results.append(measure(row, laboratory, pairs=options.pairs))
                except LabError as failure:
                    failed.append(row.name)
                    console.print(f"[red]{row.name} could not be measured:[/] {failure}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted; everything was cleaned up")
        sys.exit(130)
    console.print(table_of(results))
    short = [result.row.name for result in results if result.verdict is Verdict.SHORT]
    console.print(
        f"{len(results)} measured, {len(short)} short of their target{': ' if short else ''}{', '.join(short)}"
    )
    if options.json:
        options.json.write_text(json.dumps(document_of(results), indent=1) + "\n")
    sys.exit(bool(failed or (short and options.strict)))


if __name__ == "__main__":
    main()
