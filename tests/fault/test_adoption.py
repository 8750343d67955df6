"""A VM that a killed daemon had moved to its place stays there, or never was there: also when the power goes later."""

from __future__ import annotations

import random

import pytest

from tests.datastore_harness import BLOCK, Killed, Rig, RigFiles, survives_kill, temporary_rig
from tests.fault.scenarios import DISK, adopt, contents_of, first_contents, lost, make_vm

LAST_SYNC = 4
"""That of the backing directory, after the one placeholder, the VM's directory, and the folder that it was made in."""


async def killed_after_the_move(rig: Rig) -> None:
    make_vm(rig)
    await lost(rig)
    files = RigFiles(rig.medium)
    files.fail("adopt.sync", LAST_SYNC, Killed())
    with survives_kill():
        async with rig.running(files=files) as services:
            await adopt(services)
    assert files.dead
    assert (rig.backing / DISK).exists()


@pytest.mark.parametrize("seed", range(6))
async def test_what_the_next_start_has_found_outlives_a_power_loss(seed: int) -> None:
    """The move was in memory only, and what the start noted of it on the medium."""
    with temporary_rig(head=BLOCK) as rig:
        rig.inline = True
        await killed_after_the_move(rig)
        async with rig.running() as services:
            assert services.recovered.findings == []
        rig.lose_power(random.Random(seed))
        async with rig.running() as services:
            assert services.recovered.findings == []
            assert await contents_of(services, DISK) == first_contents()[DISK]


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_loss_leaves_all_or_nothing(seed: int) -> None:
    with temporary_rig(head=BLOCK) as rig:
        rig.inline = True
        await killed_after_the_move(rig)
        rig.lose_power(random.Random(seed))
        async with rig.running() as services:
            assert services.recovered.findings == []
            if not (rig.backing / "vm").exists():
                assert (rig.maps(), rig.pins()) == ([], [])
            await adopt(services)
            assert await contents_of(services, DISK) == first_contents()[DISK]
