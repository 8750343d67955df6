"""Every file call of archive, recall, sync, graduation and start fails once, or is the last that the daemon makes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fault.site_faults import SCENARIOS, Scenario, Spoiling, run

CALLS_PER_SITE = int(os.environ.get("VMFS_STUB_FAULT_CALLS", "3"))
"""Of a site that is called more often: the first, the last and some between."""

ALLOCATING = ("archive.record", "map.create", "map.write", "recall.fill", "volatile.", "write.")
"""Sites where a filesystem can be full."""


@dataclass(frozen=True)
class How:
    """One way in which calls are spoiled."""

    name: str
    error: int = 0
    power: bool = False
    sites: tuple[str, ...] = ("",)


WAYS = [How("EIO", errno.EIO), How("ENOSPC", errno.ENOSPC, sites=ALLOCATING), How("kill"), How("power", power=True)]


def spoilings(counts: dict[str, int], how: How) -> Iterator[Spoiling]:
    for site, count in sorted(counts.items()):
        if site.startswith(how.sites):
            spread = {1 + number * (count - 1) // max(1, CALLS_PER_SITE - 1) for number in range(CALLS_PER_SITE)}
            for number in sorted(number for number in spread if number <= count):
                yield Spoiling(site, number, how.error, how.power)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.name)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_the_vm_is_whole_whatever_call_goes_wrong(scenario: Scenario, how: How) -> None:
    counts = await run(scenario, None)
    assert counts
    failed = []
    for spoiling in spoilings(counts, how):
        try:
            await run(scenario, spoiling)
        except (Exception, BaseExceptionGroup) as exc:
            failed.append(f"{spoiling}: {exc!r}")
    assert not failed, "\n".join(failed)
