"""Plays from many seeds on all cores: random lives of a datastore, and hosts that share a store.

They are those of the tests (tests/model and tests/collection), which play a few seeds; without daemon or mount.  Where
a play can have a real store, the command line says which.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial

from scripts.lab.failure import LabError
from scripts.lab.soak_stores import add_store, store_place

SEEDS = 1_000
"""How many are played unless told."""
_REPORT_INTERVAL_S = 30.0
_PER_CORE = 2
"""Processes: a play often waits, for a store that is away or a thread."""
_AHEAD = 8
"""Plays that wait for a process, so that none is idle."""


Play = Callable[[int], object]


class SeedSoak:
    """Plays one seed after the other, and says at the end in which of them something was wrong.

    With ``has_place`` a play takes the store's place as a keyword.
    """

    def __init__(self, name: str, play: Callable[..., object], *, about: str, has_place: bool = False) -> None:
        self.about = about
        self._name = name
        self._play = play
        self._has_place = has_place

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How much."""
        parser.add_argument(
            "--seeds", type=int, default=SEEDS, help=f"how many seeds, from --seed on (default {SEEDS})"
        )
        if self._has_place:
            add_store(parser)

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Raises LabError naming the seeds in which something was wrong."""
        if self._has_place:
            with store_place(options) as place:
                play_seeds(self._name, partial(self._play, place=place), seed, options.seeds)
        else:
            play_seeds(self._name, self._play, seed, options.seeds)
        return f"{options.seeds} seeds from it on, nothing was wrong"


def play_seeds(name: str, play: Play, seed: int, seeds: int, *, say: Callable[[str], None] = print) -> None:
    """Play ``seeds`` seeds from ``seed`` on.  Raises LabError naming those in which something was wrong."""
    started_s = reported_s = time.monotonic()
    wrong = []
    for done, (played, problem) in enumerate(_played(play, range(seed, seed + seeds)), start=1):
        if problem:
            wrong.append(played)
            say(f"{name}: seed {played}:\n{problem}")
        if time.monotonic() - reported_s >= _REPORT_INTERVAL_S or done == seeds:
            reported_s = time.monotonic()
            rate = done / (reported_s - started_s)
            say(f"{name}: {done} of {seeds} seeds, {rate:.1f} a second, {len(wrong)} with something wrong")
    if wrong:
        raise LabError(f"{len(wrong)} of {seeds} seeds show something wrong: {' '.join(map(str, sorted(wrong)))}")


def _played(play: Play, seeds: range) -> Iterator[tuple[int, str]]:
    """Each seed with what was wrong in it, or nothing, in the order in which they end."""
    count = _PER_CORE * (os.cpu_count() or 1)
    left = iter(seeds)
    # Not forked: a process that has threads does not survive that for certain.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as executor:
        running: dict[Future[str], int] = {}
        while True:
            while len(running) < count + _AHEAD and (seed := next(left, None)) is not None:
                running[executor.submit(_problem, play, seed)] = seed
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _problem(play: Play, seed: int) -> str:
    """In a process of its own; empty when nothing was wrong."""
    logging.disable(logging.CRITICAL)
    try:
        play(seed)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a kill that was planted and went astray is one
        return "".join(traceback.format_exception(exc))
    return ""
