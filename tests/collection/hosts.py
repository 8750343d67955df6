"""What hosts do with a shared store: back up, forget, pin and let go, collect; and what must be there in the end."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from unittest import mock

from tests.collection.world import Host, HostObjects, World
from tests.store_points import finish, stored_file, write_chunks
from vmfs_stub.core.errors import ObjectMissing, PointNotFound, PointPinned, StoreConflict, StoreUnavailable
from vmfs_stub.core.ids import DatastoreId, PlaceholderId, PointId, VmId
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.claims import Claim, ClaimState, newest_claim, try_claim
from vmfs_stub.store.collector import Collector
from vmfs_stub.store.condemned import decode_condemned
from vmfs_stub.store.keys import CLAIMS, CONDEMNED, LEASES, MANIFESTS, PACKS, PENDING_SUFFIX, SEGMENTS, forgotten_key
from vmfs_stub.store.leases import LEASE_INTERVAL_S
from vmfs_stub.store.moved import Move
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.pins import Pin, encode_pin
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.repacking import Repacking
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy
from vmfs_stub.store.store import Store

CHUNK = 64 << 10
POOL = [bytes([number]) * CHUNK for number in range(1, 13)]
"""Few chunks, so that nearly everything is shared."""
VMS = [VmId(digit * 32) for digit in "1234"]
Point = tuple[VmId, PointId]


@dataclass
class Record:
    """What was promised: the contents of points, and which of them may go."""

    contents: dict[Point, bytes] = field(default_factory=dict)
    forgotten: set[Point] = field(default_factory=set)
    pinned: dict[Point, set[PlaceholderId]] = field(default_factory=dict)
    conflicts: int = 0
    runs: int = 0
    repacked: int = 0
    running: dict[VmId, str] = field(default_factory=dict)
    """Which host uses the VM."""
    starts: int = 0


class Play:
    """Hosts in one world; see `play`."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.record = Record()
        self._random = Random(seed)
        self._first = Host("first")
        self.world.is_calm = True
        self.store = Store.create(HostObjects(self.world, self._first), chunk_size=CHUNK)
        self.world.is_calm = False

    def objects(self, host: Host) -> ObjectStore:
        """With retries, as all of the program has it."""
        policy = RetryPolicy(attempts_max=3)
        pause = lambda seconds: self.world.pause(host, seconds)  # noqa: E731
        return RetryingObjects(HostObjects(self.world, host), policy, sleep=pause, random=self._random.random)

    # Backups

    def back_up(self, host: Host) -> None:
        """One backup after the other."""
        store = Store(self.objects(host), self.store.description)
        index = ChunkIndex(None, store.id)
        while True:
            self.world.pause(host, self._random.random() * 30)
            try:
                self._one_backup(host, store, index, self._random.choice(VMS), self._new_content())
            except StoreConflict:
                self.record.conflicts += 1
            except (StoreUnavailable, ObjectMissing):
                continue

    def _new_content(self) -> bytes:
        """Of the pool, or little of what an earlier point has: of the packs of that one most may soon be garbage."""
        if self._random.random() < 0.3:
            return b"".join(self._random.choices(POOL, k=3))
        earlier = self._random.choice(list(self.record.contents.values())[-8:] or [b""])
        new = [self._random.randbytes(16) * (CHUNK // 16) for _ in range(6)]
        at = self._random.randrange(6) * CHUNK
        return b"".join([earlier[at : at + CHUNK], *new])

    def _one_backup(self, host: Host, store: Store, index: ChunkIndex, vm_id: VmId, content: bytes) -> None:
        writer = store.begin_backup(index=index)
        lease_s = self.world.now_s
        taken = self._random.choice([None, *self.record.contents])
        entries, segments = [], []
        if self._random.random() < 0.3:  # one that may be gone at any moment
            taken = self._random.choice([taken, *sorted(self.record.forgotten)[-8:]])
        if taken in self.record.contents and self._random.random() < 0.5:
            content = self.record.contents[taken]
            with suppress(PointNotFound):
                table = store.open_point(*taken).chunks(0)
                segment_id, segment = table.segment(0)
                writer.reuse_segment(segment_id, segment, chunk_count=table.chunk_count)
                segments = [segment_id]
        if not segments:
            for at in range(0, len(content), CHUNK):
                entries += write_chunks(writer, content[at : at + CHUNK])
                lease_s = self._keep(writer, lease_s)
            finish(writer)
            segments = list(writer.add_file(entries))
        lease_s = self._keep(writer, lease_s)
        for _ in range(self._random.randrange(60) if self._random.random() < 0.2 else 0):  # it has much else to do
            self.world.pause(host, 10.0)
            lease_s = self._keep(writer, lease_s)
        point_id = PointId(f"{self._random.getrandbits(128):032x}")
        files = [stored_file("disk", len(content), segments)]
        placeholder = PlaceholderId(secrets.token_hex(16))
        pins = [Pin(placeholder, host.name, "vms", 0.0, secrets.token_hex(8))] if self._random.random() < 0.3 else []
        writer.commit(vm_id=vm_id, point_id=point_id, vm_name="vm", host=host.name, files=files, metadata={}, pins=pins)
        for pin in pins:
            self.record.pinned.setdefault((vm_id, point_id), set()).add(pin.placeholder_id)
        self.record.contents[vm_id, point_id] = content

    def _keep(self, writer: BackupWriter, renewed_s: float) -> float:
        if self.world.now_s - renewed_s < LEASE_INTERVAL_S:
            return renewed_s
        writer.renew_lease()
        return self.world.now_s

    # Repairs

    def move_frames(self, host: Host) -> None:
        """Copy what some point needs of a pack, as if it were damaged, take long, and tell where it is."""
        store = Store(self.objects(host), self.store.description)
        while True:
            self.world.pause(host, self._random.random() * 100)
            if self.record.contents:
                with suppress(StoreConflict, StoreUnavailable, ObjectMissing, PointNotFound):
                    self._move_frames(host, store, self._random.choice(list(self.record.contents)[-8:]))

    def _move_frames(self, host: Host, store: Store, point: Point) -> None:
        table = store.open_point(*point).chunks(0)
        refs = {ref.offset: ref for ref in table.locate(0, table.chunk_count) if ref is not None}
        pack_id = self._random.choice(sorted({ref.pack_id for ref in refs.values()}))
        wanted = [ref for _, ref in sorted(refs.items()) if ref.pack_id == pack_id]
        writer = store.begin_moves(index=ChunkIndex(None, store.id), clock=lambda: self.world.now_s)
        moves = []
        for ref in wanted:
            writer.stay_alive()
            (new,) = write_chunks(writer, store.fetch_in_place([ref])[0])
            assert new is not None
            moves.append(Move(ref.offset, new.pack_id, new.offset, new.length))
        finish(writer)
        for _ in range(self._random.randrange(60)):
            self.world.pause(host, 10.0)
            writer.stay_alive()
        writer.commit_moves({pack_id: moves})

    # What becomes of points

    def forget(self, host: Host) -> None:
        """Forget points that nobody has pinned, let placeholders end, and make new ones of old points."""
        objects = self.objects(host)
        store = Store(objects, self.store.description)
        record = self.record
        while True:
            self.world.pause(host, self._random.random() * 40)
            if not record.contents:
                continue
            point = self._random.choice(list(record.contents))
            with suppress(StoreUnavailable, PointPinned):
                match self._random.choices((0, 1, 2), (4, 2, 2))[0]:
                    case 0:
                        record.forgotten.add(point)
                        store.forget(*point, host=host.name, why="by hand")
                    case 1 if record.pinned.get(point):
                        placeholder = min(record.pinned[point])
                        record.pinned[point].discard(placeholder)
                        store.remove_pin(*point, placeholder)
                    case 2:
                        self._adopt(host, objects, store, point)

    def _adopt(self, host: Host, objects: ObjectStore, store: Store, point: Point) -> None:
        """First the pin, then a look whether the point stays."""
        pin = Pin(PlaceholderId(secrets.token_hex(16)), host.name, "vms", 0.0, secrets.token_hex(8))
        objects.put(f"pins/{point[0]}/{point[1]}/{pin.placeholder_id}", encode_pin(pin, *point))
        if self._stays(objects, store, point):
            self.record.pinned.setdefault(point, set()).add(pin.placeholder_id)
        else:
            store.remove_pin(*point, pin.placeholder_id)

    def _stays(self, objects: ObjectStore, store: Store, point: Point) -> bool:
        """First the mark, then the point: a collector deletes them in the other order."""
        try:
            objects.size(forgotten_key(*point))
        except ObjectMissing:
            try:
                store.open_point(*point)
            except PointNotFound:
                return False
            return True
        return False

    # Who runs which VM

    def run_vms(self, host: Host) -> None:
        """Take VMs that are free, use each for a while, and set it free."""
        objects, datastore_id = self.objects(host), DatastoreId(secrets.token_hex(16))
        while True:
            self.world.pause(host, self._random.random() * 60)
            vm_id = self._random.choice(VMS[:2])
            with suppress(StoreUnavailable):
                newest = newest_claim(objects, vm_id)
                if newest is not None and newest.state is ClaimState.HELD and newest.datastore_id != datastore_id:
                    continue
                epoch = 1 if newest is None else newest.epoch + 1
                held = Claim(vm_id, epoch, ClaimState.HELD, datastore_id, host.name, "vms", 0.0)
                if try_claim(objects, held) is None:
                    self._run_vm(host, vm_id)
                    free = replace(held, epoch=epoch + 1, state=ClaimState.FREE, point_id=PointId("0" * 32))
                    try_claim(objects, free)  # and others may have gone on before it returns

    def _run_vm(self, host: Host, vm_id: VmId) -> None:
        other = self.record.running.setdefault(vm_id, host.name)
        assert other == host.name, f"{other} and {host.name} use the same VM"
        self.record.starts += 1
        self.world.pause(host, self._random.random() * 100)
        del self.record.running[vm_id]

    # Collectors

    def collect(self, host: Host) -> None:
        """One run of garbage collection after the other, on a cache that is kept."""
        objects = self.objects(host)
        reachability = Reachability(None, self.store.id, objects, workers=1)
        while True:
            self.world.pause(host, self._random.random() * 100)
            with suppress(StoreUnavailable):
                self.record.repacked += self._collector(host, objects, reachability).run().repacked
                self.record.runs += 1

    def _collector(self, host: Host, objects: ObjectStore, reachability: Reachability) -> Collector:
        store = Store(objects, self.store.description)
        return Collector(
            objects,
            reachability,
            lag_s=self.world.lag_s,
            sleep=lambda seconds: self.world.pause(host, seconds),
            say=lambda text: None,
            workers=1,
            repacking=Repacking(store, clock=lambda: self.world.now_s),
        )

    # The end

    def check(self) -> None:
        """Every point that was promised is whole, and after two more runs nothing else is left."""
        self.world.is_calm = True
        self.world.now_s += 10 * self.world.lag_s
        store = Store(HostObjects(self.world, self._first), self.store.description)
        self._check_points(store)
        for _ in range(2):
            self._collect_calmly(store)
        self._check_points(store)
        reachability = Reachability(None, store.id, store.objects, workers=1)
        keys = self._keys(MANIFESTS)
        reachability.look(keys)
        names = [*self._keys(PACKS), *self._keys(SEGMENTS)]
        has = {80: reachability.has_segment, 32: reachability.has_pack}
        left = [name for name in names if not has[len(name.rpartition("/")[2])](name.rpartition("/")[2])]  # type: ignore[operator]
        claims = sorted(self._keys(CLAIMS))
        left += [key for at, key in enumerate(claims[:-2]) if claims[at + 2].startswith(key[:-12])]
        left += [*self._keys(LEASES), *(key for key in keys if key.endswith(PENDING_SUFFIX))]
        for key in self._keys(CONDEMNED):
            listed = decode_condemned(self.world.data(key), key)
            packs, segments = listed.packs | listed.retired, listed.segments
            if not any(map(reachability.has_pack, packs)) | any(map(reachability.has_segment, segments)):
                left.append(key)
        assert left == [], "garbage collection leaves what nothing needs"

    def _collect_calmly(self, store: Store) -> None:
        def sleep(seconds: float) -> None:
            self.world.now_s += seconds

        reachability = Reachability(None, store.id, store.objects, workers=1)
        repacking = Repacking(store, clock=lambda: self.world.now_s)
        Collector(
            store.objects, reachability, lag_s=1, sleep=sleep, say=lambda text: None, workers=1, repacking=repacking
        ).run()

    def _check_points(self, store: Store) -> None:
        record = self.record
        promised = {point for point in record.contents if point not in record.forgotten or record.pinned.get(point)}
        listed = {
            (VmId(vm), PointId(point))
            for _, vm, point in (k.split("/") for k in self._keys(MANIFESTS))
            if "." not in point
        }
        for point in sorted(promised):
            content = self._content(store, point)
            assert content == record.contents[point], f"{point} is not what was backed up"
        for point in sorted(listed - record.forgotten - promised):
            with suppress(PointNotFound):  # a void one
                self._content(store, point)

    def _content(self, store: Store, point: Point) -> bytes:
        table = store.open_point(*point).chunks(0)
        return b"".join(store.fetch([ref])[0] for ref in table.locate(0, table.chunk_count) if ref is not None)

    def _keys(self, prefix: str) -> list[str]:
        return [info.key for info in self.world.listed(prefix)]


def play(seed: int, *, hours: float = 1.5) -> Record:
    """Some hours with three hosts that back up, one that forgets and pins, and two that collect.

    In every third play two run VMs, and in every second one repairs: they take turns from the others, of which a
    mistake needs many to be met.
    """
    random = Random(seed)
    with mock.patch("secrets.token_hex", lambda size: f"{random.getrandbits(8 * size):0{2 * size}x}"):
        return _play(Play(seed), hours, runners=0 if seed % 3 else 2, movers=seed % 2)


def _play(game: Play, hours: float, *, runners: int, movers: int) -> Record:
    for number in range(3):
        game.world.start(f"host{number}", game.back_up)
    game.world.start("operator", game.forget)
    for number in range(2):
        game.world.start(f"collector{number}", game.collect)
    for number in range(runners):
        game.world.start(f"runner{number}", game.run_vms)
    for number in range(movers):
        game.world.start(f"mover{number}", game.move_frames)
    game.world.run(until=lambda: game.world.now_s > hours * 3600)
    game.world.stop()
    game.check()
    return game.record
