"""Random lives of one datastore, compared with bytes in memory: several disks in one or two VMs.

A *play* takes its decisions from one seed: what guests, operators and fate do.  A daemon's life ends cleanly, by a kill
between two steps or in the middle of one (at any file or store call; up to three calls that were in progress happen
later), or with the power.  What must hold:

* every read returns what the model holds, and so does every block without being read: what is resident from the file,
  what is absent from the store;
* after a kill nothing that was acknowledged is lost, and what was under way is done or not, block by block;
* after a power loss each block is one of those that it was since the last sync (a write across the end of the file may
  be torn there), the size is, too, and each name is one of those that it was since its directory was last synced;
* every restore point has of each file what it was when it was made, however little of it was read: in half of the plays
  what stat says of a file is always believed, so that what is noted of its changes must do;
* while the store says that a VM is free, nobody has changed a placeholder of it since its restore point was made;
* every placeholder is pinned, and its restore point can be restored, although what is not pinned may be pruned;
* start-up has no finding but copies of placeholders, and these give errors;
* once a start has done what a crash left to do, no map, pin or volatile map is left of what is no placeholder;
* the reported modification time is that of a plain file that had the same done to it.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, Services, survives_kill, temporary_rig
from tests.medium import Key, key_of, key_of_fd
from tests.model import guest_steps, operator_steps
from tests.model.contents import Contents, Wrong
from tests.model.guest import Guest, Handle
from tests.model.life import Life
from tests.model.names import Names
from tests.seeded_ids import ids_from
from tests.store_fakes import FakeObjects
from tests.store_places import Place, in_fake
from tests.store_points import KEY_SOURCE
from vmfs_stub.core.errors import DatastoreLocked, IdentityMismatch, VmfsStubError
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.names import PLACEHOLDER_XATTR, PRIVATE_DIR
from vmfs_stub.core.residency import block_count
from vmfs_stub.primary.changed_record import Seen
from vmfs_stub.primary.record import PlaceholderRecord, decode_record
from vmfs_stub.services import recall
from vmfs_stub.services.single_error import single_error
from vmfs_stub.store.claims import Claim, ClaimState, newest_claim
from vmfs_stub.store.keys import MANIFESTS, PENDING_SUFFIX, manifest_key, pin_key
from vmfs_stub.store.manifest import FileKind
from vmfs_stub.store.store import Store

Step = Callable[["Play"], Awaitable[None]]
STEPS: tuple[tuple[int, Step], ...] = (*guest_steps.STEPS, *operator_steps.STEPS)

CLOCK_STEP_NS = 50_000_000
"""A kernel's file times are as coarse as its timer."""
FAVOUR = 8
ENDS_BYTES = (0, BLOCK, 100_000)
"""How much may stay resident at either end of a disk."""
MEMORY = Path("/dev/shm")
"""Most plays are in memory; others on the disk, where inode numbers are used again."""


