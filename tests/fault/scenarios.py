"""What is done while one call goes wrong: every operation on a VM, and every state in which a start can find one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import trio

from tests import store_points
from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, Services, survives_kill
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import PATHS, ROOT_PEER, NotWhole, done, ended, with_datastore
from tests.fault.guests import (
    back_up_at_rest,
    stop_and_archive,
    with_agent,
    with_guest,
    with_guest_to_save,
    with_guest_to_save_at_top,
)
from tests.store_fakes import FakeObjects, SitedObjects, packs_condemned, refused_deletes
from tests.store_points import KEY_SOURCE
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.control.messages import JobReport
from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import (
    Abandoned,
    AlreadyExists,
    MapFrozen,
    ObjectMissing,
    PointNotFound,
    StoreConflict,
    UnknownFormat,
    VmfsStubError,
)
from vmfs_stub.core.ids import PackId, PlaceholderId, PointId, VmId, WriterId
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.attributes import Change, Requester
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.nodes import ROOT
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.primary.serving_mark import Machine, Mark, Pace, ServingMark, encode_mark
from vmfs_stub.services import scrub, verify
from vmfs_stub.services.adopt import Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.associated import AssociatedFiles
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.replication import catch_up
from vmfs_stub.services.restore import STAGING, restore_point
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.store import format as store_format
from vmfs_stub.store.associated_files import ASSOCIATED, decode_associated
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.collector import Collector
from vmfs_stub.store.condemned import Condemned, encode_condemned
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keyring import add_key, look_at, remove_key
from vmfs_stub.store.keys import (
    CLAIMS,
    CONDEMNED,
    DEAD,
    FORGOTTEN,
    INDEX,
    LEASES,
    MANIFESTS,
    MOVED,
    PACKS,
    REPLICA_KEY,
    SEGMENTS,
    STORE_KEY,
    manifest_key,
    moved_key,
    pack_key,
    quarantine_key,
)
from vmfs_stub.store.leases import LeaseState, encode_lease
from vmfs_stub.store.manifest import FileKind, Manifest
from vmfs_stub.store.mirrored_deletes import MirroredDeletes
from vmfs_stub.store.moved import Move, encode_moved
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.packs import read_footer
from vmfs_stub.store.probe import probe
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.repacking import Mirror, Repacking
from vmfs_stub.store.replica import Replication, make_replica
from vmfs_stub.store.store import Store
from vmfs_stub.store.versions import raise_version

DISK, SECOND = PATHS
LAST = (SECOND,)
LINK = "vm/below/link"
Act = Callable[[Services], Awaitable[None]]
Prepare = Callable[[Rig], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """``prepare`` leaves the state in which ``act`` is spoiled; ``act`` returns nothing and may raise.

    ``writes`` are what a guest writes to the first disk in `act`, and ``sizes`` those that it may have meanwhile;
    where act failed, any of them may have been done.  ``gone`` are disks that `act` removes.  ``again`` is whether
    act can be done once more.  ``brings`` is whether act brings the VM here: all of it, or nothing is here.
    ``has_guest`` is whether a guest runs the VM, which act may stop.
    """

    name: str
    prepare: Prepare
    act: Act
    writes: tuple[tuple[int, bytes], ...] = ()
    sizes: tuple[int, ...] = ()
    gone: tuple[str, ...] = ()
    again: bool = True
    hydrates: bool = False
    brings: bool = False
    has_guest: bool = False


def first_contents() -> dict[str, bytes]:
    chosen = random.Random(5)
    large = chosen.randbytes(2 * CHUNK) + bytes(CHUNK) + chosen.randbytes(CHUNK + 3 * BLOCK + 512)
    return {DISK: large, SECOND: chosen.randbytes(CHUNK + 100)}


def make_vm(rig: Rig) -> dict[str, bytes]:
    """A VM with two disks, a hole, a symbolic link and an attribute; returns the disks' contents."""
    contents = first_contents()
    (rig.backing / "vm/below").mkdir(parents=True)
    for path, content in contents.items():
        rig.make_disk(path, content)
    os.setxattr(rig.backing / SECOND, "user.note", b"kept")
    (rig.backing / LINK).symlink_to("nowhere")
    return contents


# States


async def nothing(rig: Rig) -> None:
    """Plain files."""


async def archived(rig: Rig) -> None:
    async with rig.running() as services:
        await services.archive("vm")


async def partly_recalled(rig: Rig) -> None:
    await archived(rig)
    async with rig.running() as services:
        disk = await services.open(DISK)
        await disk.read(CHUNK, 1)
        await disk.sync(data_only=True)
        await services.disks.release(disk)


def killed(site: str, act: Act, *, after: Prepare = nothing) -> Prepare:
    """The state that a kill at the first call of ``site`` in ``act`` leaves."""

    async def prepare(rig: Rig) -> None:
        await after(rig)
        files = RigFiles(rig.medium)
        files.fail(site, 1, Killed())
        with survives_kill():
            async with rig.running(files=files) as services:
                await act(services)
        if not files.dead:
            raise NotWhole(f"{site} was never called")

    return prepare


async def unfinished(rig: Rig) -> None:
    """A map that never got its name, and a chunk index that is damaged."""
    (rig.backing / ".vmfs-stub/maps").mkdir(parents=True, exist_ok=True)
    (rig.backing / ".vmfs-stub/maps/left.new").write_bytes(b"half")
    (rig.backing / ".vmfs-stub/frozen").mkdir(exist_ok=True)
    (rig.backing / ".vmfs-stub/frozen/left").touch()


async def returned(rig: Rig) -> None:
    """Plain files again, of which the store has all."""
    await archived(rig)
    async with rig.running() as services:
        await bring_back(services)


async def with_damaged_segments(rig: Rig) -> None:
    await returned(rig)
    contents = rig.objects.contents
    contents.update({key: data[:-1] for key, data in contents.items() if key.startswith(SEGMENTS)})


async def hydrating(rig: Rig) -> None:
    await archived(rig)
    async with rig.running() as services:
        disk = await services.open(DISK)
        assert disk.placeholder is not None
        await disk.placeholder.set_hydrate()
        await services.disks.release(disk)


async def backed_up(rig: Rig) -> None:
    async with rig.running() as services:
        await back_up(services)


