"""Fuzzing: every format that the program reads gets mutated inputs; what breaks a rule is saved as a file.

The targets and the mutator are those of the tests (tests/fuzz), which run them for a short while.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.lab.failure import LabError
from tests.fuzz.campaign import Result, judge, run_apart
from tests.fuzz.registry import TARGETS


class FuzzSoak:
    """Shares its time among the targets, or runs one input that an earlier run saved."""

    about = "Mutated inputs to everything that is read from disk, store, socket and configuration."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How long, and what."""
        parser.add_argument(
            "--minutes", type=float, default=10, help="of processor time, for all targets together (default 10)"
        )
        parser.add_argument(
            "--target", action="append", choices=sorted(TARGETS), default=[], help="only this one (may be repeated)"
        )
        parser.add_argument("--replay", metavar="FILE", type=Path, help="only this saved input, of the one --target")

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Raises LabError when a rule is broken."""
        chosen = sorted(options.target or TARGETS)
        if options.replay is not None:
            return _replay(chosen, options.replay)
        return _fuzz(chosen, seed, duration_s=options.minutes * 60)


def _fuzz(chosen: Sequence[str], seed: int, *, duration_s: float) -> str:
    found = executions = 0
    for name in chosen:
        result = run_apart(TARGETS[name], seed, duration_s=duration_s / len(chosen))
        rate = result.executions / result.elapsed_s if result.elapsed_s else 0.0
        _say(
            f"{name:16} {result.executions:8} inputs, {rate:6.0f}/s, {result.accepted} accepted, {result.corpus} kept, "
            f"{len(result.findings)} findings"
        )
        found += len(result.findings)
        executions += result.executions
        _save(result)
    if found:
        raise LabError(f"fuzz, seed {seed}: {found} findings")
    return f"{executions} inputs, no rule is broken"


def _say(line: str) -> None:
    print(line, flush=True)


def _save(result: Result) -> None:
    if not result.findings:
        return
    folder = Path(tempfile.mkdtemp(prefix=f"vmfs-stub-fuzz-{result.target}-"))
    for number, finding in enumerate(result.findings):
        path = folder / str(number)
        path.write_bytes(finding.data)
        _say(f"  {finding.signature}\n    {finding.detail.strip().splitlines()[-1]}")
        _say(f"    again: scripts/soak fuzz --target {result.target} --replay {path}")


def _replay(chosen: Sequence[str], path: Path) -> str:
    """Run one input in this process, so that a debugger can look on."""
    if len(chosen) != 1:
        raise LabError("name the one --target that the input is for")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise LabError(f"{path}: {exc.strerror}") from exc
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[chosen[0]](Path(folder))
        try:
            target.seeds()
            _, _, finding = judge(target, data)
        finally:
            target.close()
    if finding is not None:
        raise LabError(f"{finding.signature}\n{finding.detail}")
    return f"{path}: no rule is broken"
