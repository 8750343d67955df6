"""With two copies asked for, nothing is released before the second one was read back; a backup needs only the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio

from tests.datastore_harness import Rig, Services, temporary_rig
from tests.fault.scenarios import DISK, first_contents, make_vm
from tests.fault.site_faults import BY_NAME, NotWhole, Spoiling, run
from tests.store_points import KEY_SOURCE
from vmfs_stub.core.errors import Abandoned, CorruptPack, ObjectMissing, StoreFull, StoreUnavailable, VmfsStubError
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.archive import Archiver
from vmfs_stub.services.backup_report import BackupReport
from vmfs_stub.services.verify import verify
from vmfs_stub.store.keys import MANIFESTS, PACKS, SEGMENTS
from vmfs_stub.store.store import Store


@pytest.fixture(params=[None, KEY_SOURCE], ids=["plain", "encrypted"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with temporary_rig(source=request.param) as made:
        make_vm(made)
        made.add_replica()
        yield made


def there(rig: Rig) -> Store:
    replica = rig.replica()
    assert replica is not None
    return replica


def fail_replica(rig: Rig, call: str, kind: str, error: VmfsStubError) -> None:
    def fail(done: str, key: str) -> None:
        if done == call and key.startswith(kind):
            raise error

    assert rig.replica_objects is not None
    rig.replica_objects.before = fail


def repair_replica(rig: Rig) -> None:
    assert rig.replica_objects is not None
    rig.replica_objects.before = lambda call, key: None


async def test_what_is_released_is_in_the_replica(rig: Rig) -> None:
    async with rig.running() as services:
        report = await services.archive("vm")
        assert len(report.placeholders) == 2
        assert verify(there(rig)).findings == ()
        assert {point.point_id for vm in there(rig).vms() for point in vm.points} == {report.point_id}
        assert rig.replica_objects is not None
        assert not [key for key in rig.replica_objects.contents if key.startswith(("pins/", "leases/", "index/"))]


@pytest.mark.parametrize(
    ("call", "kind", "error"),
    [
        ("get", "vmfs-store.json", StoreUnavailable("away")),
        ("get", "vmfs-store.json", ObjectMissing("not mounted")),
        ("put", PACKS, StoreFull("full")),
        ("get", PACKS, StoreUnavailable("away")),
        ("size", SEGMENTS, StoreUnavailable("away")),
        ("put", SEGMENTS, StoreUnavailable("away")),
        ("get", SEGMENTS, StoreUnavailable("away")),
        ("put", MANIFESTS, StoreUnavailable("away")),
        ("get", MANIFESTS, StoreUnavailable("away")),
    ],
)
async def test_without_a_second_copy_nothing_is_released(rig: Rig, call: str, kind: str, error: VmfsStubError) -> None:
    fail_replica(rig, call, kind, error)
    async with rig.running() as services:
        kind_raised = StoreUnavailable if isinstance(error, ObjectMissing) else type(error)
        with pytest.raises(kind_raised, match="was made, and nothing released") as failed:
            await services.archive("vm")
        (vm,) = rig.store.vms()
        (point,) = vm.points
        assert point.point_id in str(failed.value)
        assert not rig.is_placeholder(DISK)
        assert (rig.backing / DISK).read_bytes() == first_contents()[DISK]
        assert (rig.pins(), rig.maps()) == ([], [])
        repair_replica(rig)
        packs = [key for key in rig.objects.contents if key.startswith(PACKS)]
        report = await services.archive("vm")
        assert rig.is_placeholder(DISK)
        assert [key for key in rig.objects.contents if key.startswith(PACKS)] == packs
        assert verify(there(rig), vm_id=vm.vm_id, point_id=report.point_id).findings == ()


async def test_a_replica_that_spoils_what_is_put_releases_nothing(rig: Rig) -> None:
    objects = rig.replica_objects
    assert objects is not None
    put = objects.put

    def spoil(key: str, data: bytes, *, if_absent: bool = True) -> None:
        put(key, data[:-1] + b"?" if key.startswith(PACKS) else data, if_absent=if_absent)

    objects.put = spoil  # type: ignore[method-assign,assignment]
    async with rig.running() as services:
        with pytest.raises(CorruptPack, match="nothing released"):
            await services.archive("vm")
        assert not rig.is_placeholder(DISK)


async def test_a_backup_needs_no_second_copy(rig: Rig) -> None:
    fail_replica(rig, "get", "", StoreUnavailable("away"))
    async with rig.running() as services:
        await services.archive("vm", archive=False)
    assert len(rig.store.vms()) == 1


async def test_an_open_during_the_second_copy_wins(rig: Rig) -> None:
    async with rig.running() as services:
        copying, go_on = trio.Event(), trio.Event()
        mover = services.archiver._mover
        replicate = mover.replicate

        async def slow(*args: object) -> None:
            copying.set()
            await go_on.wait()
            await replicate(*args)  # type: ignore[arg-type]

        mover.replicate = slow  # type: ignore[method-assign,assignment]
        async with trio.open_nursery() as nursery:

            async def archive() -> None:
                with pytest.raises(Abandoned):
                    await services.archive("vm")

            nursery.start_soon(archive)
            await copying.wait()
            with trio.fail_after(10):
                disk = await services.open(DISK)
            assert bytes(await disk.read(0, 100)) == first_contents()[DISK][:100]
            await services.disks.release(disk)
        assert not rig.is_placeholder(DISK)
        assert (rig.pins(), rig.maps()) == ([], [])


async def test_guests_read_on_without_the_store(rig: Rig) -> None:
    async with rig.running() as services:
        await services.archive("vm")
        disk = await services.open(DISK)
        await disk.read(0, 1)  # from then on the VM is claimed here
        await services.disks.release(disk)
        kept = dict(rig.objects.contents)
        rig.objects.contents.clear()
        assert await contents(services) == first_contents()[DISK]
        rig.objects.contents.update(kept)
        assert services.replicated is not None
        assert services.replicated.fallback.counts.reads > 0


async def test_the_sweep_finds_an_archive_that_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a planted mistake: the second copy may fail."""
    careful = Archiver._make_second_copy

    async def careless(self: Archiver, vm: Vm, report: BackupReport) -> None:
        with suppress(VmfsStubError):
            await careful(self, vm, report)

    spoiling = Spoiling("replica.segment.put", 1, "error", for_good=True)
    await run(BY_NAME["archive_twice"], spoiling)
    monkeypatch.setattr(Archiver, "_make_second_copy", careless)
    with pytest.raises(ExceptionGroup) as found:
        await run(BY_NAME["archive_twice"], spoiling)
    assert found.group_contains(NotWhole, match="without a second copy")


async def contents(services: Services) -> bytes:
    disk = await services.open(DISK)
    try:
        return bytes(await disk.read(0, disk.fstat().st_size))
    finally:
        await services.disks.release(disk)
