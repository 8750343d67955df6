"""The durable residency map: one file per placeholder that survives power loss.

Invariants:
* a bit in it is set only after the data under it is durable (the caller syncs the file first);
* the header and every page of bits are kept in two copies, written one after the other with a sync between, so that a
  torn write or one damaged copy is never a damaged map; both copies damaged is an error, never an all-clear map;
* the newer copy of the two counts: it was written only after the data under its bits was durable.

Layout (4 KiB units): header A, header B, then for each page copy A, copy B.  docs/FORMAT.md has every byte.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from vmfs_stub.core.chunking import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN
from vmfs_stub.core.errors import CorruptMap, UnknownFormat
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.core.residency import block_count, set_range
from vmfs_stub.primary.envelope import TIME_NS_MIN, UINT64_MAX, Body, Damaged, NewerVersion, seal, unseal
from vmfs_stub.primary.files import FileCalls, read_fully, sync_directory, write_fully
from vmfs_stub.primary.identity import BootIdentity, InodeIdentity

UNIT = 4096
MAP_SUFFIX = ".map"
NEW_SUFFIX = ".new"
PAGE_BITS_SIZE = 4032
"""Bytes of bits in one page; with its header a page is one 4 KiB unit."""
PAGE_BLOCKS = PAGE_BITS_SIZE * 8

_HEADER_MAGIC = b"VSTBMAP\0"
_HEADER_VERSION = 1
_SEQUENCE_MAX = 2**62
"""No map is updated so often; a larger one could not be counted up and written."""
_PAGE = struct.Struct("<8sIIQ16s")
"""Magic, page number, reserved, sequence, placeholder id; then the bits, and a checksum in the last 16 bytes."""
_PAGE_MAGIC = b"VSTBPAG\0"
_DIGEST_SIZE = 16


def page_count(size: int) -> int:
    """Pages of the map of a file of ``size`` bytes."""
    return -(-block_count(size) // PAGE_BLOCKS)


def map_bytes(size: int) -> int:
    """Bytes that the map of a file of ``size`` bytes takes on primary: 0.006 % of it."""
    return (2 + 2 * page_count(size)) * UNIT


class MapState(enum.IntEnum):
    """How far the life of a placeholder has come."""

    PREPARED = 1
    """The map exists, the record does not: the file is still an ordinary file."""
    COMMITTED = 2
    """The record is set; space of absent blocks may not have been released yet."""
    PUNCHED = 3
    """The space of all absent blocks has been released."""
    GRADUATING = 4
    """Everything is resident and durable; record and map are about to go."""
    REMOVED = 5
    """The last link of the file is about to go, or is gone."""
    SUPERSEDED = 6
    """The file was archived again: its record names another placeholder, and does so durably."""


_FIRST_STATE, _LAST_STATE = min(MapState), max(MapState)


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What the map knows besides bits.

    ``archived_limit`` (bytes): the smallest size the file had since its archive; what lies beyond is resident.
    ``guest_mtime_ns``: the time a guest last wrote, 0 if none did.  ``live``: the boot and mount in which a volatile
    map of this placeholder exists and is ahead of this one; None after a clean close.
    """

    placeholder_id: PlaceholderId
    vm_id: VmId
    point_id: PointId
    identity: InodeIdentity
    state: MapState
    size: int
    chunk_size: int
    archived_limit: int
    guest_mtime_ns: int = 0
    hydrate: bool = False
    live: BootIdentity | None = None

    @property
    def page_count(self) -> int:
        return page_count(self.size)


