"""Damage, planted in the store and on primary: told by name, EIO for what it affects alone, and never other bytes."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_datastore import (
    BLOCK,
    CHUNK,
    MIB,
    QUIET,
    LiveDatastore,
    MakeDatastore,
    damage,
    forget_pages,
    merged,
    noise,
    objects,
    readable_ranges,
)

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.store.keys import manifest_key, pack_key, segment_key
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store

SIZE = 12 * MIB
CHUNKS = SIZE // CHUNK
VICTIM, OTHER = noise(SIZE, seed=1), noise(4 * MIB, seed=2)

NOT_FOUND, STORE, INTEGRITY, UNHEALTHY = 3, 5, 6, 8


@dataclass(frozen=True)
class Stored:
    """Where the store keeps the victim's restore point; ``frames`` by chunk."""

    store: Path
    vm_id: str
    point_id: str
    frames: list[FrameRef]
    segments: list[str]

    @property
    def manifest(self) -> Path:
        return self.store / manifest_key(self.vm_id, self.point_id)  # type: ignore[arg-type]

    def pack(self, chunk: int) -> Path:
        return self.store / pack_key(self.frames[chunk].pack_id)


def stored(datastore: LiveDatastore, vm: str) -> Stored:
    store = Store.open(open_objects(StoreAt(datastore.store.as_uri())))
    (found,) = (each for each in store.vms() if each.name == vm)
    point = store.open_point(found.vm_id, found.points[-1].point_id)
    (index,) = (at for at, each in enumerate(point.manifest.files) if each.path == "disk.raw")
    frames = point.chunks(index).locate(0, CHUNKS)
    assert all(frames)
    segments = [segment for segment in point.manifest.files[index].segments if segment is not None]
    return Stored(datastore.store, found.vm_id, found.points[-1].point_id, list(frames), segments)  # type: ignore[arg-type]


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> Iterator[LiveDatastore]:
    """Two archived VMs, victim and other, of which nothing is resident."""
    made = make_datastore(merged(QUIET, {"archive": {"placeholder_bytes_min": BLOCK}}))
    made.start()
    made.add_vm("victim", VICTIM)
    made.add_vm("other", OTHER)
    made.archive("victim", "other")
    yield made
    assert "Traceback" not in made.log()


def disk_of(datastore: LiveDatastore, vm: str) -> Path:
    return datastore.mountpoint / vm / "disk.raw"


# In the store


Damage = Callable[[Stored, random.Random], set[int]]
"""Damages the store; returns the chunks that cannot be read any more."""


def flip_a_bit(found: Stored, rng: random.Random) -> set[int]:
    chunk = rng.randrange(CHUNKS)
    frame = found.frames[chunk]
    damage(found.pack(chunk), frame.offset + rng.randrange(frame.length), mask=1 << rng.randrange(8))
    return {chunk}


