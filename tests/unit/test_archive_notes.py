"""Notes in domains' metadata follow what is archived, whatever was missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from fake_hypervisor import FakeHypervisor, domain
from primary_samples import IDENTITY, POINT, STORE
from trio.testing import MockClock

from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.ids import PlaceholderId, VmId
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.vm import Scan, Vm, VmFile
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.services.archive_notes import ArchiveNotes
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.domains import link
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex
from vmfs_stub.services.threads import Threads

MOUNT = Path("/mnt/images")
ARCHIVED_S = 1_700_000_000


def vm(name: str, ino: int) -> Vm:
    return Vm(VmId(f"{ino:032x}"), name, name, True, (VmFile(f"{name}/disk.raw", "disk.raw", 10 << 20, ino),))


class InlineThreads:
    """Runs everything at once."""

    async def files(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args, **kwargs)


class World:
    """VMs web and db, with a domain each, and what is archived of them."""

    def __init__(self, *others: Domain) -> None:
        self.vms = [vm("web", 1), vm("db", 2)]
        named = [domain(each.name, MOUNT / each.name / "disk.raw") for each in self.vms]
        self.hypervisor = FakeHypervisor(*named, *others)
        self.placeholders = PlaceholderIndex()
        self.scans = 0
        self.notes = ArchiveNotes(
            hypervisor=self.hypervisor,
            scan=self.scan,
            placeholders=self.placeholders,
            link=partial(link, paths=DatastorePaths(files=PLAIN, backing=Path("/nowhere"), mountpoint=MOUNT)),
            threads=cast("Threads", InlineThreads()),
            datastore="vms",
            expected_s=lambda vm: 12.5,
        )

    async def scan(self) -> Scan:
        self.scans += 1
        return Scan(tuple(self.vms))

    def archive(self, ino: int, *, at_s: int = ARCHIVED_S) -> None:
        record = PlaceholderRecord(
            placeholder_id=PlaceholderId(f"{at_s:031x}{ino}"),
            store_id=STORE,
            vm_id=VmId(f"{ino:032x}"),
            point_id=POINT,
            file_index=0,
            size=10 << 20,
            mtime_ns=1,
            archived_ns=at_s * 10**9 + 5,
            filesystem=IDENTITY.filesystem,
            ino=ino,
            generation=1,
        )
        self.placeholders.add(ino, KnownPlaceholder(record, "disk", 0))

    def note(self, name: str) -> ArchiveNote | None:
        (found,) = (each for each in self.hypervisor.known.values() if each.name == name)
        return found.note

    def written(self) -> int:
        return sum(asked.startswith("note of") for asked in self.hypervisor.asked)


NOTE = ArchiveNote(float(ARCHIVED_S), 10 << 20, 12.5, "vms")


async def test_what_is_archived_is_noted_once_and_what_is_back_is_not() -> None:
    world = World()
    world.archive(1)
    await world.notes.reconcile()
    assert (world.note("web"), world.note("db"), world.written()) == (NOTE, None, 1)
    await world.notes.reconcile()
    assert world.written() == 1
    world.archive(1, at_s=ARCHIVED_S + 60)
    await world.notes.reconcile()
    found = world.note("web")
    assert found is not None
    assert found.archived_s == ARCHIVED_S + 60
    world.placeholders.remove(1)
    await world.notes.reconcile()
    assert world.note("web") is None


async def test_a_damaged_placeholder_is_not_counted() -> None:
    world = World()
    world.placeholders.add(1, KnownPlaceholder(None, "disk", 0, HypervisorAway("damaged")))
    await world.notes.reconcile()
    assert world.written() == 0


async def test_the_note_of_another_datastore_is_left_alone() -> None:
    theirs = ArchiveNote(1.0, 2, 3.0, "theirs")
    world = World()
    for each in list(world.hypervisor.known.values()):
        world.hypervisor.put(each.uuid, note=theirs)
    world.archive(1)
    await world.notes.reconcile()
    assert (world.note("web"), world.note("db"), world.written()) == (theirs, theirs, 0)


async def test_a_domain_whose_disk_went_elsewhere_loses_its_note() -> None:
    world = World(domain("moved", Path("/elsewhere/disk.raw")))
    (moved,) = (each for each in world.hypervisor.known.values() if each.name == "moved")
    world.hypervisor.put(moved.uuid, note=NOTE)
    await world.notes.reconcile()
    assert world.note("moved") is None


async def test_who_only_is_based_on_what_is_archived_is_not() -> None:
    """Its own disk is resident, so that its start waits for what it reads of the base alone."""
    overlay = domain("overlay", MOUNT / "overlay/disk.qcow2")
    world = World(replace(overlay, disks=(replace(overlay.disks[0], backing=(MOUNT / "web/disk.raw",)),)))
    world.vms.append(vm("overlay", 3))
    world.archive(1)
    await world.notes.reconcile()
    assert (world.note("web"), world.note("overlay")) == (NOTE, None)


async def test_one_domain_that_refuses_keeps_no_other_from_being_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.archive(1)
    world.archive(2)
    set_note = world.hypervisor.set_note

    async def refusing(uuid: str, note: ArchiveNote | None) -> None:
        if world.hypervisor.known[uuid].name == "web":
            raise HypervisorAway("transient domain")
        await set_note(uuid, note)

    monkeypatch.setattr(world.hypervisor, "set_note", refusing)
    await world.notes.reconcile()
    assert (world.note("web"), world.note("db")) == (None, NOTE)


async def test_without_domains_nothing_is_scanned() -> None:
    world = World()
    world.hypervisor.known.clear()
    await world.notes.reconcile()
    assert world.scans == 0


async def test_it_follows_placeholders_and_domains_by_itself(autojump_clock: MockClock) -> None:
    world = World()

    async def within(seconds: float, condition: Callable[[], bool]) -> None:
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - time is simulated
                await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.notes.run)
        await trio.sleep(30)
        assert world.scans == 1  # nothing happened
        world.archive(1)
        await within(6, lambda: world.note("web") == NOTE)
        world.placeholders.remove(1)
        await within(6, lambda: world.note("web") is None)
        world.archive(2)
        world.hypervisor.away = True
        await trio.sleep(60)
        world.hypervisor.away = False
        world.hypervisor.change()
        await within(6, lambda: world.note("db") == NOTE)
        (db,) = (each for each in world.hypervisor.known.values() if each.name == "db")
        world.hypervisor.put(db.uuid, name="renamed", state=GuestState.OFF)
        await trio.sleep(30)
        assert world.note("renamed") == NOTE
        world.hypervisor.put(db.uuid, note=None)  # defined anew
        await within(6, lambda: world.note("renamed") == NOTE)
        scans = world.scans
        await trio.sleep(1000)
        assert scans < world.scans <= scans + 4  # and now and then
        nursery.cancel_scope.cancel()
