"""Random lives of one disk, compared with a bytearray after every step.

A *play* takes its decisions from one seed: what guests, operators and fate do to the disk.  What must hold:

* every read returns what the model holds, and so does every block without being read: what is resident from the file,
  what is absent from what was archived;
* after a kill nothing that was acknowledged is lost;
* after a power loss each block is one of those that it was since the last sync (a write across the end of the file may
  be torn there), and the size is, too;
* the reported modification time is that of a plain file that had the same done to it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio
import trio.testing

from tests.datastore_harness import BLOCK, CHUNK, DEADLINE_S, Killed, Rig, Services, survives_kill, temporary_rig
from vmfs_stub.core.errors import RecallError, StoreError, StoreUnavailable
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.residency import block_count
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.restore import restore_point

PATH = "vm/disk.img"
SIZE_MAX = 12 * CHUNK
CLOCK_STEP_NS = 50_000_000
"""A kernel's file times are as coarse as its timer."""


class Wrong(AssertionError):
    """The disk is not what it should be."""


@dataclass
class Model:
    """What the disk must be.  ``versions`` are its contents since the last moment when all of it was durable."""

    content: bytearray
    versions: list[bytes] = field(default_factory=list)
    mtime_ns: int = 0
    archived: dict[PointId, bytes] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    """Every size that it had."""

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(data)] = data
        self.changed()

    def write_in_any_order(self, writes: Sequence[tuple[int, bytes]]) -> None:
        """Writes at once that do not overlap: in between, any of them may have been done."""
        before = bytes(self.content)
        for done in itertools.product((False, True), repeat=len(writes)):
            self.content[:] = before
            for (offset, data), is_done in zip(writes, done, strict=True):
                if is_done:
                    self.content[offset : offset + len(data)] = data
            self.changed()

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        self.changed()

    def changed(self) -> None:
        self.ends.add(len(self.content))
        self.versions.append(bytes(self.content))

    def synced(self) -> None:
        self.ends.add(len(self.content))
        self.versions = [bytes(self.content)]

    def _possible(self, at: int, size: int) -> set[bytes]:
        """What the block at ``at`` may be after a power loss.

        One in which the file once ended may be torn there: up to that end as archived, what was written behind it.
        """
        blocks = {version[at : at + BLOCK].ljust(BLOCK, b"\0") for version in self.versions}
        ends = {end - at for end in self.ends if at < end < at + BLOCK}
        torn = {old[:end] + new[end:] for end in ends for old in blocks for new in blocks}
        return {block[: size - at] for block in blocks | torn}

    def observed(self, found: bytes) -> None:
        """After a power loss: check what is there, and go on with it."""
        if len(found) not in {len(version) for version in self.versions}:
            raise Wrong(f"size {len(found)} after a power loss, never had it since the last sync")
        for at in range(0, len(found), BLOCK):
            if found[at : at + BLOCK] not in self._possible(at, len(found)):
                raise Wrong(f"block {at // BLOCK} after a power loss is none that it was since the last sync")
        self.content = bytearray(found)
        self.synced()


