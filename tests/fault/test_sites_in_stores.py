"""Calls on a real store go wrong: a directory, memory, Ceph's S3 gateway, and that behind troubles of its own.

One call in a scenario, another one for each store; `scripts/soak sites --store …` makes all of them.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio

from scripts.lab.s3_server import Bucket
from scripts.lab.s3_troubles import MET, expect_met
from tests.fault.site_faults import SCENARIOS, Scenario, Spoiling, calls_of, run, spoilings
from tests.store_places import PLACES, InBucket, Place

SAMPLE = 10


def run_one(scenario: Scenario, place: Place, chosen: random.Random) -> None:
    """A scenario with a call on its store that goes wrong; none where it makes none."""
    of_store = [each for each in spoilings(calls_of(scenario.name)) if each.site.startswith("store.")]
    spoiling: Spoiling | None = chosen.choice(of_store) if of_store else None
    try:
        trio.run(partial(run, scenario, spoiling, place=place, seed=chosen.randrange(1 << 32)))
    except BaseException as exc:
        exc.add_note(f"{scenario.name} {spoiling}")
        raise


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("name", ["file", "memory"])
def test_the_vm_is_whole(name: str, scenario: Scenario) -> None:
    run_one(scenario, PLACES[name], random.Random(f"{name} {scenario.name}"))


@pytest.mark.parametrize("scenario", random.Random(1).sample(SCENARIOS, SAMPLE), ids=lambda scenario: scenario.name)
def test_the_vm_is_whole_with_s3(scenario: Scenario, bucket: Bucket) -> None:
    run_one(scenario, InBucket(bucket), random.Random(scenario.name))


@pytest.mark.timeout(900)
def test_the_vm_is_whole_with_s3_behind_troubles(bucket: Bucket) -> None:
    """As many scenarios as it takes to meet every kind of trouble, and some more."""
    place, chosen, wanted = InBucket(bucket, troubled=True), random.Random(2), (*MET, "listed late")
    for number, scenario in enumerate(chosen.sample(SCENARIOS, len(SCENARIOS))):
        if number >= SAMPLE and all(place.met[kind] for kind in wanted):
            return
        run_one(scenario, place, chosen)
    expect_met(place.met, wanted)
