"""Soaks that take one random step after another in a datastore, and compare every byte that they read with a model."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol, Self

from scripts.lab.datastore import Datastore, Settings, temporary_datastore
from scripts.lab.failure import LabError

Step = Callable[[], str]
"""Does one thing and says what it was; raises LabError when something is not as it should be."""

_REPORT_INTERVAL_S = 30.0


class Stepping(AbstractContextManager["Stepping"], Protocol):
    """What takes the steps; its docstring's first line says what they are."""

    settings: ClassVar[Settings]

    def __init__(self, datastore: Datastore, chance: random.Random) -> None: ...

    def __enter__(self) -> Self: ...

    def step(self) -> str:
        """One random thing; raises LabError when a byte is wrong."""

    def verify_all(self) -> None:
        """Compare everything, at the end."""

    def summary(self) -> str:
        """What was done."""


class StepSoak:
    """A soak of such steps, for a while or for a number of them."""

    def __init__(self, name: str, kind: type[Stepping]) -> None:
        self.about = (kind.__doc__ or "").splitlines()[0]
        self._name = name
        self._kind = kind

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How long."""
        length = parser.add_mutually_exclusive_group()
        length.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
        length.add_argument("--operations", type=int, help="how many steps instead, however long they take")

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Take the steps; raises LabError naming the seed and step that failed."""
        by_count = options.operations is not None
        with (
            temporary_datastore(self._kind.settings) as datastore,
            self._kind(datastore, random.Random(seed)) as running,
        ):
            steps = run_steps(
                self._name,
                running.step,
                seed=seed,
                duration_s=math.inf if by_count else options.minutes * 60,
                steps_max=options.operations if by_count else math.inf,
            )
            running.verify_all()
            return f"{steps} steps, every byte as it should be\n{running.summary()}"


def run_steps(
    name: str,
    step: Step,
    *,
    seed: int,
    duration_s: float = math.inf,
    steps_max: float = math.inf,
    say: Callable[[str], None] = print,
) -> int:
    """Take steps for ``duration_s``, but no more than ``steps_max``; returns how many.

    Raises LabError naming the seed and step that failed.
    """
    started_s = reported_s = time.monotonic()
    done, what = 0, "nothing yet"
    while time.monotonic() - started_s < duration_s and done < steps_max:
        try:
            what = step()
        except (LabError, OSError) as exc:
            raise LabError(f"soak {name}, seed {seed}, step {done} (after {what!r}): {exc}") from exc
        done += 1
        if time.monotonic() - reported_s >= _REPORT_INTERVAL_S:
            reported_s = time.monotonic()
            say(f"{name}: {done} steps in {reported_s - started_s:.0f} s; the last: {what}")
    return done