class Play:
    """One seed's play."""

    def __init__(self, rig: Rig, chosen: random.Random) -> None:
        self.rig = rig
        self.chosen = chosen
        self.model = Model(bytearray(self.data(chosen.randrange(SIZE_MAX // 2))))
        rig.make_disk(PATH, bytes(self.model.content))
        self.model.synced()
        self.model.mtime_ns = (rig.backing / PATH).stat().st_mtime_ns
        self.handles: list[Disk] = []
        self.services: Services
        self.steps: list[str] = []
        self.vm_id = VmId("")
        self.power_goes = False
        """Set by a step after which a power loss is most telling."""
        self.hydrates = chosen.random() < 0.3

    # A whole play

    async def run(self, step_count: int) -> None:
        """All lives of the disk.  Raises Wrong, or what a service raises that it should not."""
        left = step_count
        power_lost = False
        while left > 0:
            lives_for = min(left, self.chosen.randint(2, 14))
            end = self.chosen.choice((self._end_cleanly, self._end_by_kill, self._end_by_power_loss))
            with survives_kill():
                async with self.rig.running(hydrates=self.hydrates) as self.services:
                    self.expect(not self.services.recovered.findings, f"{self.services.recovered.findings}")
                    await self._begin(power_lost)
                    power_lost = False
                    for _ in range(lives_for):
                        await self._step()
                        if self.power_goes:
                            end, self.power_goes = self._end_by_power_loss, False
                            break
                    left -= lives_for
                    self.steps.append(end.__name__)
                    power_lost = await end()
            if power_lost:
                self.rig.lose_power(self.chosen)
        async with self.rig.running() as self.services:
            await self._begin(power_lost)
            await self._read_all()
            await self._release_all()
            await self._bring_back()
            self.expect((self.rig.backing / PATH).read_bytes() == self.model.content, "the ordinary file differs")

    async def _begin(self, power_lost: bool) -> None:
        if power_lost:
            disk = await self._open()
            self.model.observed(self.logical(disk))
            self.model.mtime_ns = self.services.mtime_ns(PATH)
        else:
            self.check_mtime()

    async def _end_cleanly(self) -> bool:
        await self._release_all()
        # A placeholder is laid down durable; a plain file's data is the guest's to sync.
        return False

    async def _end_by_kill(self) -> bool:
        self.handles.clear()
        self.services.files.kill()
        raise Killed

    async def _end_by_power_loss(self) -> bool:
        self.handles.clear()
        self.services.files.kill()
        return True

    async def _step(self) -> None:
        acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (20, self._read),
            (20, self._write),
            (5, self._truncate),
            (6, self._sync),
            (5, self._release),
            (3, self._set_times),
            (3, self._sync_all),
            (9, self._archive),
            (3, self._back_up),
            (2, self._bring_back),
            (2, self._restore),
            (3, self._outage),
            (6, self._storm),
            (3, self._crossed_syncs),
        ]
        act = self.chosen.choices([act for _, act in acts], [weight for weight, _ in acts])[0]
        self.steps.append(act.__name__)
        await act()
        for disk in self.handles[:1]:
            self.expect(self.logical(disk) == self.model.content, "contents differ")
        self.check_mtime()

    # Checks

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise Wrong(f"{what}; steps: {' '.join(self.steps)}")

    def check_mtime(self) -> None:
        found = self.services.mtime_ns(PATH)
        self.expect(found == self.model.mtime_ns, f"mtime {found}, not {self.model.mtime_ns}")

    def _modified(self, not_before_ns: int) -> None:
        found = self.services.mtime_ns(PATH)
        self.expect(not_before_ns - CLOCK_STEP_NS <= found <= time.time_ns(), f"mtime {found} after a change")
        self.model.mtime_ns = found

    def logical(self, disk: Disk) -> bytes:
        """What a read of everything would return, found without one, so that residency stays as it is."""
        size = disk.fstat().st_size
        content = bytearray(os.pread(disk.fd, size, 0))
        placeholder = disk.placeholder
        if placeholder is not None and not placeholder.ended:
            archived = self.model.archived[placeholder.maps.record.point_id]
            for run in placeholder.maps.live.absent_runs(0, block_count(size)):
                start, end = run.start * BLOCK, min(run.end * BLOCK, placeholder.maps.live.archived_limit, size)
                content[start:end] = archived[start:end]
        return bytes(content)

    # What guests do

    def data(self, size: int) -> bytes:
        """Bytes as guests write them: some random, some zeros, some seen before."""
        parts = bytearray()
        while len(parts) < size:
            length = self.chosen.choice((100, BLOCK, CHUNK))
            kind = self.chosen.randrange(4)
            if kind == 0:
                parts += bytes(length)
            elif kind == 1:
                parts += bytes([self.chosen.randrange(3)]) * length
            else:
                parts += self.chosen.randbytes(length)
        return bytes(parts[:size])

    def place(self, *, beyond: int = 0) -> tuple[int, int]:
        """Offset and length of an access; often at the borders of blocks and chunks."""
        unit = self.chosen.choice((1, 512, BLOCK, CHUNK))
        end = max(1, (len(self.model.content) + beyond) // unit)
        offset = self.chosen.randrange(end) * unit
        length = max(1, self.chosen.choice((1, 100, BLOCK, 3 * BLOCK, CHUNK, CHUNK + BLOCK + 5)))
        if self.chosen.random() < 0.5:
            length = self.chosen.randint(1, length)
        return offset, min(length, SIZE_MAX - offset) if offset < SIZE_MAX else 1

    async def _open(self) -> Disk:
        if not self.handles or self.chosen.random() < 0.1:
            self.handles.append(await self.services.open(PATH))
        return self.handles[-1]

    async def _release_all(self) -> None:
        while self.handles:
            await self.services.disks.release(self.handles.pop())

    async def _read(self) -> None:
        disk = await self._open()
        offset, length = self.place(beyond=BLOCK)
        found = await disk.read(offset, length)
        self.expect(found == self.model.content[offset : offset + length], f"read of {length} at {offset} differs")

    async def _read_all(self) -> None:
        disk = await self._open()
        self.expect(await disk.read(0, SIZE_MAX * 2) == self.model.content, "read of everything differs")

    async def _write(self) -> None:
        disk = await self._open()
        offset, length = self.place(beyond=2 * BLOCK if self.chosen.random() < 0.9 else 2 * CHUNK)
        data, started_ns = self.data(length), time.time_ns()
        self.expect(await disk.write(offset, data) == length, "short write")
        self.model.write(offset, data)
        self._modified(started_ns)

    async def _truncate(self) -> None:
        size, started_ns = self.chosen.randrange(len(self.model.content) + CHUNK) % SIZE_MAX, time.time_ns()
        if self.handles or self.chosen.random() < 0.5:
            await (await self._open()).truncate(size)
        else:
            with self.rig.path_fd(PATH) as fd:
                await self.services.disks.truncate(fd, size)
        self.model.truncate(size)
        self._modified(started_ns)

    async def _sync(self) -> None:
        disk = await self._open()
        await disk.sync(data_only=self.chosen.random() < 0.5)
        self.model.synced()

    async def _release(self) -> None:
        if self.handles:
            await self.services.disks.release(self.handles.pop(self.chosen.randrange(len(self.handles))))

    async def _set_times(self) -> None:
        time_ns = self.chosen.choice((1, 10**18, 1_700_000_000_123_456_789))
        if self.handles:
            await self.handles[0].set_times(atime_ns=None, mtime_ns=time_ns)
        else:
            with self.rig.path_fd(PATH) as fd:
                await self.services.disks.set_times(fd, atime_ns=None, mtime_ns=time_ns)
        self.model.mtime_ns = time_ns

    async def _storm(self) -> None:
        """Writers that share blocks, and readers, and perhaps a hydration, at the same time."""
        disk = await self._open()
        size = len(self.model.content)
        if size < 16:
            return
        cuts = sorted(self.chosen.sample(range(size), k=min(size, self.chosen.randint(4, 9))))
        started_ns = time.time_ns()
        writes: list[tuple[int, bytes]] = []
        async with trio.open_nursery() as nursery:
            if self.chosen.random() < 0.4:
                nursery.start_soon(self._bring_back)
            for number, (start, end) in enumerate(itertools.pairwise(cuts)):
                length = min(end - start, CHUNK)
                if number % 2:
                    nursery.start_soon(
                        self._stable_read, disk, start, bytes(self.model.content[start : start + length])
                    )
                else:
                    data = self.data(length)
                    nursery.start_soon(disk.write, start, data)
                    writes.append((start, data))
            if self.chosen.random() < 0.3:
                nursery.start_soon(self.services.disks.sync_dirty)
        self.model.write_in_any_order(writes)
        self._modified(started_ns)

    async def _crossed_syncs(self) -> None:
        """A sync that begins, and then a write and a sync of its own, which must not be served by the first."""
        disk = await self._open()
        offset, length = self.place()
        data, started_ns = self.data(length), time.time_ns()
        self.services.files.instead["sync.data"] = _slowly
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(disk.sync, data_only=True))
                await trio.testing.wait_all_tasks_blocked()
                await disk.write(offset, data)
                await disk.sync(data_only=True)
        finally:
            del self.services.files.instead["sync.data"]
        self.model.write(offset, data)
        self._modified(started_ns)
        self.model.synced()
        self.power_goes = self.chosen.random() < 0.5

    async def _stable_read(self, disk: Disk, offset: int, wanted: bytes) -> None:
        self.expect(await disk.read(offset, len(wanted)) == wanted, "a read beside writes differs")

    # What the daemon and operators do

    async def _sync_all(self) -> None:
        await self.services.disks.sync_dirty()

    async def _archive(self) -> None:
        await self._job(archive=True)

    async def _back_up(self) -> None:
        await self._job(archive=False)

    async def _job(self, *, archive: bool) -> None:
        await self._release_all()
        await self._end_hydration()
        report = await self.services.archive("vm", archive=archive)
        self.vm_id = self.rig.vm("vm").id
        self.model.archived[report.point_id] = bytes(self.model.content)
        if archive and self.model.content:
            self.expect(report.placeholders == [PATH] and not report.abandoned, f"no placeholder: {report}")
            count = int(self.rig.is_placeholder(PATH))
            count += len(self.services.retirement._waiting)
            self.expect(len(self.rig.maps()) == count >= len(self.rig.pins()), "pins or maps are left over")
            self.model.synced()

    async def _end_hydration(self) -> None:
        await self.services.hydration.stop((self.rig.backing / PATH).stat().st_ino)

    async def _bring_back(self) -> None:
        await self.services.bring_back(PATH)
        self.expect(not self.rig.is_placeholder(PATH), "still a placeholder")
        if not self.hydrates:  # else the background course may have graduated it, and be about to retire it
            self.expect(not self.rig.maps() and not self.rig.pins(), "pins or maps are left over")

    async def _restore(self) -> None:
        if not self.model.archived:
            return
        point_id, content = self.chosen.choice(list(self.model.archived.items()))
        to = self.rig.base / "restored"
        point = self.rig.store.open_point(self.vm_id, point_id)
        await trio.to_thread.run_sync(restore_point, self.rig.store, point, to)
        self.expect((to / "disk.img").read_bytes() == content, "what was restored differs")
        shutil.rmtree(to)

    async def _outage(self) -> None:
        """The store is away: what is here works, the rest is an error, and then it is back."""

        def away(call: str, key: str) -> None:
            raise StoreUnavailable("away")

        disk = await self._open()
        await self._end_hydration()
        offset, length = self.place()
        block = offset // BLOCK * BLOCK
        data, started_ns = self.data(BLOCK), time.time_ns()
        self.rig.objects.before = away
        recall, self.services.recall.deadline_s = self.services.recall, 0.1
        try:
            found = await disk.read(offset, length)
        except (StoreError, RecallError):
            pass
        else:
            self.expect(found == self.model.content[offset : offset + length], "read without a store differs")
        try:
            await disk.write(block, data)
            self.model.write(block, data)
            self._modified(started_ns)
        finally:
            self.rig.objects.before = lambda call, key: None
            recall.deadline_s = DEADLINE_S
            recall._timed_out_s.clear()


def _slowly(function: Callable[[int], None], fd: int) -> None:
    time.sleep(0.003)


def play(seed: int, *, step_count: int = 40) -> None:
    """Play one seed.  Raises what is found, with the seed."""
    chosen = random.Random(seed)
    with temporary_rig(head=chosen.choice((0, BLOCK, 100_000)), tail=chosen.choice((0, BLOCK, 100_000))) as rig:
        found = Play(rig, chosen)
        try:
            trio.run(found.run, step_count, strict_exception_groups=True)
        except BaseException as exc:
            exc.add_note(f"seed {seed}, after {' '.join(found.steps)}")
            raise
