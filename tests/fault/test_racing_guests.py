"""Starting a VM while it is archived wins; `scripts/soak policy` plays a thousand such races."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
import trio

from tests.fault.racing_guests import NotRight, play
from vmfs_stub.services.stopped_guests import StoppedGuests

SEEDS = 60
SEEDS_FOR_A_FAULT = 200

Patch = pytest.MonkeyPatch


def test_a_start_during_an_archive_wins() -> None:
    met: Counter[tuple[str, bool]] = Counter()
    for seed in range(SEEDS):
        race = trio.run(play, seed)
        assert race.result is not None
        met[race.result.outcome, race.runs_first] += 1
    # Starts have come early enough to keep the VM from being archived, and too late for that.
    assert {("failed", True), ("backed up", False), ("archived", True), ("archived", False)} <= set(met), met


def never_started_again(patch: Patch) -> None:
    async def settle(self: StoppedGuests, *arguments: object, **options: object) -> None:
        pass

    patch.setattr(StoppedGuests, "_settle", settle)


def stops_whoever_runs(patch: Patch) -> None:
    class Everybody(frozenset[str]):
        def __contains__(self, uuid: object) -> bool:
            return True

    async def all_running(self: StoppedGuests) -> frozenset[str]:
        return Everybody()

    patch.setattr(StoppedGuests, "all_running", all_running)


@pytest.mark.parametrize("plant", [never_started_again, stops_whoever_runs])
def test_a_planted_mistake_is_found(monkeypatch: Patch, plant: Callable[[Patch], None]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        plant(monkeypatch)
        for seed in range(SEEDS_FOR_A_FAULT):
            try:
                trio.run(play, seed)
            except (NotRight, ExceptionGroup):
                return
        pytest.fail("not found")
    finally:
        logging.disable(logging.NOTSET)
