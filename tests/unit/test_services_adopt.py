"""What is adopted, what is refused, and in which order it is done."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from tests.store_points import KEY_SOURCE, back_up, put_point
from vmfs_stub.core.errors import (
    AlreadyExists,
    ClaimedElsewhere,
    CorruptManifest,
    NoSpace,
    PointNotFound,
    Refused,
    StoreUnavailable,
    VmfsStubError,
    VmNotFound,
)
from vmfs_stub.core.ids import DatastoreId, PointId, VmId
from vmfs_stub.core.names import PRIVATE_DIR, VM_XATTR
from vmfs_stub.services.adoption import top_of
from vmfs_stub.services.adoption_choice import Told, chosen_point
from vmfs_stub.store.claims import Claim, ClaimState, newest_claim, put_claim
from vmfs_stub.store.keys import CLAIMS, FORGOTTEN, MANIFESTS, PINS, claim_key, forgotten_key, manifest_key
from vmfs_stub.store.manifest import FileKind, StoredFile
from vmfs_stub.store.points import PointSummary, StoredVm

VM, HERE, THERE = VmId("a" * 32), DatastoreId("1" * 32), DatastoreId("2" * 32)
NOW_S = 10 * 86400.0
NOTHING, BOTH = Told(), Told(force=True, accept_loss=True)
FORCE, LOSS = Told(force=True), Told(accept_loss=True)


def point(digit: str, *, day: int = 0, damaged: str | None = None) -> PointSummary:
    return PointSummary(VM, PointId(digit * 32), "web", day * 86400.0, "h", 1, 1, damaged=damaged)


OLD, NEW = point("b", day=1), point("c", day=7)
DAMAGED = point("d", damaged="checksum")
WEB = StoredVm(VM, "web", (OLD, NEW))
HELD = Claim(VM, 3, ClaimState.HELD, THERE, "host2", "images", 5 * 86400.0)
FREE = replace(HELD, state=ClaimState.FREE, point_id=OLD.point_id)


def choose(vm: StoredVm = WEB, named: str = "latest", claim: Claim | None = None, told: Told = NOTHING) -> PointSummary:
    return chosen_point(vm, named, claim, here=HERE, told=told, now_s=NOW_S)


@pytest.mark.parametrize(
    ("claim", "wanted"),
    [
        (None, NEW),
        (FREE, OLD),
        (replace(FREE, datastore_id=HERE), OLD),
        (replace(HELD, datastore_id=HERE), NEW),
    ],
    ids=["nobody's", "free", "free, and ours", "ours, and deleted here"],
)
def test_what_is_newest_is_adopted_without_being_told_to(claim: Claim | None, wanted: PointSummary) -> None:
    assert choose(claim=claim) == wanted
    assert choose(named=wanted.point_id[:8], claim=claim) == wanted


@pytest.mark.parametrize("told", [NOTHING, FORCE, LOSS])
def test_what_another_datastore_has_takes_both_flags(told: Told) -> None:
    with pytest.raises(ClaimedElsewhere) as caught:
        choose(claim=HELD, told=told)
    text = str(caught.value)
    assert "in datastore images (id 2222" in text
    assert "of host host2 since 1970-01-0" in text
    assert f"restore point {NEW.point_id} is 3 days old" in text
    assert ("--force" in text, "--accept-loss" in text) == (not told.force, not told.accept_loss)
    assert choose(claim=HELD, told=BOTH) == NEW
    assert choose(named=OLD.point_id, claim=HELD, told=BOTH) == OLD


@pytest.mark.parametrize(("claim", "named"), [(None, OLD), (FREE, NEW)], ids=["older", "newer than the claim's"])
def test_another_point_than_the_newest_takes_a_flag(claim: Claim | None, named: PointSummary) -> None:
    for told in (NOTHING, FORCE):
        with pytest.raises(Refused, match=r"is not its newest state, which is restore point .* --accept-loss goes"):
            choose(named=named.point_id, claim=claim, told=told)
    assert choose(named=named.point_id, claim=claim, told=LOSS) == named


def test_a_damaged_point_may_be_the_newest() -> None:
    vm = replace(WEB, points=(DAMAGED, OLD, NEW))
    with pytest.raises(CorruptManifest, match=r"d{32} of VM web may be the newest, .*\(checksum\); `VM@POINT`"):
        choose(vm)
    with pytest.raises(Refused, match="may not be its newest state"):
        choose(vm, NEW.point_id)
    assert choose(vm, NEW.point_id, told=LOSS) == NEW
    with pytest.raises(CorruptManifest, match="cannot be read: checksum"):
        choose(vm, DAMAGED.point_id, told=BOTH)
    assert choose(vm, claim=FREE) == OLD  # which is known to be it
    with pytest.raises(CorruptManifest, match=r"newest state of VM web is restore point d"):
        choose(vm, claim=replace(FREE, point_id=DAMAGED.point_id))
    with pytest.raises(PointNotFound, match=r"restore point e{32}, which is forgotten or gone"):
        choose(vm, claim=replace(FREE, point_id=PointId("e" * 32)))


# In a datastore

DISK, SMALL = "vm/disk.img", "vm/small"
CONTENT, LITTLE = random.Random(6).randbytes(3 * CHUNK + 5), b"small" * 100


@asynccontextmanager
async def another_host(**options: Any) -> AsyncIterator[Services]:
    """It has the store, in which a VM is that it never had, and that nobody has claimed."""
    with temporary_rig(**options) as rig:
        rig.settings = replace(rig.settings, placeholder_bytes_min=CHUNK)
        rig.make_disk(DISK, CONTENT)
        rig.make_disk(SMALL, LITTLE)
        async with rig.running() as services:
            await services.archive("vm", archive=False)
        for key in [key for key in rig.objects.contents if key.startswith(CLAIMS)]:
            del rig.objects.contents[key]
        rig.lose_host()
        async with rig.running() as services:
            yield services


async def adopt(services: Services, name: str = "vm", told: Told = NOTHING) -> list[str]:
    (wanted,), _ = await services.adopter.find([name], everything=False)
    return (await services.adopter.run(wanted, told=told, progress=lambda count: None)).placeholders


def left(rig: Rig) -> tuple[list[str], int, int]:
    """What is at the top of the backing directory, and how many maps and pins there are."""
    names = [path.name for path in rig.backing.iterdir() if path.name != PRIVATE_DIR]
    assert list((rig.backing / PRIVATE_DIR / "adopting").iterdir()) == []
    return names, len(rig.maps()), len(rig.pins())


async def contents_of(services: Services, path: str) -> bytes:
    disk = await services.open(path)
    try:
        return bytes(await disk.read(0, 1 << 20))
    finally:
        await services.disks.release(disk)


@pytest.mark.parametrize("source", [None, KEY_SOURCE], ids=["plain", "encrypted"])
async def test_an_adopted_vm_is_that_vm(source: Any) -> None:
    async with another_host(source=source) as services:
        rig = services.rig
        (stored,) = services.store.vms()
        assert await adopt(services) == [DISK]
        assert left(rig) == (["vm"], 1, 1)
        assert rig.vm("vm").id == stored.vm_id
        assert rig.is_placeholder(DISK)
        assert (rig.backing / DISK).stat().st_blocks <= BLOCK // 512  # what its attributes take
        assert not rig.is_placeholder(SMALL)
        claim = newest_claim(services.store.objects, stored.vm_id)
        assert claim is not None
        assert (claim.state, claim.datastore_id) == (ClaimState.FREE, services.private.datastore_id)
        assert claim.point_id == stored.points[-1].point_id
        report = await services.archive("vm", archive=False)
        assert report.read_bytes == len(LITTLE)
        with pytest.raises(AlreadyExists, match=r"VM vm \(id .*\) is here already"):
            await adopt(services)
        assert await services.adopter.find([], everything=True) == ([], [])
        assert await contents_of(services, DISK) == CONTENT
        assert await contents_of(services, SMALL) == LITTLE
        await services.bring_back(DISK)
        assert left(rig) == (["vm"], 0, 0)


@pytest.mark.parametrize("is_older_listed", [False, True])
async def test_what_was_set_free_a_moment_ago_is_adopted_though_listings_lag(is_older_listed: bool) -> None:
    async with another_host() as services:
        objects = services.rig.objects
        (stored,) = services.store.vms()
        new = stored.points[-1].point_id
        older = put_point(services.store, vm_id=stored.vm_id, name="vm", created_s=1.0)
        if not is_older_listed:
            services.store.forget(stored.vm_id, older, host="h", why="")
        for epoch, made in enumerate([HELD, replace(FREE, point_id=new)], 1):
            put_claim(objects, replace(made, vm_id=stored.vm_id, epoch=epoch))
        (wanted,), _ = await services.adopter.find(["vm"], everything=False)
        late = (manifest_key(stored.vm_id, new), claim_key(stored.vm_id, 2))
        list_all = objects.list
        objects.list = lambda prefix: (info for info in list_all(prefix) if info.key not in late)  # type: ignore[method-assign]
        report = await services.adopter.run(wanted, told=NOTHING, progress=lambda count: None)
        assert (report.point_id, report.placeholders) == (new, [DISK])


async def test_a_forgotten_point_is_not_adopted_because_the_claim_names_it() -> None:
    async with another_host() as services:
        (stored,) = services.store.vms()
        new = stored.points[-1].point_id
        put_point(services.store, vm_id=stored.vm_id, name="vm", created_s=1.0)
        put_claim(services.store.objects, replace(FREE, vm_id=stored.vm_id, epoch=1, point_id=new))
        services.store.forget(stored.vm_id, new, host="h", why="")
        with pytest.raises(PointNotFound, match="is forgotten or gone"):
            await adopt(services)


async def test_an_adopted_vm_stays_held_for_a_disk_that_was_moved_out_before() -> None:
    with temporary_rig() as rig:
        rig.settings = replace(rig.settings, placeholder_bytes_min=CHUNK)
        rig.make_disk(DISK, CONTENT)
        rig.make_disk("vm/other.img", CONTENT[::-1])
        async with rig.running() as services:
            await services.archive("vm")
            (rig.backing / "other").mkdir()
            (rig.backing / "vm/other.img").rename(rig.backing / "other/other.img")
            await services.archive("vm")
            vm_id = rig.vm("vm").id
            shutil.rmtree(rig.backing / "vm")
        async with rig.running() as services:
            (wanted,), _ = await services.adopter.find(["vm"], everything=False)
            report = await services.adopter.run(wanted, told=NOTHING, progress=lambda count: None)
            assert any("was moved out of it" in warning for warning in report.warnings)
            claim = newest_claim(services.store.objects, vm_id)
            assert claim is not None
            assert claim.state is ClaimState.HELD
            assert await contents_of(services, "other/other.img") == CONTENT[::-1]


async def test_the_directory_of_memory_is_not_made_a_vm() -> None:
    with temporary_rig() as rig:
        rig.memory_dir = "save"
        rig.make_disk("save/gone.save", LITTLE)
        async with rig.running() as services:
            assert await services.adopter.find([], everything=True) == ([], [])
            assert VM_XATTR not in os.listxattr(rig.backing / "save")


async def test_names_that_lead_nowhere_are_told_of_one_by_one() -> None:
    async with another_host() as services:
        (stored,) = services.store.vms()
        found, missed = await services.adopter.find([stored.vm_id, "nobody", "vm@cafe"], everything=False)
        assert [(each.vm.vm_id, each.named) for each in found] == [(stored.vm_id, "latest"), (stored.vm_id, "cafe")]
        assert [(each.name, type(each.error)) for each in missed] == [("nobody", VmNotFound)]
        calls = len(services.rig.objects.calls)
        put_point(services.store, vm_id="e" * 32, created_s=1.0)
        await services.adopter.find([stored.vm_id], everything=False)
        assert not any("e" * 32 in key for call, key in services.rig.objects.calls[calls:] if call == "get")


async def test_what_is_refused_has_changed_nothing() -> None:
    async with another_host() as services:
        rig, objects = services.rig, services.rig.objects
        (stored,) = services.store.vms()

        async def refused(kind: type[VmfsStubError], text: str, name: str = "vm", told: Told = NOTHING) -> None:
            there = dict(objects.contents)
            with pytest.raises(kind, match=text):
                await adopt(services, name, told)
            assert objects.contents == there
            assert (left(rig)[1:], rig.is_placeholder("taken") if (rig.backing / "taken").exists() else False) == (
                (0, 0),
                False,
            )

        (rig.backing / "vm").mkdir()
        await refused(AlreadyExists, "vm is the name of another VM here")
        (rig.backing / "vm").rmdir()
        await refused(PointNotFound, "has no restore point cafe", "vm@cafe")
        services.files.instead["adopt.space"] = lambda function, path: os.statvfs("/proc")
        await refused(NoSpace, "0 MiB are free")
        services.files.instead.clear()
        newest = stored.points[-1]
        older = put_point(services.store, vm_id=stored.vm_id, name="vm", created_s=1.0)
        await refused(Refused, f"is not its newest state, which is restore point {newest.point_id}", f"vm@{older}")
        await refused(Refused, "does not say what its directory was", f"vm@{older}", LOSS)
        claim = Claim(stored.vm_id, 1, ClaimState.HELD, THERE, "host2", "images", 1.0)
        put_claim(services.store.objects, claim)
        await refused(ClaimedElsewhere, "of host host2 since")
        await refused(ClaimedElsewhere, "of host host2 since", told=FORCE)
        (wanted,), _ = await services.adopter.find(["vm"], everything=False)
        report = await services.adopter.run(wanted, told=BOTH, progress=lambda count: None)
        (warning,) = report.warnings
        assert "taken from datastore images of host host2" in warning
        newest_now = newest_claim(services.store.objects, stored.vm_id)
        assert newest_now is not None
        assert (newest_now.epoch, newest_now.state) == (3, ClaimState.FREE)


async def test_who_takes_the_vm_after_it_was_decided_keeps_it() -> None:
    async with another_host() as services:
        rig, objects = services.rig, services.store.objects
        (wanted,), _ = await services.adopter.find(["vm"], everything=False)
        first = Claim(wanted.vm.vm_id, 1, ClaimState.HELD, THERE, "host2", "images", 1.0)
        put_claim(objects, first)

        def take(call: str, key: str) -> None:
            if call == "get" and key.startswith(MANIFESTS):
                rig.objects.before = lambda call, key: None
                put_claim(objects, replace(first, epoch=2, host="host3"))

        rig.objects.before = take
        with pytest.raises(ClaimedElsewhere, match="host3"):
            await services.adopter.run(wanted, told=BOTH, progress=lambda count: None)
        assert left(rig) == ([], 0, 0)
        newest = newest_claim(objects, wanted.vm.vm_id)
        assert newest is not None
        assert newest.host == "host3"


async def test_another_one_that_takes_the_name_meanwhile_keeps_it() -> None:
    async with another_host() as services:
        rig = services.rig

        def rename(function: Any, *args: Any) -> None:
            (rig.backing / "vm").mkdir()
            function(*args)

        services.files.instead["adopt.rename"] = rename
        with pytest.raises(AlreadyExists, match="vm is the name of another VM by now"):
            await adopt(services)
        assert left(rig) == (["vm"], 0, 0)
        assert list((rig.backing / "vm").iterdir()) == []
        services.files.instead.clear()
        (rig.backing / "vm").rmdir()
        assert await adopt(services) == [DISK]


async def test_a_point_that_is_forgotten_meanwhile_is_done_without() -> None:
    """Garbage collection may have looked at its pins before this one was there."""
    async with another_host() as services:
        rig = services.rig
        (stored,) = services.store.vms()
        key = forgotten_key(stored.vm_id, stored.points[-1].point_id)

        def forget(call: str, name: str) -> None:
            if call == "put" and name.startswith(PINS):
                rig.objects.contents[key] = b""

        rig.objects.before = forget
        with pytest.raises(PointNotFound, match="was forgotten meanwhile"):
            await adopt(services)
        assert left(rig) == ([], 0, 0)
        del rig.objects.contents[key]
        rig.objects.before = lambda call, name: None
        assert await adopt(services) == [DISK]


async def test_a_pin_that_comes_when_nobody_waits_for_it_goes_again() -> None:
    async with another_host() as services:
        rig, gate = services.rig, threading.Event()

        def hang(call: str, key: str) -> None:
            if call == "put" and key.startswith(PINS):
                assert gate.wait(30)

        def hurry(function: Any, *args: Any) -> None:
            function(*args)
            services.threads._store_timeout_s = 0.1

        rig.objects.before = hang
        services.files.instead["adopt.size"] = hurry
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await adopt(services)
        services.threads.be_patient()
        assert left(rig)[0] == []
        gate.set()
        with trio.fail_after(30):
            while sum(call == "delete" and key.startswith(PINS) for call, key in rig.objects.calls) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert rig.pins() == []


async def test_the_order_in_which_it_is_done() -> None:
    async with another_host() as services:
        rig, done = services.rig, list[str]()

        def before(call: str, key: str) -> None:
            kind = key.split("/")[0]
            if call == "put" or key.startswith((FORGOTTEN, MANIFESTS)):
                done.append(f"{call} {kind}, {len(rig.maps())} maps")

        def noted(what: str) -> Any:
            def call(function: Any, *args: Any) -> Any:
                done.append(f"{what}, {left_here()} here, {len(rig.pins())} pins")
                return function(*args)

            return call

        def left_here() -> int:
            return sum(path.name != PRIVATE_DIR for path in rig.backing.iterdir())

        rig.objects.before = before
        services.files.instead |= {"adopt.record": noted("record"), "adopt.rename": noted("rename")}
        services.files.instead |= {"archive.punch": noted("punch")}
        await adopt(services)
        assert done[done.index("put claims, 0 maps") :] == [
            "put claims, 0 maps",
            "put pins, 1 maps",
            "list forgotten, 1 maps",
            "get manifests, 1 maps",
            "record, 0 here, 1 pins",
            "rename, 0 here, 1 pins",
            "punch, 1 here, 1 pins",
            "put claims, 1 maps",
        ]


def test_what_a_vm_was_is_told_by_its_restore_point() -> None:
    with temporary_rig() as rig:
        made = back_up(rig.store, {"disk.raw": b"x"})
        with pytest.raises(Refused, match="does not say what its directory was"):
            top_of(made)
        assert top_of(replace(made, metadata={"path": "disk.raw"})).path == "disk.raw"
        with pytest.raises(Refused):
            top_of(replace(made, metadata={"path": "web/"}))
        top = StoredFile("web", FileKind.DIRECTORY, 0, 0o700, 0, 0, 0, 0)
        assert top_of(replace(made, top=top)) == top


@pytest.mark.parametrize("name", [PRIVATE_DIR, "lost+found"])
async def test_a_name_that_is_no_vms_is_refused(name: str) -> None:
    async with another_host() as services:
        (stored,) = services.store.vms()
        found = services.store.open_point(stored.vm_id, stored.points[-1].point_id).manifest
        assert found.top is not None
        with pytest.raises(Refused, match="is no name for a VM"):
            services.adopter._check_place(replace(found.top, path=name), found)
