"""Every file and store call of every operation goes wrong, in every way: the VM is whole and the next try succeeds.

Here each site fails once, for good and with a kill, on primary also with the power, and gives wrong bytes if it gives
any; of its other ways it has one, and all have their turn; and so does, in some way, the first call from each place in
the source that one scenario alone reaches.  Scenarios and other calls within a site are sampled, and so are those at
which the hypervisor goes away.
`scripts/soak sites` makes all of them, which takes hours; with `--part K/N` several processors share them.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.fault import site_faults
from tests.fault.site_faults import BY_NAME, NotWhole, Spoiling, calls_of, run, spoilings
from tests.fault.spoilings import AWAY, PLACES
from tests.site_tags import Source, store_calls
from tests.sited_hypervisor import HYPERVISOR
from tests.unit.test_site_tags import EXEMPT

SITES_MIN = 120
"""Fewer would mean that the scenarios do not do what they say."""

ALWAYS = (("kill", False), ("error", False), ("error", True), ("wrong", False))
"""Ways, and whether for good, in which each site goes wrong that can; on primary the power goes as well."""
POWER = ("power", False)

LONE_MIN = 100
"""Fewer places that one scenario alone reaches would mean that places are not told apart."""

AWAY_PER_SCENARIO = 12
"""At so many calls beside its own questions the hypervisor goes away."""

Way = tuple[str, bool]
"""The kind of a spoiling, and whether it is for good."""


def lone_places() -> dict[str, list[tuple[str, int]]]:
    """By scenario the first calls, as site and number, from the places in the source that no other scenario reaches."""
    reaching = Counter(place for name in BY_NAME for place in calls_of(name).places)
    return {
        name: sorted(
            (site, number) for (site, place), number in calls_of(name).places.items() if reaching[site, place] == 1
        )
        for name in BY_NAME
    }


def sampled() -> dict[str, list[Spoiling]]:
    """By scenario, what goes wrong in it; the same in every run."""
    chosen = random.Random(7)
    possible = {name: list(spoilings(calls_of(name))) for name in BY_NAME}
    found = {name: _sampled_away(spoiled) for name, spoiled in possible.items()}
    sites: dict[str, dict[Way, list[tuple[str, Spoiling]]]] = {}
    for name, spoiled in possible.items():
        for spoiling in filter(_is_of_its_own, spoiled):
            way = spoiling.kind, spoiling.for_good
            sites.setdefault(spoiling.site, {}).setdefault(way, []).append((name, spoiling))
    taken: Counter[Way] = Counter()
    for site, ways in sorted(sites.items()):
        always = sorted(way for way in ways if _is_always(site, way))
        other = min(sorted(ways.keys() - set(always)), key=taken.__getitem__)
        taken[other] += 1
        for way in (*always, other):
            name, spoiling = chosen.choice(ways[way])
            found[name].add(spoiling)
    for name, calls in lone_places().items():
        for call in calls:
            if all((each.site, each.number) != call for each in found[name]):
                ways_of_it = [each for each in possible[name] if (each.site, each.number) == call]
                found[name].add(chosen.choice(list(filter(_is_of_its_own, ways_of_it))))
    for name, each in found.items():
        if not each:
            each.add(chosen.choice([spoiling for spoiling in possible[name] if _is_of_its_own(spoiling)]))
    return {name: sorted(each, key=str) for name, each in found.items()}


def _is_always(site: str, way: Way) -> bool:
    return way in ALWAYS or (way == POWER and not site.startswith(PLACES))


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
    sites = {site for name in BY_NAME for site in calls_of(name).counts}
    tags = set(Source(exempt=EXEMPT).tags)
    assert tags - sites == set(), "no scenario reaches these"
    of_files = {site for site in sites if not site.startswith((*PLACES, HYPERVISOR))}
    assert of_files - tags == set(), "the source does not have these"
    assert len(sites) > SITES_MIN


def test_the_scenarios_reach_every_call_on_the_store() -> None:
    places = {place for name in BY_NAME for site, place in calls_of(name).places if site.startswith(PLACES)}
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


def test_every_way_is_tried_and_the_plainest_at_every_site(samples: dict[str, list[Spoiling]]) -> None:
    tried = {(each.site, each.kind, each.for_good) for spoiled in samples.values() for each in spoiled}
    possible = {(each.site, each.kind, each.for_good) for name in BY_NAME for each in spoilings(calls_of(name))}
    assert tried <= possible
    assert {way[1:] for way in possible} == {way[1:] for way in tried}
    assert [(site, *way) for site, *way in possible - tried if _is_always(site, tuple(way))] == []
    assert {site for site, *way in tried if not _is_always(site, tuple(way))} == {site for site, *_ in possible}
    assert {name for name, spoiled in samples.items() if not spoiled} == set()


async def test_a_recall_that_gives_up_before_the_call_is_tried_with_more_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine that is busy with other things."""
    spoiling = Spoiling("changes.map", 2, "error", for_good=True)
    monkeypatch.setattr(site_faults, "GUEST_WAITS_S", (0.0,))
    with pytest.raises(NotWhole, match="no such call"):
        await run(BY_NAME["truncate"], spoiling)
    monkeypatch.setattr(site_faults, "GUEST_WAITS_S", (0.0, 10.0))
    await run(BY_NAME["truncate"], spoiling)
