"""What `status` tells of recalls is how things are: a failure is a finding until it is over, and no longer."""

from __future__ import annotations

import random

import pytest

from tests.datastore_harness import CHUNK, Rig, Services, temporary_rig
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptFrame, PrimaryIOError, StoreUnavailable, VmfsStubError
from vmfs_stub.services.findings import Findings
from vmfs_stub.store.keys import pack_key

DISK = "vm/disk.img"
LABEL = "VM vm, disk vm/disk.img"
CONTENT = random.Random(3).randbytes(4 * CHUNK)


def found(services: Services) -> list[type[VmfsStubError]]:
    return [type(finding.error) for finding in services.findings.all()]


async def archived(rig: Rig) -> list[FrameRef]:
    """The frames of the disk, now a placeholder."""
    rig.make_disk(DISK, CONTENT)
    async with rig.running() as services:
        await services.archive("vm")
    ((vm_id, _),) = [(vm.vm_id, vm.name) for vm in rig.store.vms()]
    point = rig.store.open_point(vm_id, rig.store.points(vm_id)[-1].point_id)
    return [ref for ref in point.chunks(0).locate(0, 4) if ref is not None]


def flip(rig: Rig, ref: FrameRef) -> None:
    """Damage a frame in the store, or mend it."""
    key = pack_key(ref.pack_id)
    content = bytearray(rig.objects.contents[key])
    content[ref.offset + ref.length - 1] ^= 1
    rig.objects.contents[key] = bytes(content)


async def test_damage_is_a_finding_until_the_damaged_chunk_itself_is_back() -> None:
    with temporary_rig() as rig:
        frames = await archived(rig)
        flip(rig, frames[1])
        flip(rig, frames[3])
        async with rig.running() as services:
            disk = await services.open(DISK)
            for chunk in (1, 3):
                with pytest.raises(CorruptFrame):
                    await disk.read(chunk * CHUNK, 1)
            assert await disk.read(0, CHUNK) == CONTENT[:CHUNK]
            assert found(services) == [CorruptFrame]
            flip(rig, frames[1])
            assert await disk.read(CHUNK, CHUNK) == CONTENT[CHUNK : 2 * CHUNK]
            assert found(services) == [CorruptFrame]
            flip(rig, frames[3])
            assert await disk.read(3 * CHUNK, CHUNK) == CONTENT[3 * CHUNK :]
            assert found(services) == []
            await services.disks.release(disk)


async def test_a_store_that_was_away_is_a_finding_until_it_answers() -> None:
    with temporary_rig() as rig:
        await archived(rig)

        def away(call: str, key: str) -> None:
            if call == "get_range":
                raise StoreUnavailable(key)

        async with rig.running() as services:
            disk = await services.open(DISK)
            assert disk.placeholder is not None
            rig.objects.before = away
            with pytest.raises(StoreUnavailable):
                await services.recall.recall_chunks(disk.placeholder, [0], demand=False)
            assert found(services) == [StoreUnavailable]
            rig.objects.before = lambda call, key: None
            assert await disk.read(CHUNK, CHUNK) == CONTENT[CHUNK : 2 * CHUNK]
            assert found(services) == []
            await services.disks.release(disk)


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_disk_that_is_gone_has_no_failed_recalls(is_open: bool) -> None:
    with temporary_rig() as rig:
        frames = await archived(rig)
        flip(rig, frames[0])
        async with rig.running() as services:
            disk = await services.open(DISK)
            with pytest.raises(CorruptFrame):
                await disk.read(0, 1)
            if not is_open:
                await services.disks.release(disk)
            with rig.path_fd(DISK) as path_fd:
                await services.disks.removing(path_fd)
                (rig.backing / DISK).unlink()
                await services.disks.removed(path_fd)
            if is_open:
                await services.disks.release(disk)
            assert found(services) == []


def test_what_was_found_at_the_start_stays() -> None:
    findings = Findings()
    findings.add(LABEL, PrimaryIOError("at the start"))
    findings.add(LABEL, PrimaryIOError("a recall"), stays=False)
    findings.settle(LABEL, PrimaryIOError)
    assert [str(finding.error) for finding in findings.all()] == ["at the start"]
    findings.settle(LABEL, CorruptFrame)
    assert len(findings.all()) == 1