class Play:
    """One seed's play; ``chosen`` takes all decisions.  Steps whose names are ``favoured`` are taken more often."""

    def __init__(self, rig: Rig, chosen: random.Random, favoured: Collection[str] = ()) -> None:
        self.rig = rig
        self.chosen = chosen
        self._weights = [weight * (FAVOUR if act.__name__ in favoured else 1) for weight, act in STEPS]
        self.names = Names()
        self.vms = chosen.choice((["a"], ["a"], ["a", "b"]))
        self.guest: Guest
        self.life: Life
        self.services: Services
        self.steps: list[str] = []
        self.hydrates = chosen.random() < 0.3
        self.believes_stat = chosen.random() < 0.5
        """Whether what is known of changes is believed, whatever stat says: then nobody writes behind the mount."""
        self.ended_cleanly = False
        self.is_shaken = False
        """A sync has failed since the last power loss: what then fails may."""
        self.ends_soon = False
        """Set by a step after which a power loss is most telling."""
        self._bits_of_before: set[str] = set()
        """Volatile maps of earlier boots: nobody needs to know of them."""
        self._stored: dict[tuple[str, int], bytes] = {}
        quiet = FakeObjects()
        quiet.contents = rig.objects.contents
        self.quiet_store = Store(quiet, rig.store.description, rig.store.key)
        for vm in self.vms:
            for number in range(chosen.randint(1, 3)):
                self._make(f"{vm}/disk{number}")

    def _make(self, path: str) -> None:
        contents = Contents(bytearray(guest_steps.data(self, self.chosen.randrange(4 * CHUNK))))
        self.rig.make_disk(path, bytes(contents.content))
        contents.key = key_of(self.rig.backing / path)
        contents.mtime_ns = (self.rig.backing / path).stat().st_mtime_ns
        self.names.made(path, contents)

    # A whole play

    async def run(self, step_count: int) -> None:
        """All lives of the datastore.  Raises Wrong, or what a service raises that it should not."""
        with _stat_believed() if self.believes_stat else contextlib.nullcontext():
            await self._live_all(step_count)

    async def _live_all(self, step_count: int) -> None:
        left, power_lost, was_killed = step_count, False, False
        while left > 0:
            lives_for = min(left, self.chosen.randint(2, 14))
            left -= lives_for
            power_lost, was_killed = await self._live(lives_for, after_power_loss=power_lost, after_kill=was_killed)
            self._between_lives()
        self.hydrates = False
        await self._live(0, after_power_loss=power_lost, after_kill=was_killed, is_last=True)

    async def _live(
        self, step_count: int, *, after_power_loss: bool, after_kill: bool, is_last: bool = False
    ) -> tuple[bool, bool]:
        """One life; returns whether it ended with a power loss, and whether by a kill."""
        self.life = Life(self.rig.medium, random.Random(self.chosen.random()))
        self.rig.objects.before = self._before_store_call
        end = "cleanly" if is_last else self.chosen.choice(("cleanly", "cleanly", "by a kill", "with the power"))
        if end != "cleanly" and self.chosen.random() < 0.3:
            self.life.kill_in = self.chosen.randint(1, 30)  # perhaps while it starts
        begun = False
        with survives_kill():
            try:
                async with self.rig.running(files=self.life, hydrates=self.hydrates) as self.services:
                    self.guest = Guest(self.services)
                    try:
                        begun = True
                        self._begin(after_power_loss=after_power_loss, after_kill=after_kill)
                        await self._take_steps(step_count)
                        if is_last:
                            await self._do(Play._look_at_everything)
                        if end != "cleanly" or self.ends_soon:
                            self.life.kill()
                            raise Killed
                        await self.guest.end()
                    finally:
                        self.guest.drop()
            except DatastoreLocked:
                self.rig.finish_dying()
                return after_power_loss, after_kill
        self.note_failed_sync()
        self.ended_cleanly = not self.life.dead
        self.expect(self.life.dead or end == "cleanly", "it was to be killed, and was not")
        if not self.life.dead:
            return False, False
        loses_power = self.ends_soon or end == "with the power" or self.chosen.random() < 0.3
        self.steps.append("power" if loses_power else "kill")
        self.ends_soon = False
        if loses_power:
            self._lose_power()
        # What a life that ended too early should have looked at is still to be looked at.
        return loses_power or (after_power_loss and not begun), True

    def _before_store_call(self, call: str, key: str) -> None:
        self.life.store_call(call, key)
        if call == "put" and key.startswith(("pins/", MANIFESTS)) and self.life.chosen.random() < 0.3:
            self.prune(self.life.chosen)

    def prune(self, chosen: random.Random | None = None) -> None:
        """Some restore points that are not pinned are gone."""
        there = self.rig.objects.contents
        pinned = {tuple(key.split("/")[1:3]) for key in there if key.startswith("pins/")}
        for key in [key for key in there if key.startswith(MANIFESTS) and not key.endswith(PENDING_SUFFIX)]:
            if tuple(key.split("/")[1:3]) not in pinned and (chosen or self.chosen).random() < 0.5:
                del there[key]

    def _lose_power(self) -> None:
        if self.chosen.random() < 0.7:
            self.rig.finish_dying()
        renumbered = self.rig.lose_power(self.chosen)
        self.is_shaken = False
        self._bits_of_before = {path.stem for path in (self.rig.runtime / "maps").glob("*")}
        for contents in self.names.everything():
            contents.key = renumbered.get(contents.key, contents.key) if contents.key else None
            contents.power_lost()

    def _between_lives(self) -> None:
        if self.chosen.random() < 0.5:
            self.rig.settings = replace(
                self.rig.settings,
                resident_head_bytes=self.chosen.choice(ENDS_BYTES),
                resident_tail_bytes=self.chosen.choice(ENDS_BYTES),
            )
        if self.chosen.random() < 0.08:
            self._copy_a_placeholder()
        if self.ended_cleanly and not self.believes_stat and not self.is_shaken and self.chosen.random() < 0.2:
            self._write_behind()

    def _write_behind(self) -> None:
        """Somebody writes to an ordinary file in the backing directory while no daemon runs, and sets its time back."""
        ordinary = [
            path
            for path in self.disks()
            if (contents := self.names.now[path]).is_settled and contents.content and not self.is_placeholder(contents)
        ]
        if not ordinary:
            return
        path = self.chosen.choice(ordinary)
        contents, full = self.names.now[path], self.rig.backing / path
        offset = self.chosen.randrange(len(contents.content))
        written = guest_steps.data(self, min(BLOCK, len(contents.content) - offset))
        st = full.stat()
        with full.open("r+b") as file:
            file.seek(offset)
            file.write(written)
        if self.chosen.random() < 0.5:
            os.utime(full, ns=(st.st_atime_ns, st.st_mtime_ns))
        contents.content[offset : offset + len(written)] = written
        contents.mtime_ns = full.stat().st_mtime_ns
        contents.synced()
        self.rig.medium.note(full)
        self.steps.append("behind")

    def _copy_a_placeholder(self) -> None:
        """Behind the daemon, as `cp -a` does."""
        placeholders = [path for path, contents in self.names.now.items() if not contents.is_copy]
        placeholders = [path for path in placeholders if self._record(self.rig.backing / path) is not None]
        free = [path for path in guest_steps.paths(self) if not (self.rig.backing / path).exists()]
        if not placeholders or not free:
            return
        source, target = self.rig.backing / self.chosen.choice(placeholders), self.rig.backing / free[0]
        target.write_bytes(source.read_bytes())
        os.setxattr(target, PLACEHOLDER_XATTR, os.getxattr(source, PLACEHOLDER_XATTR))
        self.rig.medium.note(target)
        self.names.made(free[0], Contents(bytearray(), key_of(target), is_copy=True))
        self.steps.append("copied")

    def _begin(self, *, after_power_loss: bool, after_kill: bool) -> None:
        self.names.settle(self._found_names(), power_lost=after_power_loss)
        copies = {path for path, contents in self.names.now.items() if contents.is_copy}
        for subject, error in self.services.recovered.findings:
            path = subject.rpartition("disk ")[2]
            is_copy = isinstance(error, IdentityMismatch) and path in copies
            copies.discard(path)
            self.expect(is_copy or self.is_shaken, f"finding at start: {subject}: {error}")
        self.expect(not copies, f"copies of placeholders that the start did not find: {copies}")
        self._check_nothing_left()

    async def _take_steps(self, step_count: int) -> None:
        for _ in range(step_count):
            if self.ends_soon:
                return
            if self.rig.dying and self.chosen.random() < 0.3:
                self.rig.finish_dying()  # only where a fault is planted: a new daemon waits for them
            act = self.chosen.choices([act for _, act in STEPS], self._weights)[0]
            self.steps.append(act.__name__)
            await self._do(act)
            self.check()

    async def _do(self, act: Step) -> None:
        try:
            with single_error():
                await act(self)
        except (VmfsStubError, OSError) as exc:
            if self.life.dead:
                raise Killed from None
            self.note_failed_sync()
            if not self.is_shaken:
                raise Wrong(f"{act.__name__} failed: {exc}") from exc
        self.note_failed_sync()

    def note_failed_sync(self) -> None:
        """From then on, and until the next boot, what fails may."""
        if self.life.failed_sync is None:
            return
        self.is_shaken = True
        for contents in self.names.everything():
            if contents.key == self.life.failed_sync and not self.is_placeholder(contents):
                contents.is_doubtful = True
        self.life.failed_sync = None

    def synced(self, contents: Contents) -> None:
        """A sync says that all of it is durable, unless another one failed beside it."""
        self.note_failed_sync()
        contents.synced()

    async def _look_at_everything(self) -> None:
        """At the end: every file is read, and can be made an ordinary one."""
        for path, contents in self.names.now.items():
            if contents.is_copy or self.is_shaken:
                continue
            handle = await self.open(path)
            found = await self.guest.read(handle, 0, len(contents.content) + BLOCK)
            self.expect(found == contents.content, f"{path}: what is read differs")
            await self.guest.close(handle)
            await self.services.bring_back(path)
            self.expect(
                (self.rig.backing / path).read_bytes() == contents.content, f"{path}: the ordinary file differs"
            )
        if not self.is_shaken:
            self._check_nothing_left()

    # For steps

    def disks(self) -> list[str]:
        """Names of files that may be used."""
        return [path for path, contents in sorted(self.names.now.items()) if not contents.is_copy]

    def disk(self) -> str | None:
        """One of them, perhaps one that is open."""
        paths = self.disks()
        return self.chosen.choice(paths) if paths else None

    async def open(self, path: str) -> Handle:
        """A handle of this file, whose contents are known then."""
        handle = await self.guest.open(path, self.names.now[path])
        await self.settle(handle)
        return handle

    async def handle(self) -> Handle | None:
        """Some handle: one that is open already, perhaps of an unlinked file, or a new one."""
        if self.guest.handles and self.chosen.random() < 0.6:
            handle = self.chosen.choice(self.guest.handles)
        elif (path := self.disk()) is not None:
            handle = await self.open(path)
        else:
            return None
        await self.settle(handle)
        return handle

    async def settle(self, handle: Handle) -> None:
        """After a kill or power loss: see what is there, and go on with it."""
        if not handle.contents.is_settled:
            if handle.disk.placeholder is not None:
                handle.disk.placeholder.check()
            handle.contents.settle(self.logical(handle))
            handle.contents.mtime_ns = self.mtime_ns(handle.disk.fstat())

    async def close_all_of(self, vm: str) -> None:
        """The VM is shut down, and nothing brings its disks back."""
        inside = [contents for path, contents in self.names.now.items() if path.startswith(f"{vm}/")]
        for handle in self.guest.handles.copy():
            if handle.contents in inside:
                await self.guest.close(handle)
        await self.end_hydration()

    async def end_hydration(self) -> None:
        for contents in self.names.everything():
            if contents.key is not None:
                await self.services.hydration.stop(contents.key.ino)

    def modified(self, contents: Contents, not_before_ns: int, st: os.stat_result) -> None:
        """A change was made just now: the modification time says so."""
        found = self.mtime_ns(st)
        self.expect(not_before_ns - CLOCK_STEP_NS <= found <= time.time_ns(), f"mtime {found} after a change")
        contents.mtime_ns = found

    def mtime_ns(self, st: os.stat_result) -> int:
        override = self.services.disks.stat_override(st)
        return st.st_mtime_ns if override is None else override.mtime_ns

    @staticmethod
    def key_of(handle: Handle) -> Key:
        return key_of_fd(handle.disk.fd)

    def record(self, path: str) -> PlaceholderRecord | None:
        """What the placeholder of that name stands for."""
        return self._record(self.rig.backing / path)

    def is_free(self, path: str) -> bool:
        """Whether it is a placeholder of the very point at which its VM is free."""
        record = self.record(path)
        claim = None if record is None else self.newest_claim(record.vm_id)
        return claim is not None and record is not None and claim.point_id == record.point_id

    def is_placeholder(self, contents: Contents) -> bool:
        return any(self._record(self.rig.backing / path) is not None for path in self.names.paths_of(contents))

    # Checks

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise Wrong(what)

    def check(self) -> None:
        """What holds after every step."""
        found = self._found_names()
        wanted = {path: contents.key for path, contents in self.names.now.items()}
        self.expect(found == wanted, f"the names are {sorted(found)}, not {sorted(wanted)}")
        for path, contents in self.names.now.items():
            record = self._record(self.rig.backing / path)
            if record is not None and not contents.is_copy:
                self._check_pinned(path, record)
                self._check_claimed(path, contents, record)
            if record is None and contents.is_settled and contents.mtime_ns is not None and not contents.is_copy:
                mtime_ns = self.mtime_ns((self.rig.backing / path).stat())
                self.expect(mtime_ns == contents.mtime_ns, f"{path}: mtime {mtime_ns}, not {contents.mtime_ns}")
        for handle in self.guest.handles:
            if handle.contents.is_settled:
                self.expect(self.logical(handle) == handle.contents.content, f"{handle.disk.label}: contents differ")
                mtime_ns = self.mtime_ns(handle.disk.fstat())
                wanted_ns = handle.contents.mtime_ns
                self.expect(wanted_ns in (None, mtime_ns), f"{handle.disk.label}: mtime {mtime_ns}, not {wanted_ns}")

    def _check_pinned(self, path: str, record: PlaceholderRecord) -> None:
        there = self.rig.objects.contents
        pin = pin_key(record.vm_id, record.point_id, record.placeholder_id)
        self.expect(pin in there, f"{path}: the placeholder is not pinned")
        self.expect(manifest_key(record.vm_id, record.point_id) in there, f"{path}: its restore point was pruned")

    def _check_claimed(self, path: str, contents: Contents, record: PlaceholderRecord) -> None:
        """Another host may go on from the point at which a VM is free: that must be all there is."""
        claim = self.newest_claim(record.vm_id)
        if claim is None or claim.state is ClaimState.HELD or not contents.is_settled:
            return
        self.expect(contents.content == self.stored(record), f"{path}: changed, and its VM is free for others")

    def newest_claim(self, vm_id: VmId) -> Claim | None:
        """The claim of a VM that counts."""
        return newest_claim(self.quiet_store.objects, vm_id)

    def _check_nothing_left(self) -> None:
        """Maps and pins are of placeholders, or of what waits for its end."""
        closing = any(lock.locked() for lock in self.services.disks._ino_locks.values())
        if self.hydrates or self.is_shaken or self.services.hydration._courses or closing:
            return  # background work may be about to take them away, or have failed to
        there = {record.placeholder_id for path in self.disks() if (record := self._record(self.rig.backing / path))}
        there |= {record.placeholder_id for h in self.guest.handles if (record := self._record(h.disk.fd))}
        there |= {ended.placeholder_id for ended in self.services.ender._waiting}
        maps = {path.stem for path in self.rig.maps()}
        pins = {key.rpartition("/")[2] for key in self.rig.pins()}
        bits = {path.stem for path in (self.rig.runtime / "maps").glob("*")} - self._bits_of_before
        self.expect(maps <= there, f"maps are left over: {maps - there}")
        self.expect(pins <= there, f"pins are left over: {pins - there}")
        self.expect(bits <= there, f"volatile maps are left over: {bits - there}")
        keys = [contents.key for contents in self.names.now.values()]
        inodes = {str(key.ino) for key in [*keys, *map(self.key_of, self.guest.handles)] if key is not None}
        changes = {
            path.name for path in (self.rig.backing / PRIVATE_DIR / "changes").iterdir() if path.name.isdecimal()
        }
        self.expect(changes <= inodes, f"what is known of files that are gone is left over: {changes - inodes}")

    def logical(self, handle: Handle) -> bytes:
        """What a read of everything would return, found without one, so that residency stays as it is."""
        disk = handle.disk
        size = disk.fstat().st_size
        content = bytearray(os.pread(disk.fd, size, 0))
        placeholder = disk.placeholder
        if placeholder is not None and not placeholder.ended:
            live, record = placeholder.maps.live, placeholder.maps.record
            for run in live.absent_runs(0, block_count(size)):
                start, end = run.start * BLOCK, min(run.end * BLOCK, live.archived_limit, size)
                content[start:end] = self.stored(record)[start:end]
        return bytes(content)

    async def check_point(self, vm: str, point_id: PointId, *, settles: bool) -> None:
        """A restore point that was just made holds what its files are; ``settles``: see what those are, if need be."""
        vm_id = self.rig.vm(vm).id
        for number, stored in enumerate(self.quiet_store.open_point(vm_id, point_id).manifest.files):
            if stored.kind is FileKind.FILE:
                path = f"{vm}/{stored.path}"
                contents = self.names.now[path]
                if settles and not contents.is_settled:
                    await self.guest.close(await self.open(path))
                if contents.is_settled:
                    found = self._stored_file(vm_id, point_id, number)
                    self.expect(found == contents.content, f"{path}: the restore point differs")

    def check_files_of_point(self, vm: str, point_id: PointId, then: Mapping[str, bytes]) -> None:
        """A restore point holds of each of these files what it was ``then``."""
        vm_id = self.rig.vm(vm).id
        for number, stored in enumerate(self.quiet_store.open_point(vm_id, point_id).manifest.files):
            wanted = then.get(f"{vm}/{stored.path}") if stored.kind is FileKind.FILE else None
            if wanted is not None:
                found = self._stored_file(vm_id, point_id, number)
                self.expect(found == wanted, f"{vm}/{stored.path}: the restore point is not of the moment")

    def stored(self, record: PlaceholderRecord) -> bytes:
        """What a placeholder stands for, from the store."""
        return self._stored_file(record.vm_id, record.point_id, record.file_index)

    def _stored_file(self, vm_id: VmId, point_id: PointId, number: int) -> bytes:
        known = self._stored.get((point_id, number))
        if known is None:
            table = self.quiet_store.open_point(vm_id, point_id).chunks(number)
            parts = bytearray()
            for at, ref in enumerate(table.locate(0, -(-table.size // CHUNK))):
                length = min(CHUNK, table.size - at * CHUNK)
                parts += bytes(length) if ref is None else self.quiet_store.fetch([ref])[0]
            known = self._stored[point_id, number] = bytes(parts)
        return known

    def _found_names(self) -> dict[str, Key]:
        found = {}
        for vm in self.vms:
            for path in sorted((self.rig.backing / vm).iterdir()):
                key = key_of(path)
                assert key is not None
                found[f"{vm}/{path.name}"] = key
        return found

    @staticmethod
    def _record(file: Path | int) -> PlaceholderRecord | None:
        try:
            return decode_record(os.getxattr(file, PLACEHOLDER_XATTR), label=str(file))
        except OSError:
            return None


@contextlib.contextmanager
def _stat_believed() -> Iterator[None]:
    """What is known of a file's changes is taken for what it is now."""
    with pytest.MonkeyPatch.context() as patch:
        for question in ("is_content_of", "is_all_of", "is_left_as"):
            patch.setattr(Seen, question, lambda self, st, **kwargs: True)
        yield


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Guests wait for next to nothing that is fetched in the background: they have it fetched as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "MOVER_PATIENCE_S", 0.001)
        yield


def play(seed: int, *, step_count: int = 40, favoured: Collection[str] = (), place: Place = in_fake) -> None:
    """Play one seed, with the store at ``place``; see `Play`.  Raises what is found, with the seed."""
    chosen = random.Random(seed)
    on_disk = seed % 4 == 0 or not MEMORY.is_dir()
    ends = [chosen.choice(ENDS_BYTES) for _ in range(2)]
    parent = Path(tempfile.gettempdir()) if on_disk else MEMORY
    source = KEY_SOURCE if seed % 5 == 0 else None
    with (
        ids_from(seed),
        _impatient() if seed % 2 else contextlib.nullcontext(),
        temporary_rig(head=ends[0], tail=ends[1], parent=parent, source=source, place=place, seed=seed) as rig,
    ):
        found = Play(rig, chosen, favoured)
        try:
            trio.run(found.run, step_count, strict_exception_groups=True)
        except BaseException as exc:
            exc.add_note(f"seed {seed}, after {' '.join(found.steps)}")
            raise
