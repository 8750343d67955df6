"""Sites: every file and store call of every operation goes wrong in every way, and the VM is whole afterwards.

The scenarios are those of the tests (tests/fault), which take a sample; here all calls of each site are spoiled, in the
order of the seed, without daemon or mount.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import trio

from scripts.lab.failure import LabError
from scripts.lab.soak_steps import run_steps
from scripts.lab.soak_stores import add_store, store_place
from tests.fault.site_faults import SCENARIOS, Scenario, Spoiling, run, spoilings
from tests.store_places import Place


class SiteSoak:
    """Spoils one call after another, each in a datastore of its own, until all of them were."""

    about = "Every file and store call goes wrong, one at a time, in all ways and all operations."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How long."""
        length = parser.add_mutually_exclusive_group()
        length.add_argument(
            "--minutes", type=float, default=math.inf, help="stop after so long (default: when all calls were spoiled)"
        )
        length.add_argument("--operations", type=int, help="spoil so many calls instead, however long they take")
        parser.add_argument(
            "--part", type=_part, default=(1, 1), metavar="K/N", help="only the K-th of N parts of a seed's calls"
        )
        parser.add_argument(
            "--scenario", action="append", choices=[scenario.name for scenario in SCENARIOS], help="only this one"
        )
        add_store(parser)

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Raises LabError when the VM is not whole afterwards, naming the call and how it went wrong."""
        with _without_log(), store_place(options) as place:
            waiting = _everything(options.scenario)
            random.Random(seed).shuffle(waiting)
            part, parts = options.part
            waiting = waiting[part - 1 :: parts]
            everything = len(waiting)
            done = run_steps(
                "sites",
                lambda: _spoil(*waiting.pop(), place, seed),
                seed=seed,
                duration_s=options.minutes * 60,
                steps_max=everything if options.operations is None else min(options.operations, everything),
            )
        return f"{done} of {everything} calls went wrong, the VM was whole after each"


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N, with K from 1 to N")
    return int(part), int(parts)


def _everything(names: Collection[str] | None) -> list[tuple[Scenario, Spoiling]]:
    """All ways in which these scenarios (None: all) can be spoiled, found by running each once."""
    return [
        (scenario, spoiling)
        for scenario in SCENARIOS
        if names is None or scenario.name in names
        for spoiling in spoilings(trio.run(run, scenario, None), every=True)
    ]


def _spoil(scenario: Scenario, spoiling: Spoiling, place: Place, seed: int) -> str:
    try:
        trio.run(partial(run, scenario, spoiling, place=place, seed=seed))
    except (Exception, BaseExceptionGroup) as exc:
        raise LabError(f"{scenario.name} {spoiling}: {exc!r}") from exc
    return f"{scenario.name} {spoiling}"


@contextmanager
def _without_log() -> Iterator[None]:
    """What goes wrong on purpose is not worth a line each."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
