"""Every file and store call of every operation goes wrong, in every way: the VM is whole and the next try succeeds.

Here each site goes wrong in every way in one scenario, and in some way in a few of those that reach it, and so does
the first call from each place in the source that one scenario alone reaches; other calls of a site are sampled, and so
are those at which the hypervisor goes away.  `scripts/soak sites` makes all of them, which takes half an hour at least.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from tests.fault.site_faults import BY_NAME, SCENARIOS, Calls, Spoiling, run, spoilings
from tests.fault.spoilings import AWAY, PLACES
from tests.site_tags import Source, store_calls
from tests.sited_hypervisor import HYPERVISOR
from tests.unit.test_site_tags import EXEMPT

SITES_MIN = 120
"""Fewer would mean that the scenarios do not do what they say."""

LONE_MIN = 100
"""Fewer places that one scenario alone reaches would mean that places are not told apart."""

SCENARIOS_PER_SITE = 3

AWAY_PER_SCENARIO = 12
"""At so many calls beside its own questions the hypervisor goes away."""

REACHED: dict[str, Calls] = {}


def reached() -> dict[str, Calls]:
    """What each scenario calls when nothing goes wrong; found out once."""
    if not REACHED:

        async def look() -> None:
            for scenario in SCENARIOS:
                REACHED[scenario.name] = await run(scenario, None)

        trio.run(look)
    return REACHED


def lone_places() -> dict[str, list[tuple[str, int]]]:
    """By scenario the first calls, as site and number, from the places in the source that no other scenario reaches."""
    reaching = Counter(place for calls in reached().values() for place in calls.places)
    return {
        name: sorted((site, number) for (site, place), number in calls.places.items() if reaching[site, place] == 1)
        for name, calls in reached().items()
    }


def sampled() -> dict[str, list[Spoiling]]:
    """By scenario, what goes wrong in it; the same in every run."""
    chosen = random.Random(7)
    possible = {name: list(spoilings(calls)) for name, calls in reached().items()}
    everything = {name: [each for each in spoiled if _is_of_its_own(each)] for name, spoiled in possible.items()}
    found = {name: _sampled_away(spoiled) for name, spoiled in possible.items()}
    sites: dict[str, dict[str, list[Spoiling]]] = {}
    ways: dict[tuple[str, str, bool], list[tuple[str, Spoiling]]] = {}
    for name, of_its_own in everything.items():
        by_site: dict[str, list[Spoiling]] = {}
        for spoiling in of_its_own:
            by_site.setdefault(spoiling.site, []).append(spoiling)
            ways.setdefault((spoiling.site, spoiling.kind, spoiling.for_good), []).append((name, spoiling))
        sites[name] = by_site
    for site in sorted({site for by_site in sites.values() for site in by_site}):
        reaching = [name for name, by_site in sites.items() if site in by_site]
        for name in chosen.sample(reaching, min(len(reaching), SCENARIOS_PER_SITE)):
            found[name].add(chosen.choice(sites[name][site]))
    for choices in ways.values():
        name, spoiling = chosen.choice(choices)
        found[name].add(spoiling)
    for name, calls in lone_places().items():
        for site, number in calls:
            if all((each.site, each.number) != (site, number) for each in found[name]):
                found[name].add(chosen.choice([each for each in sites[name][site] if each.number == number]))
    for name, each in found.items():
        if not each:
            each.add(chosen.choice(everything[name]))
    return {name: sorted(each, key=str) for name, each in found.items()}


def _is_of_its_own(spoiling: Spoiling) -> bool:
    """Whether it is a way in which the call itself goes wrong, and not the hypervisor at the time."""
    return spoiling.kind != AWAY or spoiling.site.startswith(HYPERVISOR)


def _sampled_away(spoiled: list[Spoiling]) -> set[Spoiling]:
    away = [each for each in spoiled if not _is_of_its_own(each)]
    return set(random.Random(8).sample(away, min(len(away), AWAY_PER_SCENARIO)))


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Spoiling]]:
    return sampled()


@pytest.mark.parametrize("name", BY_NAME)
async def test_the_vm_is_whole_whatever_call_goes_wrong(name: str, samples: dict[str, list[Spoiling]]) -> None:
    failed = []
    for spoiling in samples[name]:
        try:
            await run(BY_NAME[name], spoiling)
        except (Exception, BaseExceptionGroup) as exc:
            failed.append(f"{name} {spoiling}: {exc!r}")
    assert not failed, "\n".join(failed)


def test_the_scenarios_reach_every_site_in_the_source() -> None:
    sites = {site for calls in reached().values() for site in calls.counts}
    tags = set(Source(exempt=EXEMPT).tags)
    assert tags - sites == set(), "no scenario reaches these"
    of_files = {site for site in sites if not site.startswith((*PLACES, HYPERVISOR))}
    assert of_files - tags == set(), "the source does not have these"
    assert len(sites) > SITES_MIN


def test_the_scenarios_reach_every_call_on_the_store() -> None:
    places = {place for calls in reached().values() for site, place in calls.places if site.startswith(PLACES)}
    calls = store_calls()
    assert len(calls) > 20
    missing = [
        f"{path}:{first}"
        for path, first, last in calls
        if not places.intersection(f"{path}:{line}" for line in range(first, last + 1))
    ]
    assert missing == []


def test_what_one_scenario_alone_reaches_is_tried(samples: dict[str, list[Spoiling]]) -> None:
    lone = {(name, *call) for name, calls in lone_places().items() for call in calls}
    assert len(lone) > LONE_MIN
    assert lone - {(name, each.site, each.number) for name, spoiled in samples.items() for each in spoiled} == set()


def test_every_way_is_tried_at_every_site(samples: dict[str, list[Spoiling]]) -> None:
    tried = {(each.site, each.kind, each.for_good) for spoiled in samples.values() for each in spoiled}
    possible = {(each.site, each.kind, each.for_good) for calls in reached().values() for each in spoilings(calls)}
    assert tried <= possible
    assert {(site, kind) for site, kind, _ in possible - tried if kind != AWAY or site.startswith(HYPERVISOR)} == set()
    assert {name for name, spoiled in samples.items() if not spoiled} == set()
