"""Fuzzing: every format that the program reads gets mutated inputs; what breaks a rule is saved as a file.

The targets and the mutator are those of the tests (tests/fuzz), which run them for a short while.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.lab.failure import LabError
from tests.fuzz.campaign import Result, judge, run_apart
from tests.fuzz.registry import TARGETS

ABOUT = "Mutated inputs to everything that is read from disk, store, socket and configuration."


def names() -> list[str]:
    """All targets."""
    return sorted(TARGETS)


def fuzz(
    seed: int,
    *,
    duration_s: float,
    only: Sequence[str] = (),
    replayed: str | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Share ``duration_s`` among the targets, or run one saved input; raises LabError when a rule is broken."""
    unknown = sorted(set(only) - set(TARGETS))
    if unknown:
        raise LabError(f"no fuzz target is called {unknown[0]!r}; there are {', '.join(names())}")
    chosen = [name for name in names() if not only or name in only]
    if replayed is not None:
        _replay(chosen, Path(replayed), say)
        return
    found = 0
    for name in chosen:
        result = run_apart(TARGETS[name], seed, duration_s=duration_s / len(chosen))
        rate = result.executions / result.elapsed_s if result.elapsed_s else 0.0
        say(
            f"{name:16} {result.executions:8} inputs, {rate:6.0f}/s, {result.accepted} accepted, {result.corpus} kept, "
            f"{len(result.findings)} findings"
        )
        found += len(result.findings)
        _save(result, say)
    if found:
        raise LabError(f"fuzz, seed {seed}: {found} findings")


def _save(result: Result, say: Callable[[str], None]) -> None:
    if not result.findings:
        return
    folder = Path(tempfile.mkdtemp(prefix=f"vmfs-stub-fuzz-{result.target}-"))
    for number, finding in enumerate(result.findings):
        path = folder / str(number)
        path.write_bytes(finding.data)
        say(f"  {finding.signature}\n    {finding.detail.strip().splitlines()[-1]}")
        say(f"    again: scripts/soak fuzz --target {result.target} --replay {path}")


def _replay(chosen: Sequence[str], path: Path, say: Callable[[str], None]) -> None:
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
    say(f"{path}: no rule is broken")
