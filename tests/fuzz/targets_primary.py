"""What is read from the backing and runtime directories."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from xxhash import xxh3_128_digest

from tests.fuzz.seals import ENVELOPE_HEAD, edit_envelope, seal_envelope
from tests.fuzz.target import Bound, Edit, Target, Violation, check_types, require
from tests.primary_samples import BOOT, PLACEHOLDER, POINT, STORE, VM, bits_of, header, make_map, pages_in_turn
from vmfs_stub.core.changed import BITS_SIZE_MAX, Changed, bits_size
from vmfs_stub.core.chunking import CHUNK_SIZE_MIN
from vmfs_stub.core.errors import (
    CorruptMap,
    CorruptRecord,
    IntegrityError,
    MapFrozen,
    MapMissing,
    PrimaryIOError,
    UnknownFormat,
    Unsupported,
)
from vmfs_stub.core.ids import DatastoreId, PlaceholderId
from vmfs_stub.core.names import PLACEHOLDER_XATTR, TOP_MODE_XATTR, VM_XATTR
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import block_count
from vmfs_stub.inventory.identity import Group, new_vm_id, read_identity, write_vm_id
from vmfs_stub.mount.inodes import read_top_mode
from vmfs_stub.primary.changed_map import ChangedMap, ChangedState
from vmfs_stub.primary.changed_record import ChangedRecord, Seen, decode_changed, encode_changed
from vmfs_stub.primary.datastore_id import decode_datastore_id, encode_datastore_id
from vmfs_stub.primary.durable_map import PAGE_BITS_SIZE, UNIT, DurableMap, MapHeader
from vmfs_stub.primary.envelope import FILE_TIME_NS_END, Damaged, NewerVersion
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import InodeIdentity, inode_identity
from vmfs_stub.primary.placeholder import PrivateState, take_up
from vmfs_stub.primary.record import PlaceholderRecord, decode_record, encode_record
from vmfs_stub.primary.serving_mark import Machine, Mark, decode_mark, encode_mark
from vmfs_stub.primary.volatile_map import VolatileMap
from vmfs_stub.store.keys import is_id

_INT64_MAX = 2**63 - 1
JSON_TOKENS = (b"[", b'{"a":', b"NaN", b"Infinity", b"9" * 50, b"null", b'"')


def sample_record(**changes: object) -> PlaceholderRecord:
    """A record as an archive makes it."""
    made = PlaceholderRecord(PLACEHOLDER, STORE, VM, POINT, 3, 5 << 30, 17 * 10**17, 17 * 10**17, "18" * 16, 42, 3)
    return replace(made, **changes)  # type: ignore[arg-type]


def check_record(record: PlaceholderRecord) -> None:
    """Types, ids and bounds: ids become names of files and objects."""
    check_types(record)
    ids = [record.placeholder_id, record.store_id, record.vm_id, record.point_id, record.replaces or record.vm_id]
    require(all(is_id(one) for one in ids), "an id that is none")
    numbers = (record.file_index, record.size, record.ino, record.generation)
    require(all(0 <= number <= _INT64_MAX * 2 + 1 for number in numbers), "a number that no file has")
    require(record.size <= _INT64_MAX and abs(record.mtime_ns) <= FILE_TIME_NS_END, "a number that no file has")


class _EnvelopeTarget(Target):
    """One envelope, and nothing else that means anything."""

    permitted: ClassVar[tuple[type[Exception], ...]] = (Damaged, NewerVersion)
    tokens = JSON_TOKENS
    bound = Bound(per_byte=200)
    is_checked = True

    def reseal(self, data: bytes) -> bytes:
        return seal_envelope(data)

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        return edit_envelope(data, edit)


class RecordTarget(_EnvelopeTarget):
    """The placeholder record in an extended attribute."""

    name = "record"
    permitted = (CorruptRecord, UnknownFormat)

    def seeds(self) -> list[bytes]:
        changes: tuple[dict[str, object], ...] = (
            {}, {"replaces": PlaceholderId("b2" * 16)}, {"filesystem": "fsid-0123456789abcdef", "generation": 0}
        )  # fmt: skip
        return [encode_record(sample_record(**change)) for change in changes]

    def call(self, data: bytes) -> object:
        record = decode_record(data, label="disk")
        check_record(record)
        require(decode_record(encode_record(record), label="disk") == record, "a record does not read back")
        return record


class ServingMarkTarget(_EnvelopeTarget):
    """The mark of the host that serves a backing directory, which another host reads."""

    name = "serving-mark"

    def seeds(self) -> list[bytes]:
        machine = Machine("0a" * 16, "1b" * 16, "host1")
        marks = (
            Mark(machine, "2c" * 16, 17 * 10**8, 5),
            Mark(replace(machine, machine_id="", host="\u00fc"), "3d" * 16, 0),
        )
        return [encode_mark(mark) for mark in marks]

    def call(self, data: bytes) -> object:
        mark = decode_mark(data)
        check_types(mark)
        require(is_id(mark.session) and is_id(mark.machine.boot_id), "an id that is none")
        require(len(str(mark)) < 2000, "a text for people that is too long")
        require(decode_mark(encode_mark(mark)) == mark, "a mark does not read back")
        return mark


class DatastoreIdTarget(_EnvelopeTarget):
    """The file that says which datastore this is."""

    name = "datastore-id"

    def seeds(self) -> list[bytes]:
        return [
            encode_datastore_id(DatastoreId("a7" * 16), ino=ino, generation=generation)
            for ino, generation in ((42, 3), (2**64 - 1, 0))
        ]

    def call(self, data: bytes) -> object:
        datastore_id, ino, generation = found = decode_datastore_id(data)
        require(is_id(datastore_id) and 0 <= ino < 2**64 and 0 <= generation < 2**64, "an id or number that is none")
        again = decode_datastore_id(encode_datastore_id(datastore_id, ino=ino, generation=generation))
        require(again == found, "an id does not read back")
        return found


class DurableMapTarget(Target):
    """A durable map: the whole file."""

    name = "durable-map"
    permitted = (CorruptMap, UnknownFormat)
    tokens = JSON_TOKENS
    bound = Bound(base_bytes=2 << 20)
    is_checked = True
    is_mixable = True
    """Pages and headers of one placeholder, old and new, are each whole by themselves."""
    _blocks: ClassVar = (5, 32_256 * 2 + 100)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._path = place / "one.map"

    def seeds(self) -> list[bytes]:
        made = []
        for number, blocks in enumerate(self._blocks):
            about = replace(header(blocks), placeholder_id=PlaceholderId(f"{number}a" * 16), live=(None, BOOT)[number])
            opened = make_map(FileCalls(), self._path, about, {0, 3, blocks - 1})
            opened.update(
                {0: bits_of(min(blocks, 32_256), {0, 2, 3})}, replace(about, archived_limit=4096, hydrate=True)
            )
            opened.close()
            made.append(self._path.read_bytes())
        return made

    def call(self, data: bytes) -> object:
        self._path.write_bytes(data)
        value = self._read()
        found, bits = value
        require(len(bits) == found.page_count * PAGE_BITS_SIZE, "bits for another size")
        require(is_id(found.placeholder_id) and is_id(found.vm_id) and is_id(found.point_id), "an id that is none")
        opened = DurableMap.open(FileCalls(), self._path, label="disk")
        try:
            pages = {n: bits[n * PAGE_BITS_SIZE :][:PAGE_BITS_SIZE] for n in range(found.page_count)}
            opened.update(pages, replace(found, archived_limit=max(0, found.archived_limit - 1)))
        finally:
            opened.close()
        again, bits_again = self._read()
        require(bits_again == bits and again.placeholder_id == found.placeholder_id, "a map does not read back")
        return value

    def _read(self) -> tuple[MapHeader, bytes]:
        opened = DurableMap.open(FileCalls(), self._path, label="disk")
        try:
            check_types(opened.header)
            return opened.header, b"".join(opened.load_pages(label="disk"))
        finally:
            opened.close()

    def reseal(self, data: bytes) -> bytes:
        units = [data[at : at + UNIT] for at in range(0, len(data), UNIT)]
        return b"".join(self._sealed(number, unit) for number, unit in enumerate(units))

    @staticmethod
    def _sealed(number: int, unit: bytes) -> bytes:
        if number < 2:
            end = unit.rfind(b"}") + 1
            return seal_envelope(unit[:end] + bytes(16)).ljust(UNIT, b"\0")[:UNIT]
        return unit[: UNIT - 16] + xxh3_128_digest(unit[: UNIT - 16]) if len(unit) == UNIT else unit

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        """Both headers get the same body, as the program writes them."""
        end = data.find(b"}\0" if b"}\0" in data[:UNIT] else b"}", 0, UNIT)
        (length,) = struct.unpack_from("<I", data.ljust(16, b"\0"), 12)
        body = data[ENVELOPE_HEAD : min(ENVELOPE_HEAD + length, UNIT)] or data[ENVELOPE_HEAD : end + 1]
        unit = (data[:ENVELOPE_HEAD] + edit(body)).ljust(UNIT, b"\0")[:UNIT]
        return unit + unit + data[2 * UNIT :]


class VolatileMapTarget(Target):
    """A volatile map that an earlier daemon left: only its first 80 bytes are checked, the rest changes in place."""

    name = "volatile-map"
    permitted = (CorruptMap, MapMissing)
    bound = Bound(base_bytes=4 << 20)
    _size: ClassVar = (32_768 + 200) * 4096 - 100

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._path = place / "one.bits"
        self._checked = b""

    def seeds(self) -> list[bytes]:
        made = []
        for resident in (set[int](), {1, 2, 32_900}):
            opened = VolatileMap.create(
                FileCalls(),
                self._path,
                placeholder_id=PLACEHOLDER,
                boot=BOOT,
                size=self._size,
                pages=pages_in_turn(block_count(self._size), resident),
                archived_limit=self._size - 4096,
                guest_mtime_ns=17,
            )
            opened.close(discard=False)
            made.append(self._path.read_bytes())
        self._checked = made[0][:80]
        return made

    def call(self, data: bytes) -> object:
        self._path.write_bytes(data)
        opened = VolatileMap.open(
            FileCalls(), self._path, placeholder_id=PLACEHOLDER, boot=BOOT, size=self._size, label="disk"
        )
        try:
            require(data[:80] == self._checked and len(data) == 3 * 4096, "damage not detected")
            absent = opened.absent_count()
            require(0 <= absent <= block_count(self._size), "more is absent than there is")
            opened.is_resident(0, block_count(self._size))
            opened.lower_archived_limit(self._size - 8192)
            opened.set_guest_mtime(opened.guest_mtime_ns)
            opened.set_resident(0, block_count(self._size))
            require(opened.absent_count() == 0, "absent though it was set")
            pages = opened.take_dirty()
            require(sorted(pages) == [0, 1] and set(pages[0]) == {255}, "a page is lost")
            opened.freeze()
            return opened.archived_limit, opened.guest_mtime_ns
        finally:
            opened.close(discard=False)


class PlaceholderTarget(Target):
    """A file whose record and maps are what the input says (the record's length in 4 bytes, the record, the map)."""

    name = "placeholder"
    permitted = (IntegrityError, UnknownFormat, MapFrozen)
    tokens = JSON_TOKENS
    bound = Bound(base_bytes=4 << 20, per_byte=200)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        (place / "backing").mkdir()
        self._state = PrivateState.at(place / "backing", place / "run")
        self._fd = os.open(place / "backing" / "disk.raw", os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self._fd, 5 * 4096)

    def close(self) -> None:
        os.close(self._fd)

    def seeds(self) -> list[bytes]:
        identity = inode_identity(self._fd)
        record = sample_record(
            size=5 * 4096, filesystem=identity.filesystem, ino=identity.ino, generation=identity.generation
        )
        made = []
        for live in (None, BOOT, self._state.boot):
            path = self._state.durable_path(PLACEHOLDER)
            about = header(5, identity=identity, live=live)
            make_map(FileCalls(), path, about, {0, 4}).close()
            raw = encode_record(replace(record, replaces=None if live else PlaceholderId("b2" * 16)))
            made.append(struct.pack("<I", len(raw)) + raw + path.read_bytes())
            path.unlink()
        return made

    def call(self, data: bytes) -> object:
        record, durable = self._parts(data)
        if len(record) > 60_000:
            return None
        path = self._state.durable_path(PLACEHOLDER)
        path.write_bytes(durable)
        os.setxattr(self._fd, PLACEHOLDER_XATTR, record)
        before = self._names()
        try:
            found = take_up(FileCalls(), self._fd, self._state, label="disk")
            require(found is not None, "a placeholder is taken for an ordinary file")
            assert found is not None
            found.live.absent_count()
            found.lay_down(FileCalls(), self._fd)
        finally:
            self._state.volatile_path(PLACEHOLDER).unlink(missing_ok=True)
            require(self._names() == before, "a file was made outside the place for maps")
        return None

    def _names(self) -> set[str]:
        """All files but the maps."""
        private = {str(self._state.maps), str(self._state.volatile_maps)}
        walked = os.walk(self.place)
        return {os.path.join(folder, name) for folder, _, names in walked for name in names if folder not in private}

    @staticmethod
    def _parts(data: bytes) -> tuple[bytes, bytes]:
        length = int.from_bytes(data[:4], "little")
        return data[4 : 4 + length], data[4 + length :]

    def reseal(self, data: bytes) -> bytes:
        record, durable = self._parts(data)
        record = seal_envelope(record)
        units = [durable[at : at + UNIT] for at in range(0, len(durable), UNIT)]
        durable = b"".join(DurableMapTarget._sealed(number, unit) for number, unit in enumerate(units))
        return struct.pack("<I", len(record)) + record + durable

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        """The record, or the map's headers: whichever the edit is for is told by the input's own parity."""
        record, durable = self._parts(data)
        if xxh3_128_digest(data)[0] & 1:
            record = edit_envelope(record, edit)
        elif len(durable) >= 2 * UNIT:
            (length,) = struct.unpack_from("<I", durable, 12)
            unit = (durable[:ENVELOPE_HEAD] + edit(durable[ENVELOPE_HEAD : ENVELOPE_HEAD + min(length, UNIT)])).ljust(
                UNIT, b"\0"
            )[:UNIT]
            durable = unit + unit + durable[2 * UNIT :]
        return struct.pack("<I", len(record)) + record + durable


ORIGIN = Origin(STORE, VM, POINT, 2, (32_768 + 200) * CHUNK_SIZE_MIN - 100, CHUNK_SIZE_MIN)


def seal_first_envelope(data: bytes) -> bytes:
    """The envelope that begins here, by what it says of its own length."""
    (length,) = struct.unpack_from("<I", data.ljust(ENVELOPE_HEAD, b"\0"), 12)
    end = ENVELOPE_HEAD + length
    return data[:end] + xxh3_128_digest(data[:end]) + data[end + 16 :] if end + 16 <= len(data) else data


def edit_first_envelope(data: bytes, edit: Edit) -> bytes:
    (length,) = struct.unpack_from("<I", data.ljust(ENVELOPE_HEAD, b"\0"), 12)
    body, rest = edit(data[ENVELOPE_HEAD : ENVELOPE_HEAD + length]), data[ENVELOPE_HEAD + length :]
    return data[:12] + struct.pack("<I", len(body)) + body + rest


def check_origin(origin: Origin) -> None:
    check_types(origin)
    require(all(is_id(one) for one in (origin.store_id, origin.vm_id, origin.point_id)), "an id that is none")
    require(origin.size > 0 and bits_size(origin) <= BITS_SIZE_MAX, "a file that no map is for")


class ChangedRecordTarget(Target):
    """What is known of a file that nobody wrote to since its last backup."""

    name = "changed-record"
    permitted = (Damaged, NewerVersion)
    tokens = JSON_TOKENS
    bound = Bound(base_bytes=BITS_SIZE_MAX * 3, per_byte=200)
    is_checked = True

    def seeds(self) -> list[bytes]:
        identity, seen = InodeIdentity("18" * 16, 42, 3), Seen(ORIGIN.size, -1, 17 * 10**17)
        bits = bytearray(bits_size(ORIGIN))
        bits[5] = bits[4100] = 7
        return [
            encode_changed(ChangedRecord(identity, seen, changed))
            for changed in (Changed.nothing(ORIGIN), Changed(ORIGIN, bytes(bits)))
        ]

    def call(self, data: bytes) -> object:
        record = decode_changed(data)
        check_types(record.seen)
        check_types(record.identity)
        check_origin(record.changed.origin)
        require(len(record.changed.bits) == bits_size(record.changed.origin), "bits for another file")
        require(decode_changed(encode_changed(record)) == record, "a record does not read back")
        return record

    def reseal(self, data: bytes) -> bytes:
        return seal_first_envelope(data)

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        return edit_first_envelope(data, edit)


class ChangedMapTarget(Target):
    """What an earlier daemon left of a file that was written to: state and bits change in place, unchecked."""

    name = "changed-map"
    permitted = ()
    tokens = JSON_TOKENS
    bound = Bound(base_bytes=BITS_SIZE_MAX * 3, per_byte=200)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._path = place / "42"

    def seeds(self) -> list[bytes]:
        made = []
        for state in ChangedState:
            opened = ChangedMap.create(
                FileCalls(),
                self._path,
                identity=InodeIdentity("18" * 16, 42, 3),
                boot=BOOT,
                changed=Changed.nothing(ORIGIN),
            )
            opened.set_changed(5 * CHUNK_SIZE_MIN, 1)
            opened.leave(Seen(ORIGIN.size, -1, 17 * 10**17))
            opened._set_state(state)
            opened.close()
            made.append(self._path.read_bytes())
        return made

    def call(self, data: bytes) -> object:
        self._path.write_bytes(data)
        opened = ChangedMap.open(FileCalls(), self._path, boot=BOOT)
        if opened is None:
            return None
        try:
            check_origin(opened.origin)
            check_types(opened.identity)
            seen = opened.seen
            require((seen is not None) == (opened.state is ChangedState.LEFT), "seen while it was written to")
            opened.mark()
            opened.set_changed(0, opened.origin.size)
            require(opened.changed().unchanged(0, size=opened.origin.size).length == 0, "noted, and unchanged")
            return seen
        finally:
            opened.close()

    def reseal(self, data: bytes) -> bytes:
        return seal_first_envelope(data)

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        return edit_first_envelope(data, edit).ljust(UNIT, b"\0")[:UNIT] + data[UNIT:]


class VmIdentityTarget(Target):
    """The identity of a VM in an extended attribute: what cannot be read is no identity."""

    name = "vm-identity"
    permitted = (Unsupported, PrimaryIOError)
    tokens = JSON_TOKENS
    bound = Bound(per_byte=200)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._fd = os.open(place, os.O_PATH | os.O_DIRECTORY)
        self._path = f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        os.close(self._fd)

    def seeds(self) -> list[bytes]:
        write_vm_id(self._fd, new_vm_id())
        mine = os.getxattr(self._path, VM_XATTR)
        write_vm_id(self._fd, new_vm_id(), group=Group("web", "1" * 32))
        grouped = os.getxattr(self._path, VM_XATTR)
        return [mine, grouped, mine.replace(b'"ino": ', b'"ino": 1'), json.dumps({"vm": "0" * 32}).encode()]

    def call(self, data: bytes) -> object:
        if not data or len(data) > 60_000:
            return None
        os.setxattr(self._path, VM_XATTR, data)
        identity = read_identity(self._fd)
        if identity is not None:
            check_types(identity)
            require(is_id(identity.vm_id), "an id that is none")
            require(identity.group is None or is_id(identity.group.domain), "a domain that is none")
        return identity

    def edit_json(self, data: bytes, edit: Edit) -> bytes:
        return edit(data)


class TopModeTarget(Target):
    """The mode of the top directory in an extended attribute: what cannot be read is the default."""

    name = "top-mode"
    permitted = ()
    tokens = (b"7", b"0o", b"-", b"+", b"_", b" ", b"\n", b"8", b"\xff", b"\xd9\xa3")

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._fd)

    def seeds(self) -> list[bytes]:
        return [f"{mode:o}".encode() for mode in (0o755, 0, 0o7777)]

    def call(self, data: bytes) -> object:
        if not data or len(data) > 60_000:
            return None
        os.setxattr(self._fd, TOP_MODE_XATTR, data)
        mode = read_top_mode(self._fd)
        if not 0 <= mode <= 0o7777:
            raise Violation("a mode with other bits than permissions")
        return mode