def cut_a_pack(found: Stored, rng: random.Random) -> set[int]:
    pack = found.pack(0)
    size = rng.randrange(1, pack.stat().st_size // 2)
    os.truncate(pack, size)
    return {
        chunk
        for chunk, frame in enumerate(found.frames)
        if found.pack(chunk) == pack and frame.offset + frame.length > size
    }


def lose_a_pack(found: Stored, rng: random.Random) -> set[int]:
    pack = found.pack(rng.randrange(CHUNKS))
    affected = {chunk for chunk in range(CHUNKS) if found.pack(chunk) == pack}
    pack.unlink()
    return affected


def damage_the_manifest(found: Stored, rng: random.Random) -> set[int]:
    damage(found.manifest, rng.randrange(found.manifest.stat().st_size), mask=1 << rng.randrange(8))
    return set(range(CHUNKS))


def lose_the_manifest(found: Stored, rng: random.Random) -> set[int]:
    found.manifest.unlink()
    return set(range(CHUNKS))


def damage_a_segment(found: Stored, rng: random.Random) -> set[int]:
    segment = found.store / segment_key(found.segments[0])  # type: ignore[arg-type]
    damage(segment, rng.randrange(segment.stat().st_size), mask=1 << rng.randrange(8))
    return set(range(CHUNKS))


def lose_a_segment(found: Stored, rng: random.Random) -> set[int]:
    (found.store / segment_key(found.segments[0])).unlink()  # type: ignore[arg-type]
    return set(range(CHUNKS))


def exchange_two_packs(found: Stored, rng: random.Random) -> set[int]:
    """What is whole, but something else: another VM's pack under the victim's name."""
    mine = {found.pack(chunk) for chunk in range(CHUNKS)}
    other = next(pack for pack in objects(found.store / "packs") if pack not in mine)
    found.pack(0).write_bytes(other.read_bytes())
    return {chunk for chunk in range(CHUNKS) if found.pack(chunk) == found.pack(0)}


@pytest.mark.parametrize(
    ("plant", "seed", "code"),
    [
        (flip_a_bit, 1, INTEGRITY),
        (flip_a_bit, 2, INTEGRITY),
        (flip_a_bit, 3, INTEGRITY),
        (flip_a_bit, 4, INTEGRITY),
        (cut_a_pack, 1, INTEGRITY),
        (lose_a_pack, 1, STORE),
        (exchange_two_packs, 1, INTEGRITY),
        (damage_the_manifest, 1, INTEGRITY),
        (damage_the_manifest, 2, INTEGRITY),
        (lose_the_manifest, 1, NOT_FOUND),
        (damage_a_segment, 1, INTEGRITY),
        (damage_a_segment, 2, INTEGRITY),
        (lose_a_segment, 1, STORE),
    ],
)
def test_damaged_store(datastore: LiveDatastore, plant: Damage, seed: int, code: int) -> None:
    found, disk = stored(datastore, "victim"), disk_of(datastore, "victim")
    kept = {path: path.read_bytes() for path in objects(datastore.store)}
    affected = plant(found, random.Random(seed))
    assert affected

    # The reader gets EIO where it must, the archived bytes elsewhere, and nothing else anywhere.
    for chunk, got in enumerate(readable_ranges(disk, SIZE)):
        wanted = errno.EIO if chunk in affected else VICTIM[chunk * CHUNK : (chunk + 1) * CHUNK]
        assert got == wanted, f"chunk {chunk}: {got if isinstance(got, int) else 'bytes'}"
    assert disk_of(datastore, "other").read_bytes() == OTHER

    # A guest can still write; what it wrote is read back, what it did not is still an error.
    hurt = min(affected)
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\xee" * BLOCK, hurt * CHUNK)
        os.fsync(file.fileno())
    forget_pages(disk)
    (block, rest) = readable_ranges(disk, (hurt + 1) * CHUNK, step=BLOCK)[hurt * CHUNK // BLOCK :][:2]
    assert block == b"\xee" * BLOCK
    assert rest == errno.EIO

    told(datastore, code)
    if plant is not lose_the_manifest:  # of a point that is not there, the store knows nothing
        verified = datastore.cli("verify", check=INTEGRITY)
        assert "victim" in verified.err or found.vm_id in verified.err
        assert "other" not in verified.err
        assert "disk.raw" in verified.err or plant is damage_the_manifest
    datastore.recall("other")
    assert datastore.state("victim") == "placeholder"

    # Once it is repaired everything is there again, with what the guest wrote.
    for path, content in kept.items():
        if "pins" not in path.parts and (not path.exists() or path.read_bytes() != content):
            path.write_bytes(content)
    datastore.recall("victim")
    now = bytearray(VICTIM)
    now[hurt * CHUNK : hurt * CHUNK + BLOCK] = b"\xee" * BLOCK
    forget_pages(disk)
    assert disk.read_bytes() == now
    status = datastore.client.status()
    assert (status.healthy, status.findings) == (True, []), "what is repaired is no finding any more"


def test_a_url_that_leads_to_another_store_is_not_healthy(datastore: LiveDatastore) -> None:
    """A whole store, but not the one that has the placeholders' bytes."""
    other = datastore.base / "other-store"
    Store.create(open_objects(StoreAt(other.as_uri()), create=True))
    datastore.stop()
    datastore.configure({"store": {"url": other.as_uri()}})
    datastore.start()
    status = datastore.cli("status", check=UNHEALTHY)
    assert "2 placeholders have their bytes in store" in status.out
    assert datastore.cli("recall", "victim", check=STORE).err.count("correct the url") == 1
    datastore.stop()
    datastore.configure({"store": {"url": datastore.store.as_uri()}})
    datastore.start()
    assert datastore.cli("status", check=0).out.startswith("healthy")
    assert disk_of(datastore, "victim").read_bytes() == VICTIM


def told(datastore: LiveDatastore, code: int) -> None:
    """The operator learns of it, by the VM's name, from `recall`, `status` and the log."""
    refused = datastore.cli("recall", "victim", check=code)
    assert "victim" in refused.err
    assert datastore.cli("status").code == UNHEALTHY
    findings = datastore.client.status().findings
    assert findings
    assert all("VM victim" in each.subject and each.severity == "problem" for each in findings), findings
    assert any("VM victim" in line for line in datastore.log().splitlines() if "ERROR" in line or "WARNING" in line)


# On primary


def the_map(datastore: LiveDatastore) -> Path:
    """The victim's durable map."""
    raw = os.getxattr(datastore.backing_of(disk_of(datastore, "victim")), PLACEHOLDER_XATTR)
    (found,) = (path for path in datastore.durable_maps() if path.stem.encode() in raw)
    return found


def damage_the_record(datastore: LiveDatastore) -> None:
    path = datastore.backing_of(disk_of(datastore, "victim"))
    raw = bytearray(os.getxattr(path, PLACEHOLDER_XATTR))
    raw[len(raw) // 2] ^= 4
    os.setxattr(path, PLACEHOLDER_XATTR, bytes(raw))


def cut_the_record(datastore: LiveDatastore) -> None:
    path = datastore.backing_of(disk_of(datastore, "victim"))
    os.setxattr(path, PLACEHOLDER_XATTR, os.getxattr(path, PLACEHOLDER_XATTR)[:40])


def take_the_record_of_another(datastore: LiveDatastore) -> None:
    raw = os.getxattr(datastore.backing_of(disk_of(datastore, "other")), PLACEHOLDER_XATTR)
    os.setxattr(datastore.backing_of(disk_of(datastore, "victim")), PLACEHOLDER_XATTR, raw)


def lose_the_record(datastore: LiveDatastore) -> None:
    os.removexattr(datastore.backing_of(disk_of(datastore, "victim")), PLACEHOLDER_XATTR)


def damage_the_maps_header(datastore: LiveDatastore) -> None:
    for copy in (0, 1):
        damage(the_map(datastore), copy * 4096 + 60)


def damage_the_maps_bits(datastore: LiveDatastore) -> None:
    for copy in (0, 1):
        damage(the_map(datastore), (2 + copy) * 4096 + 60)


def cut_the_map(datastore: LiveDatastore) -> None:
    os.truncate(the_map(datastore), 2 * 4096)


def lose_the_map(datastore: LiveDatastore) -> None:
    the_map(datastore).unlink()


def take_the_map_of_another(datastore: LiveDatastore) -> None:
    mine = the_map(datastore)
    (other,) = (path for path in datastore.durable_maps() if path != mine)
    mine.write_bytes(other.read_bytes())


def all_is_error(path: Path) -> None:
    """Nothing of the file can be read; zeros least of all."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as exc:
        assert exc.errno == errno.EIO
        return
    os.close(fd)
    assert set(readable_ranges(path, SIZE)) == {errno.EIO}


def write_some(datastore: LiveDatastore, *, keep_open: bool = False) -> int | None:
    """A guest's write, so that some blocks are not what is archived."""
    fd = os.open(disk_of(datastore, "victim"), os.O_RDWR)
    os.pwrite(fd, b"written", 5 * CHUNK + 1)
    if keep_open:
        return fd
    os.close(fd)
    return None


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
@pytest.mark.parametrize(
    "plant",
    [
        damage_the_record,
        cut_the_record,
        take_the_record_of_another,
        lose_the_record,
        damage_the_maps_header,
        damage_the_maps_bits,
        cut_the_map,
        lose_the_map,
        take_the_map_of_another,
    ],
)
def test_damaged_primary(datastore: LiveDatastore, plant: Callable[[LiveDatastore], None], running: bool) -> None:
    write_some(datastore)
    datastore.restart()
    if not running:
        datastore.stop()
    plant(datastore)
    if not running:
        datastore.start()
    victim_is_refused(datastore)


def victim_is_refused(datastore: LiveDatastore) -> None:
    disk = disk_of(datastore, "victim")
    all_is_error(disk)
    with pytest.raises(OSError, match="Input/output error"):
        disk.open("r+b")
    with pytest.raises(OSError, match="Input/output error"):
        os.truncate(disk, SIZE + 1)
    told(datastore, INTEGRITY)
    assert disk_of(datastore, "other").read_bytes() == OTHER
    datastore.cli("restore", "victim", "--to", datastore.base / "restored", check=0)
    assert (datastore.base / "restored/disk.raw").read_bytes() == VICTIM
    rows = datastore.client.list_disks()
    assert {row.vm: row.size_bytes for row in rows} == {"victim": SIZE, "other": 4 * MIB}
    for start in (datastore.client.start_archive, lambda vms: datastore.client.start_backup(vms, archive=False)):
        failed = datastore.wait_job(start(["victim"]))
        assert failed.error is not None
        assert "VM victim" in failed.error.message
    datastore.recall("other")
    # And still so for the next daemon.
    datastore.crash()
    all_is_error(disk)
    assert not datastore.client.status().healthy


@pytest.mark.parametrize("what", ["lost", "damaged", "cut"])
def test_lost_volatile_map_in_the_same_boot(datastore: LiveDatastore, what: str) -> None:
    fd = write_some(datastore, keep_open=True)
    assert fd is not None
    victim = the_map(datastore).stem
    datastore.kill()
    with pytest.raises(OSError):
        os.close(fd)
    (live,) = (path for path in datastore.volatile_maps() if path.stem == victim)
    if what == "lost":
        live.unlink()
    elif what == "damaged":
        damage(live, 20)
    else:
        os.truncate(live, 4096)
    datastore.start()
    victim_is_refused(datastore)


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_copy_of_the_map_is_no_loss(datastore: LiveDatastore, copy: int) -> None:
    write_some(datastore)
    datastore.stop()
    damage(the_map(datastore), copy * 4096 + 60)
    damage(the_map(datastore), (2 + copy) * 4096 + 60)
    datastore.start()
    wanted = bytearray(VICTIM)
    wanted[5 * CHUNK + 1 : 5 * CHUNK + 8] = b"written"
    assert disk_of(datastore, "victim").read_bytes() == wanted
    datastore.cli("status", check=0)


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
@pytest.mark.parametrize("plant", [damage_the_record, lose_the_record, damage_the_maps_header, lose_the_map])
def test_damaged_disk_can_be_replaced_by_what_was_restored(
    datastore: LiveDatastore, plant: Callable[[LiveDatastore], None], running: bool
) -> None:
    if not running:
        datastore.stop()
    plant(datastore)
    if not running:
        datastore.start()
    disk = disk_of(datastore, "victim")
    all_is_error(disk)
    datastore.cli("restore", "victim", "--to", datastore.base / "restored", check=0)
    disk.unlink()
    # Often with the same inode number.
    disk.write_bytes((datastore.base / "restored/disk.raw").read_bytes())
    forget_pages(disk)
    assert disk.read_bytes() == VICTIM
    assert datastore.state("victim") == "resident"
    datastore.archive("victim")
    datastore.crash()
    assert disk.read_bytes() == VICTIM
    assert disk_of(datastore, "other").read_bytes() == OTHER


def test_copied_placeholder_is_refused_and_the_original_is_not(datastore: LiveDatastore) -> None:
    """A copy in the backing directory, made by a program that keeps extended attributes and holes."""
    datastore.stop()
    original = datastore.backing_of(disk_of(datastore, "victim"))
    copy = original.with_name("copy.raw")
    copy.touch()
    os.truncate(copy, SIZE)
    os.setxattr(copy, PLACEHOLDER_XATTR, os.getxattr(original, PLACEHOLDER_XATTR))
    datastore.start()
    all_is_error(datastore.mountpoint / "victim/copy.raw")
    assert disk_of(datastore, "victim").read_bytes() == VICTIM
    assert datastore.cli("status").code == UNHEALTHY
    assert any("copy.raw" in each.message for each in datastore.client.status().findings)
