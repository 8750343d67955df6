"""The volatile residency map: which blocks are valid on primary *now*.

A file mapped into memory, in a directory that outlives the daemon: a bit set here survives a kill of the daemon, and is
void after a reboot.  The first unit holds the header, the bits follow.

Invariants:
* a bit is set as soon as the data is in the backing file, never before;
* no page of bits is touched before space for it is allocated, since a full filesystem under a mapping is a SIGBUS;
  a region that was never allocated holds no set bit;
* what changed since the last durable update is known (`take_dirty`); after a restart everything counts as changed.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from vmfs_stub.core.errors import CorruptMap, MapMissing, NoSpace
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PlaceholderId
from vmfs_stub.core.residency import all_set, block_count, clear_runs, set_range
from vmfs_stub.primary.durable_map import PAGE_BITS_SIZE, PAGE_BLOCKS
from vmfs_stub.primary.files import FileCalls, read_fully, write_fully
from vmfs_stub.primary.identity import BootIdentity

log = logging.getLogger(__name__)

_UNIT = 4096
_REGION_BLOCKS = _UNIT * 8
"""Blocks whose bits lie in one unit: 128 MiB of disk."""
_HEADER = struct.Struct("<8sHHI16s16sQQ16s")
"""Magic, version, two reserved, placeholder id, boot id, mount id, archived size; xxh3-128 of those before."""
_VARIABLE = struct.Struct("<QqB")
_VARIABLE_OFFSET = 128
"""Archived limit, guest mtime, frozen: change in place behind the checksummed part."""
_MTIME_NS_END = 1 << 63
_MAGIC = b"VSTBLIV\0"
_VERSION = 1


class VolatileMap:
    """Bits and limits of one placeholder.  Used from one thread."""

    def __init__(self, files: FileCalls, fd: int, path: Path, size: int) -> None:
        self._files = files
        self._fd = fd
        self._path = path
        self._block_count = block_count(size)
        length = _UNIT + -(-self._block_count // _REGION_BLOCKS) * _UNIT
        self._memory = files.call("volatile.map", mmap.mmap, fd, length)
        self._bits = memoryview(self._memory)[_UNIT:]
        self._allocated = bytearray(-(-self._block_count // _REGION_BLOCKS))
        self._dirty: set[int] = set()
        self._header_dirty = False
        limit, mtime_ns, frozen = _VARIABLE.unpack_from(self._memory, _VARIABLE_OFFSET)
        self._archived_limit = int(limit)
        self._guest_mtime_ns = int(mtime_ns)
        self._frozen = bool(frozen)

    @classmethod
    def create(
        cls,
        files: FileCalls,
        path: Path,
        *,
        placeholder_id: PlaceholderId,
        boot: BootIdentity,
        size: int,
        pages: Iterable[bytes],
        archived_limit: int,
        guest_mtime_ns: int,
    ) -> VolatileMap:
        """Make a new map at ``path``, in place of what is there, from the durable one's ``pages`` of bits, in turn.

        Raises NoSpace, OSError, and what ``pages`` raises.
        """
        temporary = path.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with _room_for(path):
            fd = files.call("volatile.create", os.open, temporary, flags, 0o600)
        try:
            with _room_for(path):
                regions = -(-block_count(size) // _REGION_BLOCKS)
                files.call("volatile.allocate", os.posix_fallocate, fd, 0, _UNIT)
                files.call("volatile.create", os.ftruncate, fd, _UNIT + regions * _UNIT)
                head = _header(placeholder_id, boot, size)
                files.call("volatile.create", write_fully, fd, head, 0)
                limits = _VARIABLE.pack(archived_limit, guest_mtime_ns, 0)
                files.call("volatile.create", write_fully, fd, limits, _VARIABLE_OFFSET)
                for region, part in enumerate(_regions(pages, block_count(size))):
                    if any(part):
                        files.call("volatile.allocate", write_fully, fd, part, (1 + region) * _UNIT)
                files.call("volatile.create", os.rename, temporary, path)
            made = cls(files, fd, path, size)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                files.call("volatile.undo", temporary.unlink, missing_ok=True)
            raise
        made._find_allocated()
        return made

    @classmethod
    def open(
        cls, files: FileCalls, path: Path, *, placeholder_id: PlaceholderId, boot: BootIdentity, size: int, label: str
    ) -> VolatileMap:
        """Take up the map that an earlier daemon of this boot left.  Raises MapMissing, CorruptMap, OSError."""
        try:
            fd = files.call("volatile.open", os.open, path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as exc:
            raise MapMissing(
                f"{label}: its volatile residency map {path} is gone while this boot still needs it; which blocks the "
                "guest wrote since is not known any more. A reboot falls back to what was last synced"
            ) from exc
        try:
            if read_fully(files, "volatile.read", fd, _HEADER.size, 0) != _header(placeholder_id, boot, size):
                raise CorruptMap(
                    f"{label}: its volatile residency map {path} is damaged or another placeholder's; a reboot falls "
                    "back to what was last synced"
                )
            if os.fstat(fd).st_size != _UNIT + -(-block_count(size) // _REGION_BLOCKS) * _UNIT:
                raise CorruptMap(
                    f"{label}: its volatile residency map {path} has the wrong size; a reboot falls back to what was "
                    "last synced"
                )
            found = cls(files, fd, path, size)
        except BaseException:
            os.close(fd)
            raise
        if found.archived_limit > size:
            found.close(discard=False)
            raise CorruptMap(f"{label}: its volatile residency map {path} has an impossible limit")
        found._find_allocated()
        found._dirty.update(found._pages_with_bits())
        found._header_dirty = True
        return found

    def _find_allocated(self) -> None:
        """Learn which regions have space; closes this when that cannot be told, or set bits would count as clear."""
        try:
            self._look_for_regions()
        except BaseException:
            self.close(discard=False)
            raise

    def _look_for_regions(self) -> None:
        at, end = _UNIT, os.fstat(self._fd).st_size
        while at < end:
            try:
                start = self._files.call("volatile.seek", os.lseek, self._fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                return
            at = self._files.call("volatile.seek", os.lseek, self._fd, start, os.SEEK_HOLE)
            for region in range(start // _UNIT - 1, -(-at // _UNIT) - 1):
                self._allocated[region] = 1

    def _pages_with_bits(self) -> Iterator[int]:
        """Pages of the durable map in which a bit may be set: elsewhere none is, in either map."""
        for region, is_allocated in enumerate(self._allocated):
            if is_allocated:
                end = min((region + 1) * _REGION_BLOCKS, self._block_count)
                yield from range(region * _REGION_BLOCKS // PAGE_BLOCKS, (end - 1) // PAGE_BLOCKS + 1)

    # What is resident

    def is_resident(self, first: int, end: int) -> bool:
        """Whether every block of [first, end) is valid on primary; blocks that were not archived always are."""
        end = min(end, self._absent_end)
        if first >= end:
            return True
        region, last = first // _REGION_BLOCKS, (end - 1) // _REGION_BLOCKS
        if region == last:
            return bool(self._allocated[region]) and all_set(self._bits, first, end)
        return next(self.absent_runs(first, end), None) is None

    def absent_runs(self, first: int, end: int) -> Iterator[Extent]:
        """Runs of absent blocks in [first, end), ascending; a run may be cut at a region's border."""
        end = min(end, self._absent_end)
        while first < end:
            region = first // _REGION_BLOCKS
            stop = min(end, (region + 1) * _REGION_BLOCKS)
            if self._allocated[region]:
                yield from clear_runs(self._bits, first, stop)
            else:
                yield Extent(first, stop)
            first = stop

    def absent_count(self) -> int:
        """Number of absent blocks."""
        return sum(run.length for run in self.absent_runs(0, self._absent_end))

    @property
    def _absent_end(self) -> int:
        """First block that cannot be absent, because it lies beyond the archived limit."""
        return min(self._block_count, block_count(self._archived_limit))

    # Changes

    def set_resident(self, first: int, end: int) -> None:
        """Mark blocks valid; the data is in the backing file already.  Raises NoSpace, OSError."""
        end = min(end, self._block_count)
        if first >= end:
            return
        for region in range(first // _REGION_BLOCKS, (end - 1) // _REGION_BLOCKS + 1):
            if not self._allocated[region]:
                with _room_for(self._path):
                    self._files.call("volatile.allocate", os.posix_fallocate, self._fd, (1 + region) * _UNIT, _UNIT)
                self._allocated[region] = 1
        set_range(self._bits, first, end)
        self._dirty.update(range(first // PAGE_BLOCKS, (end - 1) // PAGE_BLOCKS + 1))

    @property
    def archived_limit(self) -> int:
        """Bytes; the smallest size the file had since its archive."""
        return self._archived_limit

    def lower_archived_limit(self, size: int) -> None:
        """The file was cut to ``size`` bytes: what was archived beyond must never come back."""
        if size < self._archived_limit:
            self._archived_limit = size
            self._write_variable()

    @property
    def guest_mtime_ns(self) -> int:
        """When a guest last changed the file; 0 if never since the archive."""
        return self._guest_mtime_ns

    def set_guest_mtime(self, mtime_ns: int) -> None:
        """The nearest that can be told: any time fits a file, 63 bits do not, and 0 means that no guest wrote."""
        self._guest_mtime_ns = max(-_MTIME_NS_END, min(_MTIME_NS_END - 1, mtime_ns)) or 1
        self._write_variable()

    @property
    def frozen(self) -> bool:
        """Whether a sync failed in this boot, so that what it covered is not certain."""
        return self._frozen

    def freeze(self) -> None:
        self._frozen = True
        self._write_variable()

    def _write_variable(self) -> None:
        self._header_dirty = True
        _VARIABLE.pack_into(
            self._memory, _VARIABLE_OFFSET, self._archived_limit, self._guest_mtime_ns, int(self._frozen)
        )

    # Syncing

    @property
    def is_dirty(self) -> bool:
        """Whether anything changed since the last `take_dirty`."""
        return self._header_dirty or bool(self._dirty)

    def take_dirty(self) -> dict[int, bytes]:
        """Copy the pages of bits that changed, by page number of the durable map, and count them as taken."""
        pages = {page: self._page(page) for page in sorted(self._dirty)}
        self._dirty.clear()
        self._header_dirty = False
        return pages

    def _page(self, page: int) -> bytes:
        first = page * PAGE_BITS_SIZE
        end = min(first + PAGE_BITS_SIZE, len(self._bits))
        parts = []
        while first < end:
            region = first // _UNIT
            stop = min(end, (region + 1) * _UNIT)
            parts.append(bytes(self._bits[first:stop]) if self._allocated[region] else bytes(stop - first))
            first = stop
        return b"".join(parts)

    def close(self, *, discard: bool) -> None:
        """Unmap; ``discard`` also removes the file, when the durable map says all that it says.

        One that cannot be removed says nothing else, and is no reason to fail.
        """
        self._bits.release()
        self._memory.close()
        os.close(self._fd)
        if discard:
            try:
                self._files.call("volatile.remove", self._path.unlink, missing_ok=True)
            except OSError as exc:
                log.warning("the volatile map %s could not be removed: %s", self._path, exc.strerror)


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Say which filesystem is full: this is not the one that the disk is on."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"there is no room for the residency map {path}; make room in the runtime directory") from exc
        raise


def _regions(pages: Iterable[bytes], blocks: int) -> Iterator[bytes]:
    """Bits that come in pages of the durable map, in units of this one; those beyond the last block are left out."""
    left, waiting = -(-blocks // 8), bytearray()
    for page in pages:
        waiting += page[:left]
        left -= min(left, len(page))
        while len(waiting) >= _UNIT:
            yield bytes(waiting[:_UNIT])
            del waiting[:_UNIT]
    if waiting:
        yield bytes(waiting).ljust(_UNIT, b"\0")


def _header(placeholder_id: PlaceholderId, boot: BootIdentity, size: int) -> bytes:
    fixed = _HEADER.pack(
        _MAGIC,
        _VERSION,
        0,
        0,
        bytes.fromhex(placeholder_id),
        bytes.fromhex(boot.boot_id),
        boot.mount_id,
        size,
        bytes(16),
    )[:-16]
    return fixed + xxhash.xxh3_128_digest(fixed)