async def lost(rig: Rig) -> None:
    """Only the store is left; the second disk is one of those that are too small for a placeholder."""
    rig.settings = replace(rig.settings, placeholder_bytes_min=len(first_contents()[SECOND]) + 1)
    await backed_up(rig)
    rig.lose_host()


async def written_since(rig: Rig) -> None:
    """Backed up, and written to since: after a clean end it is known what changed."""
    await backed_up(rig)
    async with rig.running() as services:
        disk = await services.open(SECOND)
        await disk.write(0, first_contents()[SECOND][:BLOCK])
        await services.disks.release(disk)


async def being_written(rig: Rig) -> None:
    """The same, with the daemon killed: what changed is known as long as the host runs."""
    await backed_up(rig)
    with survives_kill():
        async with rig.running() as services:
            disk = await services.open(SECOND)
            await disk.write(0, first_contents()[SECOND][:BLOCK])
            services.files.kill()
            raise Killed


async def with_changes_of_others(rig: Rig) -> None:
    """What is known is of a file that is gone, of one that was changed behind the mount, of one whose sync failed."""
    await being_written(rig)
    for directory in (rig.backing / ".vmfs-stub/changes", rig.runtime / "changes"):
        (directory / "999999999").write_bytes(b"gone")
        (directory / "7.new").write_bytes(b"half")
    (rig.runtime / "changes/999999998.doubt").write_text(rig.boot.boot_id)
    os.utime(rig.backing / DISK, ns=(1, 1))


async def with_replica(rig: Rig) -> None:
    """Plain files, and a store that has a replica, without which nothing is released."""
    rig.add_replica()


async def archived_twice(rig: Rig) -> None:
    rig.add_replica()
    await archived(rig)


async def partly_recalled_twice(rig: Rig) -> None:
    rig.add_replica()
    await partly_recalled(rig)


LOOSE = ("a.img", "b.img")
NVRAM = "guest_VARS.fd"
TPM = "swtpm/76000000-0000-0000-0000-000000000000/tpm2"


async def with_domain(rig: Rig) -> None:
    """The VM is a domain's with NVRAM and a TPM; beside it is one whose image is based on something."""
    (rig.base / NVRAM).write_bytes(b"nvram")
    (rig.base / TPM).mkdir(parents=True)
    (rig.base / TPM / "state").write_bytes(b"sealed")
    rig.make_disk("golden/base.img", overlay_head("/nowhere"))
    xml = "<domain><devices><tpm><backend type='emulator' version='2.0'/></tpm></devices></domain>"
    guest = domain("v", rig.mountpoint / DISK, uuid="76".ljust(32, "0"))
    rig.hypervisor = FakeHypervisor(replace(guest, nvram=rig.base / NVRAM, xml=xml))


async def with_domain_archived(rig: Rig) -> None:
    """The same, with placeholders."""
    await with_domain(rig)
    await archived(rig)


async def with_loose_disks(rig: Rig) -> None:
    """Two files at the top that a domain has together."""
    for name in LOOSE:
        rig.make_disk(name, name.encode() * CHUNK)
    rig.hypervisor = FakeHypervisor(domain("web", *(rig.mountpoint / name for name in LOOSE)))


def overlay_head(base: str) -> bytes:
    """What an image that is based on ``base`` begins with, and a chunk more."""
    fixed = struct.pack(">IIQIIQIIQQIIQ", 0x514649FB, 2, 72, len(base), 16, CHUNK, 0, 0, 0, 0, 0, 0, 0)
    return (fixed + base.encode()).ljust(2 * CHUNK, b"x")


# Acts


@contextmanager
def translated() -> Iterator[None]:
    """A job fails in a way that an operator can use."""
    try:
        yield
    except OSError as exc:
        raise NotWhole(f"an error that is not ours: {exc!r}") from exc


async def archive(services: Services) -> None:
    with translated():
        report = await services.archive("vm")
    if report.abandoned:
        raise OSError(errno.EIO, report.abandoned)


async def archive_domain(services: Services) -> None:
    """What belongs to a VM beside its disks is in its restore point, unless it is said not to be."""
    _set_domain(services)
    with translated():
        report = await services.archive("vm")
    manifest = _last_manifest(services)
    told = decode_associated(manifest.metadata.get(ASSOCIATED, "[]"), "manifest")
    if {file.data for file in told} != {b"nvram", b"sealed"} and not report.warning:
        raise NotWhole(f"without a word left out: {told}")
    if report.abandoned:
        raise OSError(errno.EIO, report.abandoned)


def _set_domain(services: Services) -> None:
    hypervisor = services.rig.hypervisor
    assert hypervisor is not None
    services.archiver.associated = AssociatedFiles(
        files=services.files,
        threads=services.threads,
        hypervisor=hypervisor,
        chains=services.chains,
        link=services.connected.link,
        managed_save=services.rig.managed_save,
        swtpm=services.rig.base / "swtpm",
    ).of


def _last_manifest(services: Services) -> Manifest:
    vm_id = services.rig.vm("vm").id
    store = services.rig.store
    return store.open_point(vm_id, store.points(vm_id)[-1].point_id).manifest


async def group_files(services: Services) -> None:
    """They are one VM afterwards, or are not and the next look makes them one."""
    assert services.rig.hypervisor is not None
    inventory = DirectoryInventory(services.rig.backing, files=services.files)
    domains = await services.rig.hypervisor.domains()
    with translated():
        vms = inventory.scan().vms
        await services.groups.regroup(vms, domains, await services.chains.look(vms, domains))
        tops = {vm.tops for vm in inventory.scan().vms}
    if LOOSE not in tops and not services.files.spoiled:
        raise NotWhole(f"not grouped: {tops}")


async def look_at_chains(services: Services) -> None:
    """Whatever goes wrong, an image of which it cannot be told what it is based on is said to be one."""
    assert services.rig.hypervisor is not None
    scan = DirectoryInventory(services.rig.backing, files=services.files).scan()
    if scan.unread:
        raise scan.unread[0].error
    chains = await services.chains.look(scan.vms, await services.rig.hypervisor.domains())
    if "golden/base.img" not in chains.bases and "golden/base.img" not in chains.problems:
        raise NotWhole(f"a base was missed: {chains}")
    if chains.problems and not services.files.spoiled:
        raise NotWhole(f"problems: {chains.problems}")