class DurableMap:
    """An open durable map.  Not thread-safe: the owner makes one call at a time."""

    def __init__(self, files: FileCalls, fd: int, path: Path, header: MapHeader, sequence: int) -> None:
        self._files = files
        self._fd = fd
        self._sequence = sequence
        self.path = path
        self.header = header

    @classmethod
    def create(cls, files: FileCalls, path: Path, header: MapHeader) -> DurableMap:
        """Make a new map in which every block is absent, durable on return.  Raises OSError.

        It gets its name when it is whole: a crash leaves no damaged map, only a file named ``*.new``.
        """
        new = path.with_suffix(NEW_SUFFIX)
        fd = files.call("map.create", os.open, new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        made = cls(files, fd, path, header, sequence=0)
        try:
            made._sequence += 1
            made._write(lambda: ((page, b"") for page in range(header.page_count)), header)
            files.call("map.create_entry", os.rename, new, path)
            files.call("map.create_entry", sync_directory, path.parent)
        except BaseException:
            made.close()
            # What cannot be removed is *prepared*, or has no name of a map: the next start removes it.
            with suppress(OSError):
                files.call("map.undo", new.unlink, missing_ok=True)
                files.call("map.undo", path.unlink, missing_ok=True)
            raise
        return made

    @classmethod
    def open(cls, files: FileCalls, path: Path, *, label: str) -> DurableMap:
        """Open the map at ``path``.  Raises FileNotFoundError, CorruptMap, UnknownFormat, OSError."""
        fd = files.call("map.open", os.open, path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            raw = read_fully(files, "map.read", fd, 2 * UNIT, 0)
            first, second = raw[:UNIT], raw[UNIT:]
            # The same bytes but for a crash between the two; a start reads many maps.
            copies = [_decode_header(copy, label) for copy in ([first] if first == second else [first, second])]
            found = max((copy for copy in copies if copy is not None), key=lambda copy: copy[0], default=None)
            if found is None:
                raise CorruptMap(
                    f"{label}: both copies of the residency map's header are damaged ({path}); restore the map from a "
                    "copy, or write the restore point out elsewhere with `vmfs-stub restore`"
                )
            return cls(files, fd, path, found[1], found[0])
        except BaseException:
            os.close(fd)
            raise

    def load_pages(self, *, label: str) -> Iterator[bytes]:
        """The bits of each page in turn, ``PAGE_BITS_SIZE`` bytes each.  Raises CorruptMap, OSError."""
        for page in range(self.header.page_count):
            raw = read_fully(self._files, "map.read", self._fd, 2 * UNIT, _page_offset(page))
            yield self._newest_page(page, raw[:UNIT], raw[UNIT:], label)

    def _newest_page(self, page: int, first: bytes, second: bytes, label: str) -> bytes:
        copies = [_decode_page(raw, page, self.header.placeholder_id) for raw in (first, second)]
        found = max((copy for copy in copies if copy is not None), key=lambda copy: copy[0], default=None)
        if found is None:
            raise CorruptMap(
                f"{label}: both copies of page {page} of the residency map are damaged ({self.path}); restore the map "
                "from a copy, or write the restore point out elsewhere with `vmfs-stub restore`"
            )
        return found[1]

    def update(self, pages: Mapping[int, bytes], header: MapHeader) -> None:
        """Make pages and header durable.

        The caller has made the data under newly set bits durable before.  Raises OSError; it is then not known which
        of the pages are durable.
        """
        self._sequence += 1
        self._write(lambda: sorted(pages.items()), header)

    def _write(self, pages: Callable[[], Iterable[tuple[int, bytes]]], header: MapHeader) -> None:
        """Write ``pages`` and ``header`` to the first copies, then to the second; a large map is never held whole."""
        for copy in (0, 1):
            for page, bits in pages():
                unit = _encode_page(page, bits, self._sequence, header.placeholder_id)
                self._files.call("map.write", write_fully, self._fd, unit, _page_offset(page) + copy * UNIT)
            unit = _encode_header(header, self._sequence)
            self._files.call("map.write", write_fully, self._fd, unit, copy * UNIT)
            self._files.call("map.sync", os.fdatasync, self._fd)
        self.header = header

    def set_state(self, state: MapState) -> None:
        """Move to ``state``, durable on return.  Raises OSError."""
        self.update({}, replace(self.header, state=state))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def pages_of(resident: Iterable[Extent]) -> dict[int, bytes]:
    """The pages in which these runs of blocks lie, with the bits of the runs set, as `DurableMap.update` takes them."""
    pages: dict[int, bytearray] = {}
    for run in resident:
        first = run.start
        while first < run.end:
            page, start = divmod(first, PAGE_BLOCKS)
            end = min(run.end, (page + 1) * PAGE_BLOCKS)
            set_range(pages.setdefault(page, bytearray(PAGE_BITS_SIZE)), start, end - page * PAGE_BLOCKS)
            first = end
    return {page: bytes(bits) for page, bits in pages.items()}


def _page_offset(page: int) -> int:
    return (2 + 2 * page) * UNIT


def _encode_header(header: MapHeader, sequence: int) -> bytes:
    raw = seal(_HEADER_MAGIC, _HEADER_VERSION, {"sequence": sequence, **asdict(header)})
    return raw.ljust(UNIT, b"\0")


def _decode_header(raw: bytes, label: str) -> tuple[int, MapHeader] | None:
    """Sequence and header of one copy; None when it is damaged."""
    try:
        body = Body(unseal(raw, magic=_HEADER_MAGIC, version=_HEADER_VERSION))
        sequence = body.integer("sequence", high=_SEQUENCE_MAX)
        header = _header_of(body)
        body.finish()
    except NewerVersion as exc:
        raise UnknownFormat(f"{label}: the residency map is of {exc}") from exc
    except Damaged:
        return None
    return sequence, header


def _header_of(body: Body) -> MapHeader:
    identity, live = body.body("identity"), body.body_or_none("live")
    header = MapHeader(
        placeholder_id=PlaceholderId(body.identifier("placeholder_id")),
        vm_id=VmId(body.identifier("vm_id")),
        point_id=PointId(body.identifier("point_id")),
        identity=InodeIdentity(
            identity.text("filesystem"),
            identity.integer("ino", high=UINT64_MAX),
            identity.integer("generation", high=UINT64_MAX),
        ),
        state=MapState(body.integer("state", low=_FIRST_STATE, high=_LAST_STATE)),
        size=body.integer("size"),
        chunk_size=body.integer("chunk_size", low=CHUNK_SIZE_MIN, high=CHUNK_SIZE_MAX),
        archived_limit=body.integer("archived_limit"),
        guest_mtime_ns=body.integer("guest_mtime_ns", low=TIME_NS_MIN),
        hydrate=body.flag("hydrate"),
        live=None if live is None else _boot_of(live),
    )
    identity.finish()
    return header


def _boot_of(body: Body) -> BootIdentity:
    boot = BootIdentity(body.identifier("boot_id"), body.integer("mount_id", high=UINT64_MAX))
    body.finish()
    return boot


def _encode_page(page: int, bits: bytes, sequence: int, placeholder_id: PlaceholderId) -> bytes:
    body = _PAGE.pack(_PAGE_MAGIC, page, 0, sequence, bytes.fromhex(placeholder_id)) + bits
    body = body.ljust(UNIT - _DIGEST_SIZE, b"\0")
    return body + xxhash.xxh3_128_digest(body)


def _decode_page(raw: bytes, page: int, placeholder_id: PlaceholderId) -> tuple[int, bytes] | None:
    """Sequence and bits of one copy of a page; None when it is damaged or not the page it should be."""
    if len(raw) != UNIT or xxhash.xxh3_128_digest(raw[:-_DIGEST_SIZE]) != raw[-_DIGEST_SIZE:]:
        return None
    magic, found_page, _, sequence, found_id = _PAGE.unpack_from(raw)
    if (magic, found_page, found_id) != (_PAGE_MAGIC, page, bytes.fromhex(placeholder_id)):
        return None
    return sequence, raw[_PAGE.size : _PAGE.size + PAGE_BITS_SIZE]