async def archive_after(services: Services, site: str, code: int) -> None:
    """An archive that fails at a site, as planned beside whatever else goes wrong, and a second that does not."""
    services.files.fail(site, 1, OSError(code, os.strerror(code)))
    try:
        await archive(services)
    except MapFrozen:
        raise  # by what else went wrong; until the next boot it refuses
    except (VmfsStubError, OSError):
        await archive(services)


async def archive_undone(services: Services) -> None:
    await archive_after(services, "map.create_entry", errno.EIO)


async def archive_unmapped(services: Services) -> None:
    await archive_after(services, "volatile.allocate", errno.EIO)


async def archive_unrecorded(services: Services) -> None:
    """Whether the record was set is asked; where that cannot be told, the next start decides."""
    await archive_after(services, "archive.record", errno.EIO)


async def archive_without_room(services: Services) -> None:
    services.private.reserve.fill(services.files)
    await archive_after(services, "map.create", errno.ENOSPC)
    services.private.reserve.fill(services.files)


async def archive_condemned(services: Services) -> None:
    """Garbage collection is about to remove what the backup would use; then it is not."""
    await _condemned(services, archive)


async def _condemned(services: Services, act: Act) -> None:
    with packs_condemned(services.rig.objects.contents):
        try:
            await act(services)
            if not services.files.spoiled:
                raise NotWhole("condemned packs were used")
        except StoreConflict:
            pass
    await act(services)


async def back_up(services: Services) -> None:
    with translated():
        await services.archive("vm", archive=False)


async def back_up_in_use(services: Services) -> None:
    """While it is copied the guest writes what is there already, and cuts nothing: no write may fail by that."""
    disk = await services.open(DISK)
    content = first_contents()[DISK]
    changed = services.archiver._last_points.changed_in_use

    async def write_and_go_on(disks: Sequence[Disk]) -> list[Changed | None]:
        for offset, length in ((BLOCK, BLOCK), (CHUNK, CHUNK), (3 * CHUNK - 10, 20)):
            try:
                await disk.write(offset, content[offset : offset + length])
            except (VmfsStubError, OSError) as exc:
                spoiled = services.files.spoiled
                if spoiled and all(site.startswith("aside.") for site in spoiled):
                    raise NotWhole(f"a guest's write failed by a backup: {exc!r}") from exc
                raise Abandoned(f"a guest's write failed: {exc!r}") from exc
        return await changed(disks)

    try:
        with translated(), patch.object(services.archiver._last_points, "changed_in_use", write_and_go_on):
            report = await services.back_up_in_use("vm")
        vm = services.rig.vm("vm")
        point = services.rig.store.open_point(vm.id, report.point_id)
        for number, stored in enumerate(point.manifest.files):
            if stored.kind is FileKind.FILE:
                table = point.chunks(number)
                refs = table.locate(0, table.chunk_count)
                parts = [bytes(CHUNK) if ref is None else services.rig.store.fetch([ref])[0] for ref in refs]
                expect(b"".join(parts)[: table.size], first_contents()[f"vm/{stored.path}"], stored.path)
    finally:
        await services.disks.release(disk)


async def back_up_cloned_in_use(services: Services) -> None:
    """The same on a filesystem whose files can share their bytes."""
    services.files.instead.update({"aside.probe": lambda *args: 0, "aside.clone": clone_by_copy})
    await back_up_in_use(services)


def clone_by_copy(ioctl: object, to: int, request: int, fd: int) -> None:
    os.pwrite(to, os.pread(fd, os.fstat(fd).st_size, 0), 0)


async def back_up_undone_in_use(services: Services) -> None:
    services.files.fail("aside.write", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
    with suppress(Abandoned):
        await back_up_in_use(services)
    await back_up_in_use(services)


async def back_up_condemned(services: Services) -> None:
    """Garbage collection is about to remove what the last point has; then it has gone on without."""
    await _condemned(services, back_up)


LISTED_TRIES = 20
TAKEN = Told(force=True, accept_loss=True)
"""From the host that has it, which is lost."""


async def adopt(services: Services) -> None:
    """The VM of the store is here then, by an earlier try perhaps that failed at the very end."""
    backing = services.rig.backing
    if not (backing / "vm").exists():
        with translated():
            wanted, _ = await services.adopter.find([], everything=True)
            for _ in range(LISTED_TRIES):
                if wanted:
                    break
                await trio.sleep(0.1)  # the store's listings may lag
                wanted, _ = await services.adopter.find([], everything=True)
            for each in wanted:
                await _adopt_listed(services, each)
    link, second = backing / LINK, backing / SECOND
    if str(link.readlink()) != "nowhere" or os.getxattr(second, "user.note") != b"kept":
        raise NotWhole("a link or an attribute is not what it was")


async def _adopt_listed(services: Services, wanted: Wanted) -> None:
    """It is looked for again by each step, of which none need see what another one saw."""
    for _ in range(LISTED_TRIES):
        with suppress(PointNotFound):
            await services.adopter.run(wanted, told=TAKEN, progress=lambda count: None)
            return
        await trio.sleep(0.1)
    raise PointNotFound(f"{wanted.name} is not found in {LISTED_TRIES} tries")


async def adopt_after_look(services: Services) -> None:
    """One whose rename is said to have failed, and another."""
    services.files.fail("adopt.rename", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
    try:
        await adopt(services)
    except VmfsStubError:
        await adopt(services)


async def read(services: Services) -> None:
    expect(await contents_of(services, DISK), first_contents()[DISK], DISK)


async def read_a_chunk(services: Services) -> None:
    """One that has data: a hole beside it may be filled before it or after it."""
    disk = await services.open(DISK)
    try:
        expect(bytes(await disk.read(CHUNK, CHUNK)), first_contents()[DISK][CHUNK : 2 * CHUNK], DISK)
    finally:
        await services.disks.release(disk)


async def read_from_replica(services: Services) -> None:
    """The store has lost everything, and has it again later."""
    contents = services.rig.objects.contents
    lost = {key: contents.pop(key) for key in list(contents) if key.startswith((PACKS, SEGMENTS, MANIFESTS))}
    try:
        await read(services)
    finally:
        contents.update(lost)


async def bring_back(services: Services) -> None:
    for path in PATHS:
        with translated():
            await services.bring_back(path)


async def read_until_ordinary(services: Services) -> None:
    """A guest reads a little, and the rest comes back while it has the disk open."""
    disk = await services.open(DISK)
    try:
        await disk.read(0, 1)
        with trio.fail_after(20):
            while disk.placeholder is not None and services.hydration.is_hydrating(disk.ino):  # noqa: ASYNC110
                await trio.sleep(0.001)
    finally:
        await services.disks.release(disk)


async def start_only(services: Services) -> None:
    """The start is what is spoiled."""


WRITES = ((3 * BLOCK, b"w" * BLOCK), (CHUNK - 10, b"across a border of chunks"), (2 * CHUNK, b"z" * CHUNK))


async def write_and_sync(services: Services) -> None:
    disk = await services.open(DISK)
    try:
        for offset, data in WRITES:
            await disk.write(offset, data)
        await disk.sync(data_only=False)
    finally:
        await services.disks.release(disk)


async def write_and_end(services: Services) -> None:
    """The daemon ends cleanly."""
    await write_and_sync(services)
    await services.disks.close_all()


async def write_unnoted(services: Services) -> None:
    """There is no room to note what changes."""
    services.files.fail("changes.begin", 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    await write_and_sync(services)


async def fail_to_sync(services: Services) -> None:
    """The kernel says once that it could not write, and keeps what is not on the disk."""
    disk = await services.open(DISK)
    try:
        services.files.fail("sync.file", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
        try:
            await disk.sync(data_only=True)
        except OSError:
            await disk.sync(data_only=True)
    finally:
        await services.disks.release(disk)


FULL = len(first_contents()[DISK])
CUT = CHUNK + 700


async def truncate(services: Services) -> None:
    """Cut and let grow, by the path and by an open file; times are set both ways, too."""
    with services.rig.path_fd(DISK) as fd:
        await services.disks.truncate(fd, CUT)
        await services.disks.set_times(fd, atime_ns=1, mtime_ns=None)
    disk = await services.open(DISK)
    try:
        await disk.truncate(FULL)
        await disk.set_times(atime_ns=None, mtime_ns=10**18)
        await disk.sync(data_only=False)
    finally:
        await services.disks.release(disk)


async def unlink(services: Services) -> None:
    await _unlink(services, SECOND)


async def unlink_open(services: Services) -> None:
    disk = await services.open(SECOND)
    try:
        await _unlink(services, SECOND)
        expect(bytes(await disk.read(0, 2 * CHUNK)), first_contents()[SECOND], SECOND)
    finally:
        await services.disks.release(disk)


async def _unlink(services: Services, path: str) -> None:
    """As the mount does it."""
    with services.rig.path_fd(path) as fd:
        await services.disks.removing(fd)
        try:
            await services.threads.files(services.files.call, "mount.unlink", os.unlink, services.rig.backing / path)
        finally:
            await services.disks.removed(fd)


async def restore(services: Services) -> None:
    """Everything, or nothing, is in the directory afterwards."""
    target, store = services.rig.base / "restored", services.store
    undoing = {"restore.undo", "restore.look"}
    if services.files.spoiled & undoing and target.exists():
        shutil.rmtree(target)  # what the second failure has left is the operator's to remove
    try:
        (vm,) = store.vms()
        point = store.open_point(vm.vm_id, vm.points[-1].point_id)
        restore_point(store, point, target, files=services.files, workers=1)
    except (VmfsStubError, OSError):
        if not services.files.dead and not services.files.spoiled & undoing:
            _check_nothing_restored(target)
        raise
    for path, content in first_contents().items():
        expect((target / path.removeprefix("vm/")).read_bytes(), content, f"restored {path}")


async def restore_with_domain(services: Services) -> None:
    """As `restore`, with what belongs to the VM beside its disks."""
    await restore(services)
    target = services.rig.base / "restored"
    expect((target / NVRAM).read_bytes(), b"nvram", NVRAM)
    if "<domain>" not in (target / "domain.xml").read_text():
        raise NotWhole("the domain's definition is another one")


async def restore_undone(services: Services) -> None:
    """One that fails when a part has its final name already, and another."""
    services.files.fail("restore.unlink", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
    try:
        await restore(services)
    except (VmfsStubError, OSError):
        await restore(services)


def _check_nothing_restored(target: Path) -> None:
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if found - {name for name in found if name.startswith(STAGING)}:
        raise NotWhole(f"a restore that failed has left {found}")


async def check_store(services: Services) -> None:
    """Everything that looks at a store: points, pins, marks, verification."""
    store, files = services.store, services.files
    objects = SitedObjects(FakeObjects(), files)
    probe(objects)
    created = Store.open_or_create(objects, chunk_size=CHUNK)
    created.check()
    gone = VmId("00" * 16), PointId("00" * 16)
    created.forget(*gone, host="host1", why="by hand")
    if [ids for *ids, _ in created.forgotten()] != [[*gone]]:
        raise NotWhole("what was forgotten is not")
    store.check()
    store.point_counts()
    store.pin_counts()
    for vm in store.vms():
        for point in store.points(vm.vm_id):
            store.pins(vm.vm_id, point.point_id)
    for info in store.objects.list(PACKS):
        read_footer(store.objects, PackId(info.key.rpartition("/")[2]))
    try:
        store.open_point(*gone)
        raise NotWhole("a point was opened that is not there")
    except PointNotFound:
        pass
    report = verify.verify(store, workers=1)
    if report.findings and not files.spoiled:
        raise NotWhole(f"verify: {report.findings}")


async def scrub_store(services: Services) -> None:
    """A store of its own, in which a frame is damaged, stored again by a backup, and repaired from there."""
    inner = FakeObjects()
    store = Store.create(SitedObjects(inner, services.files), chunk_size=CHUNK)
    content = first_contents()[SECOND]
    store_points.back_up(store, {"disk": content})
    (key,) = [key for key in inner.contents if key.startswith(PACKS)]
    inner.contents[key] = b"?" + inner.contents[key][1:]
    store_points.back_up(store, {"disk": content[::-1]})
    outcomes = [_scrub(store)]
    store_points.back_up(store, {"disk": content})
    inner.before = partial(_take_for_dead, inner.contents)
    outcomes.append(_scrub(store))
    inner.before = lambda call, key: None
    outcomes.append(_scrub(store))
    if outcomes != [False, False, True] and not services.files.spoiled:
        raise NotWhole(f"scrub found that all is whole: {outcomes}")
    findings = verify.verify(store, workers=1).findings
    if findings and not services.files.spoiled:
        raise NotWhole("scrub has repaired what verify finds damaged")


async def scrub_replicated(services: Services) -> None:
    """A store of its own, with a replica, in which something of each kind is damaged."""
    inner, outer = FakeObjects(), FakeObjects()
    store = Store.create(SitedObjects(inner, services.files), chunk_size=CHUNK)
    store_points.back_up(store, {"disk": first_contents()[SECOND]})
    outer.contents.update(inner.contents)
    replica = Store(SitedObjects(outer, services.files, "replica"), store.description)
    for key, data in list(inner.contents.items()):
        if key.startswith((PACKS, SEGMENTS, MANIFESTS)):
            inner.contents[key] = data[:60] + bytes([data[60] ^ 1]) + data[61:]
    is_whole = _scrub(store, replica)
    findings = verify.verify(store, workers=1).findings
    if (findings or not is_whole) and not services.files.spoiled:
        raise NotWhole(f"scrub has not repaired from the replica: {findings}")


async def replicate_store(services: Services) -> None:
    """An encrypted store of its own, and its replica, to which everything happens that can."""
    inner, outer = FakeObjects(), FakeObjects()
    objects = SitedObjects(inner, services.files)
    store = Store.create(objects, chunk_size=CHUNK, source=KEY_SOURCE)
    replica = Store(SitedObjects(outer, services.files, "replica"), store.description, store.key)
    for is_new in (True, False):
        if make_replica(store, replica.stored) is not is_new and not services.files.spoiled:
            raise NotWhole("a replica was made twice, or never")
    content = first_contents()[SECOND]
    store_points.back_up(store, {"disk": content})
    added = add_key(objects, look_at(objects), KEY_SOURCE, replace(KEY_SOURCE, secret=bytes(32)))
    await _replicate(services, store, replica)
    remove_key(objects, look_at(objects), KEY_SOURCE, added.key_id)
    # The only pack is damaged everywhere, and repaired; of the second one the replica has a damaged copy.
    (key,) = [key for key in inner.contents if key.startswith(PACKS)]
    inner.contents[key] = b"?" + inner.contents[key][1:]
    left = ("keys/", STORE_KEY, REPLICA_KEY)
    outer.contents = {name: data for name, data in outer.contents.items() if name.startswith(left)}
    _scrub(store)
    again = store_points.back_up(store, {"disk": content})
    _scrub(store)
    outer.contents.update(
        {name: b"?" + data[1:] for name, data in inner.contents.items() if name.startswith(PACKS) and name != key}
    )
    await _replicate(services, store, replica)
    # Garbage collection removes a point while it is copied, and then another one from both.
    gone = store_points.back_up(store, {"disk": content[::-1]})
    outer.before = partial(_remove_meanwhile, inner.contents, manifest_key(gone.vm_id, gone.point_id))
    await _replicate(services, store, replica)
    outer.before = lambda call, key: None
    store.forget(again.vm_id, again.point_id, host="host1", why="by hand")
    _collect(store, MirroredDeletes(store.objects, replica.stored))
    kept = {name for name in inner.contents if name.startswith((MANIFESTS, PACKS, SEGMENTS, "keys/", STORE_KEY))}
    have = {name for name in outer.contents if not name.startswith((MOVED, PACKS, REPLICA_KEY))}
    if not services.files.spoiled and (have != {name for name in kept if not name.startswith(PACKS)}):
        raise NotWhole(f"the replica has {sorted(have ^ kept)}")
    if not services.files.spoiled and verify.verify(Store.open(outer, KEY_SOURCE), workers=1).findings:
        raise NotWhole("what is in the replica cannot be restored")


async def _replicate(services: Services, store: Store, replica: Store) -> None:
    with closing(ReadBack(None, store.id, "replica")) as read_back:
        done = await catch_up(services.threads, Replication(store, replica, read_back))
    for error in done.failures.values():
        raise error


def _remove_meanwhile(contents: MutableMapping[str, bytes], manifest: str, call: str, key: str) -> None:
    if (call, key) == ("put", manifest):
        contents.pop(manifest, None)


def _take_for_dead(contents: MutableMapping[str, bytes], call: str, key: str) -> None:
    """By garbage collection, when it tells readers of what it has repaired."""
    if call == "put" and key.startswith(MOVED):
        contents.update({f"{DEAD}{lease.removeprefix(LEASES)}": b"" for lease in contents if lease.startswith(LEASES)})


def _scrub(store: Store, replica: Store | None = None) -> bool:
    with closing(ScrubProgress(None, store.id)) as progress:
        return scrub.scrub(store, progress, replica=replica, workers=1).is_whole


async def with_garbage(rig: Rig) -> None:
    """Two restore points, of which one is forgotten; another backup, which died late; and a list of what is gone."""
    await backed_up(rig)
    contents = rig.objects.contents
    (old,) = [key for key in contents if key.startswith(MANIFESTS)]
    await archived(rig)
    contents[old.replace(MANIFESTS, FORGOTTEN)] = b""
    contents[f"{LEASES}{'d' * 16}"] = encode_lease(LeaseState(WriterId("d" * 16), 3))
    contents[f"{MANIFESTS}{'e' * 32}/{'f' * 32}.{'d' * 16}.pending"] = contents[old]
    dead = PackId("a" * 16 + "d" * 16)
    contents[pack_key(dead)] = b"of the dead writer"
    index = next(key for key in contents if key.startswith(INDEX))
    packs = decode_index(contents[index], index)
    contents[f"{INDEX}{'c' * 32}"] = encode_index([*packs, (dead, packs[0][1])])
    contents[f"{CONDEMNED}{'c' * 32}"] = encode_condemned(Condemned(frozenset([PackId("b" * 32)])), "nonce")
    contents[quarantine_key(dead)] = b"of what is about to go"
    needed, refs = packs[0]
    moved = [Move(ref.offset, needed, ref.offset, ref.length) for ref in refs]
    contents[moved_key(needed, "9" * 32)] = encode_moved(moved, needed, "")
    async with rig.running() as services:
        await back_up(services)  # the third and fourth claim


async def mostly_garbage(rig: Rig) -> None:
    """A VM of which the store has what it needs in packs that are full of what it does not need any more."""
    rig.add_replica()
    former = rig.backing / "vm/former"
    former.write_bytes(random.Random(6).randbytes(24 * CHUNK))
    await backed_up(rig)
    former.unlink()
    contents = rig.objects.contents
    (old,) = [key for key in contents if key.startswith(MANIFESTS)]
    await archived(rig)
    contents[old.replace(MANIFESTS, FORGOTTEN)] = b""


async def repack(services: Services) -> None:
    """Garbage collection copies what placeholders need, and those and a backup go on with the copies."""
    store, there = services.store, services.rig.replica_objects
    assert there is not None
    replica = Store(SitedObjects(there, services.files, "replica"), store.description)
    with closing(ReadBack(None, store.id, "replica")) as read_back:
        mirror = Replication(store, replica, read_back).copy_moves
        _collect(store, MirroredDeletes(store.objects, replica.stored), mirror=mirror, lag_s=services.rig.objects.lag_s)
    if not services.files.spoiled and not any(key.startswith(MOVED) for key in services.rig.objects.contents):
        raise NotWhole("garbage collection has repacked nothing")
    await back_up(services)


def _collect(
    store: Store, objects: ObjectStore | None = None, *, mirror: Mirror | None = None, lag_s: float = 0.0
) -> None:
    """Garbage collection, which waits for what listings do not show yet, but not for leases to run out."""

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, 2 * lag_s))

    with closing(Reachability(None, store.id, store.objects, sealing=store.sealing, workers=1)) as reachability:
        collector = Collector(
            objects or store.objects,
            reachability,
            lag_s=lag_s,
            sleep=sleep,
            workers=1,
            repacking=Repacking(store, mirror=mirror),
        )
        collector.survey()
        collector.run()


async def collect(services: Services) -> None:
    """Garbage collection twice, and what hosts do for it."""
    store, contents = services.store, services.rig.objects.contents
    writer = store.begin_backup(index=ChunkIndex(None, store.id))
    writer.renew_lease()
    with refused_deletes(services.rig.objects):
        store.remove_pin(VmId("7" * 32), PointId("8" * 32), PlaceholderId("9" * 32))
    index = ChunkIndex(None, store.id)  # of a host that was cut short
    index.add(PackId("b" * 32), [])
    index.sync(store.objects)
    with closing(Reachability(None, store.id, store.objects, workers=1)) as reachability:
        manifests = [key for key in contents if key.startswith(MANIFESTS) and "." not in key]
        reachability.look([f"{key}.{'5' * 16}.pending" for key in manifests])  # they are committed by now
    lost = {key: contents.pop(key) for key in list(contents) if key.startswith(SEGMENTS)}
    try:
        _collect(store, lag_s=services.rig.objects.lag_s)
        raise NotWhole("segments are lost, and garbage collection does not mind")
    except ObjectMissing:
        pass
    finally:
        contents.update(lost)
    for _ in range(2):
        _collect(store, lag_s=services.rig.objects.lag_s)
    left = {key.split("/")[0] for key in contents} - {
        STORE_KEY,
        "claims",
        "index",
        "manifests",
        "moved",
        "packs",
        "pins",
        "segments",
    }
    if not services.files.spoiled and left != {"dead"}:
        raise NotWhole(f"garbage collection has left {sorted(left)}")
    if len([key for key in contents if key.startswith(CLAIMS)]) != 2 and not services.files.spoiled:
        raise NotWhole("garbage collection has left claims that do not count, or none")


async def change_keys(services: Services) -> None:
    """An encrypted store is made, twice, and opened; a key is added, and taken away; its version is raised."""
    objects = SitedObjects(FakeObjects(), services.files)
    store = Store.open_or_create(objects, chunk_size=CHUNK, source=KEY_SOURCE)
    other = replace(KEY_SOURCE, secret=bytes(32))
    added = add_key(objects, look_at(objects), KEY_SOURCE, other)
    try:
        Store.create(objects, chunk_size=CHUNK, source=KEY_SOURCE)
        raise NotWhole("a store was made in the place of another one")
    except AlreadyExists:
        pass
    for source in (KEY_SOURCE, other):
        if Store.open(objects, source).key != store.key:
            raise NotWhole("another key than the store's")
    remove_key(objects, look_at(objects), KEY_SOURCE, added.key_id)
    with patch.object(store_format, "STORE_VERSION", store_format.STORE_VERSION + 1):
        raise_version(objects, store.description, store_format.STORE_VERSION)
    try:
        Store.open(objects, other)
        raise NotWhole("a store of an unknown version was opened")
    except UnknownFormat:
        pass


async def keep_history(services: Services) -> None:
    """What the daemon keeps beside the disks, each damaged once."""
    base, files = services.rig.base, services.files
    for path in (base / "catalog.sqlite", base / "index.sqlite"):
        if not path.exists():
            path.write_bytes(b"damaged" * 100)
    Catalog.open(base / "catalog.sqlite", files=files).close()
    lost: list[Exception] = []
    index = ChunkIndex(base / "index.sqlite", services.rig.store.id, files=files, on_lost=lost.append)
    try:
        index.sync(SitedObjects(services.rig.objects, files))
    finally:
        index.close()


async def serve_beside_others(services: Services) -> None:
    """The mark of another host that stands still, and that of a daemon that was killed here, are followed.

    The first was set aside by a start that was cut short.
    """
    place, files, pace = services.rig.base / "served", services.files, Pace(interval_s=0.01, held_s=60, still_s=0)
    place.mkdir(exist_ok=True)
    (place / "reserve").write_bytes(bytes(BLOCK))
    (place / "serving.aside.over").write_bytes(encode_mark(Mark(Machine("other", "ab" * 16, "other"), "cd" * 16, 0)))
    (place / "serving.cut-short").touch()
    for machine in (Machine("ours", "ef" * 16, "host1"), killed := Machine("other", "ab" * 16, "other")):
        if machine is killed:
            (place / "serving").write_bytes(encode_mark(Mark(killed, "cd" * 16, 0)))
        mark = ServingMark.take(place, place, machine=machine, pace=pace, files=files)
        try:
            if not mark.renew():
                raise NotWhole("a mark is not its own")
        finally:
            mark.end()
    if not files.spoiled and (left := {path.name for path in place.iterdir()}) != {"reserve", "serving.spare"}:
        raise NotWhole(f"left over: {left}")


async def use_datastore(services: Services) -> None:
    """An operator lists the disks and has the VM brought back."""
    await with_datastore(services, "", _list_and_recall)


async def back_up_by_rules(services: Services) -> None:
    """A backup after which the one before it is not wanted any more."""
    await with_datastore(services, "[retention]\nkeep_last = 1\n", _back_up_and_forget)


async def _list_and_recall(datastore: Datastore, services: Services) -> None:
    if len(await datastore.list_disks("vm")) != len(PATHS):
        raise OSError(errno.EIO, "a disk is not listed")
    await datastore.usage.sampler.sample()
    if datastore.usage.sampler.links is None:
        raise NotWhole("nobody knows which VM the domain is")
    await done(datastore, await datastore.start_recall(["vm"], peer=ROOT_PEER))


async def protect_and_decide(services: Services) -> None:
    """A VM that came back once is protected, then no longer; the policy changes nothing."""
    sizes = "placeholder_bytes_min = 1\nresident_head_bytes = 0\nresident_tail_bytes = 0\n"
    await with_datastore(services, f"[archive]\n{sizes}", _protect_and_decide)


async def _protect_and_decide(datastore: Datastore, services: Services) -> None:
    for protected in (True, False):
        await datastore.protect(["vm"], protected=protected, peer=ROOT_PEER)
        rows = await datastore.policy()
        if not rows:
            raise OSError(errno.EIO, "a VM that cannot be read")
        (row,) = rows
        if (row.protected, row.archives, "is protected" in row.reason) != (protected, False, protected):
            raise NotWhole(f"protected is {protected}, and {row.reason}")
        if protected:
            info = await ended(datastore, await datastore.start_archive(["vm"], peer=ROOT_PEER))
            if info.state == "done":
                raise NotWhole("a protected VM is archived")
            if "is protected" not in str(info.error):
                raise OSError(errno.EIO, str(info.error))
            continue
        if not services.files.spoiled and "was recalled" not in row.reason:
            raise NotWhole(f"it came back just now, and {row.reason}")


async def _back_up_and_forget(datastore: Datastore, services: Services) -> None:
    """What goes wrong with forgetting fails no backup, and is told."""
    job = await datastore.start_backup(["vm"], archive=False, peer=ROOT_PEER)
    try:
        info = await done(datastore, job)
    except VmfsStubError as exc:
        if services.files.spoiled & {"store.forgotten.list", "store.forgotten.put"}:
            raise NotWhole(f"a backup failed by what comes after it: {exc}") from exc
        raise
    (outcome,) = JobReport.model_validate(info.result).vms
    if "log has the traceback" in outcome.message:
        raise NotWhole(f"a programming error: {outcome.message}")
    failed = services.files.spoiled & {"store.forgotten.list", "store.forgotten.put", "store.manifest.list"}
    wanted = "could be forgotten: planted" if failed else "older restore points forgotten: 1"
    if wanted not in outcome.message and (failed or not services.files.spoiled):
        raise NotWhole(f"not told what was forgotten: {outcome}")


OWNER = Requester(pid=1, uid=0, gid=0, umask=0o022)


async def use_mount(services: Services) -> None:
    """What a program does to names and attributes through the mount."""
    rig = services.rig
    settings = MountSettings(name="vms")
    filesystem = Filesystem(
        rig.backing, disks=services.disks, threads=services.threads, files=services.files, settings=settings
    )
    try:
        await _use(filesystem, f"top{len(list(rig.backing.iterdir()))}".encode())
    finally:
        await filesystem.aclose()


async def _use(filesystem: Filesystem, name: bytes) -> None:
    top = (await filesystem.mkdir(ROOT, name, 0o755, OWNER)).ino
    made = (await filesystem.mknod(top, b"node", stat.S_IFREG | 0o644, 0, OWNER)).ino
    handle, created = await filesystem.create(top, b"file", 0o644, os.O_RDWR, OWNER)
    await filesystem.write(handle, 0, b"text")
    await filesystem.fsync(handle, data_only=False)
    await filesystem.unlink(top, b"file")
    await filesystem.release(handle)
    await filesystem.inodes.close_descriptors([fd for fd in [filesystem.inodes.forget(created.ino, 1)] if fd])
    link = (await filesystem.symlink(top, b"symlink", b"nowhere", OWNER)).ino
    assert await filesystem.readlink(link) == b"nowhere"
    await filesystem.link(made, top, b"other")
    await filesystem.rename(top, b"other", top, b"third", flags=0)
    await filesystem.rename(top, b"third", top, b"node", flags=0)
    await filesystem.setattr(made, Change(mode=0o600, uid=1, gid=1, atime_ns=1, mtime_ns=2), OWNER)
    await filesystem.setattr(top, Change(atime_ns=1, mtime_ns=2), OWNER)
    await filesystem.setattr(ROOT, Change(mode=0o750), OWNER)
    await filesystem.setxattr(made, b"user.a", b"value", OWNER)
    assert await filesystem.getxattr(made, b"user.a") == b"value"
    assert b"user.a" in await filesystem.listxattr(made)
    await filesystem.removexattr(made, b"user.a")
    await filesystem.statfs()
    directory = await filesystem.opendir(top)
    await filesystem.readdir(directory, 0, lambda entry: True)
    await filesystem.fsyncdir(directory)
    await filesystem.releasedir(directory)
    await filesystem.lookup(top, b"node")
    for each in (b"node", b"third", b"symlink"):
        try:
            await filesystem.unlink(top, each)
        except FileNotFoundError:
            continue
    await filesystem.rmdir(ROOT, name)


async def contents_of(services: Services, path: str) -> bytes:
    disk = await services.open(path)
    try:
        most = bytes(await disk.read(0, max(0, disk.fstat().st_size - BLOCK)))
        return most + await disk.read(len(most), 2 * BLOCK)  # a small one, over the end
    finally:
        await services.disks.release(disk)


def expect(found: bytes, wanted: bytes, path: str) -> None:
    """Raises NotWhole where they differ."""
    if found != wanted:
        at = next((at for at in range(0, len(wanted), BLOCK) if found[at : at + BLOCK] != wanted[at : at + BLOCK]), -1)
        raise NotWhole(f"{path}: {len(found)} of {len(wanted)} bytes; block {at // BLOCK} is wrong")


SCENARIOS = [
    Scenario("archive", nothing, archive),
    Scenario("archive_again", partly_recalled, archive),
    Scenario("archive_undone", nothing, archive_undone),
    Scenario("archive_unmapped", nothing, archive_unmapped),
    Scenario("archive_unrecorded", nothing, archive_unrecorded, again=False),
    Scenario("archive_without_room", nothing, archive_without_room),
    Scenario("archive_condemned", returned, archive_condemned),
    Scenario("archive_damaged_segments", with_damaged_segments, archive),
    Scenario("stop_and_archive", with_guest, stop_and_archive, has_guest=True),
    Scenario("save_and_archive", with_guest_to_save, stop_and_archive, has_guest=True),
    Scenario("back_up_at_rest", with_agent, back_up_at_rest, has_guest=True),
    Scenario("save_at_top_and_archive", with_guest_to_save_at_top, stop_and_archive, has_guest=True),
    Scenario("archive_domain", with_domain, archive_domain),
    Scenario("group_files", with_loose_disks, group_files),
    Scenario("look_at_chains", with_domain, look_at_chains),
    Scenario("look_at_archived_chains", with_domain_archived, look_at_chains),
    Scenario("back_up", nothing, back_up),
    Scenario("back_up_placeholder", partly_recalled, back_up),
    Scenario("back_up_untouched", backed_up, back_up),
    Scenario("back_up_written", written_since, back_up),
    Scenario("back_up_being_written", being_written, back_up),
    Scenario("back_up_damaged_segments", with_damaged_segments, back_up),
    Scenario("back_up_condemned", backed_up, back_up_condemned),
    Scenario("back_up_in_use", backed_up, back_up_in_use),
    Scenario("back_up_placeholder_in_use", archived, back_up_in_use),
    Scenario("back_up_cloned_in_use", nothing, back_up_cloned_in_use),
    Scenario("back_up_undone_in_use", backed_up, back_up_undone_in_use),
    Scenario("back_up_by_rules", backed_up, back_up_by_rules),
    Scenario("archive_written", written_since, archive),
    Scenario("write_after_backup", backed_up, write_and_sync, WRITES),
    Scenario("write_again", being_written, write_and_sync, WRITES),
    Scenario("write_and_end", backed_up, write_and_end, WRITES),
    Scenario("write_unnoted", backed_up, write_unnoted, WRITES),
    Scenario("truncate_after_backup", backed_up, truncate, ((CUT, bytes(FULL - CUT)),), (FULL, CUT)),
    Scenario("unlink_after_backup", backed_up, unlink, gone=LAST, again=False),
    Scenario("fail_to_sync", backed_up, fail_to_sync),
    Scenario("recall", archived, read),
    Scenario("archive_twice", with_replica, archive),
    Scenario("archive_twice_again", partly_recalled_twice, archive),
    Scenario("recall_from_replica", archived_twice, read_from_replica),
    Scenario("replicate_store", nothing, replicate_store),
    Scenario("scrub_replicated", nothing, scrub_replicated),
    Scenario("hydrate", archived, read_until_ordinary, hydrates=True),
    Scenario("write_and_sync", archived, write_and_sync, WRITES),
    Scenario("truncate", archived, truncate, ((CUT, bytes(FULL - CUT)),), (FULL, CUT)),
    Scenario("unlink", archived, unlink, gone=LAST, again=False),
    Scenario("unlink_open", archived, unlink_open, gone=LAST, again=False),
    Scenario("graduate", partly_recalled, bring_back),
    Scenario("adopt", lost, adopt, brings=True),
    Scenario("adopt_after_failed_rename", lost, adopt_after_look, brings=True),
    Scenario("restore", archived, restore),
    Scenario("restore_undone", archived, restore_undone),
    Scenario("restore_domain", with_domain_archived, restore_with_domain),
    Scenario("check_store", archived, check_store),
    Scenario("scrub_store", nothing, scrub_store),
    Scenario("collect", with_garbage, collect),
    Scenario("repack", mostly_garbage, repack),
    Scenario("change_keys", archived, change_keys),
    Scenario("keep_history", archived, keep_history),
    Scenario("serve_beside_others", archived, serve_beside_others),
    Scenario("use_mount", archived, use_mount),
    Scenario("use_datastore", archived, use_datastore),
    Scenario("protect_and_decide", returned, protect_and_decide),
    Scenario("start_with_unfinished_map", unfinished, start_only),
    Scenario("start_after_kill_while_punching", killed("archive.punch", archive), start_only),
    Scenario("start_after_kill_at_commit", killed("archive.record_sync", archive), start_only),
    Scenario(
        "start_after_kill_at_second_commit", killed("archive.record_sync", archive, after=partly_recalled), start_only
    ),
    Scenario("start_after_kill_before_commit", killed("archive.record", archive), start_only),
    Scenario(
        "start_after_kill_while_replicating",
        killed("replica.segment.put", archive, after=with_replica),
        start_only,
    ),
    Scenario("start_after_kill_with_pin", killed("store.pending.put", archive), start_only),
    Scenario("start_after_kill_while_recalling", killed("recall.fill", read_a_chunk, after=archived), start_only),
    Scenario("start_after_kill_while_writing", killed("sync.data", write_and_sync, after=archived), start_only, WRITES),
    Scenario("start_after_kill_while_graduating", killed("graduate.record", bring_back, after=archived), start_only),
    Scenario("start_after_kill_after_graduation", killed("graduate.sync", bring_back, after=archived), start_only),
    Scenario("start_after_kill_while_removing", killed("mount.unlink", unlink, after=archived), start_only),
    Scenario("start_after_kill_after_removal", killed("remove.sync", unlink, after=archived), start_only, gone=LAST),
    Scenario("start_with_changes_of_others", with_changes_of_others, start_only),
    Scenario("start_after_kill_after_write", being_written, start_only),
    Scenario("start_after_kill_while_adopting", killed("adopt.rename", adopt, after=lost), start_only, brings=True),
    Scenario("start_after_kill_after_adoption", killed("adopt.clean", adopt, after=lost), start_only),
    Scenario("start_hydrating", hydrating, start_only, hydrates=True),
]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
