"""The map of changes of a file that is written to: which chunks may differ from those of its last restore point.

A file mapped into memory, in the directory that outlives the daemon: it survives a kill of the daemon, and is void in
another boot or mount.  The first unit holds the header, the bits follow.

Invariants:
* a bit is set before the write that changes the chunk is begun, never after;
* there is no *marked* map while the file's durable record is there: whoever marks it has removed that, durably;
* no page of bits is touched before space for it is allocated, since a full filesystem under a mapping is a SIGBUS;
* what cannot be noted makes the map *void*, in the map itself, before anything else is done.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import struct
from pathlib import Path

from vmfs_stub.core.changed import Changed, bits_size, chunks_touched
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import set_range
from vmfs_stub.primary.changed_record import Seen, described, take_described
from vmfs_stub.primary.durable_map import NEW_SUFFIX
from vmfs_stub.primary.envelope import UINT64_MAX, Body, Damaged, NewerVersion, seal, unseal
from vmfs_stub.primary.files import FileCalls, read_fully, write_fully
from vmfs_stub.primary.identity import BootIdentity, InodeIdentity

_UNIT = 4096
_REGION_CHUNKS = _UNIT * 8
"""Chunks whose bits lie in one unit: 2 GiB of a disk with chunks of 64 KiB."""
_MAGIC = b"VSTBCHL\0"
_VERSION = 1
_VARIABLE_OFFSET = 3072
"""Behind the envelope: state, and what was seen; both change in place."""
_STATE = struct.Struct("<B")
_SEEN = struct.Struct("<QqIqI")
"""Size, modification time and change time, each in seconds and nanoseconds."""
_SEEN_OFFSET = _VARIABLE_OFFSET + 8
_SECOND_NS = 1_000_000_000


class ChangedState(enum.IntEnum):
    """How much the map says."""

    VOID = 0
    """Nothing."""
    MADE = 1
    """What the record says, which may still be there; nothing was written."""
    MARKED = 2
    """The file is being written to: every chunk that changed has its bit."""
    LEFT = 3
    """The same, and the file was closed as it was seen then."""


class ChangedMap:
    """The map of one file, which has ``identity``.  Used from one thread at a time."""

    def __init__(self, files: FileCalls, fd: int, path: Path, identity: InodeIdentity, origin: Origin) -> None:
        self._files = files
        self._path = path
        self.identity = identity
        self.origin = origin
        regions = -(-bits_size(origin) // _UNIT)
        self._memory = files.call("changes.map", mmap.mmap, fd, _UNIT + regions * _UNIT)
        self._bits = memoryview(self._memory)[_UNIT:]
        self._allocated = bytearray(regions)
        self._fd = fd
        (state,) = _STATE.unpack_from(self._memory, _VARIABLE_OFFSET)
        self.state = ChangedState(state) if state <= max(ChangedState) else ChangedState.VOID

    @classmethod
    def create(
        cls, files: FileCalls, path: Path, *, identity: InodeIdentity, boot: BootIdentity, changed: Changed
    ) -> ChangedMap:
        """Make a map that says what ``changed`` says, in place of what is at ``path``.  Raises OSError."""
        new = path.with_name(path.name + NEW_SUFFIX)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = files.call("changes.begin", os.open, new, flags, 0o600)
        try:
            head = _header(identity, boot, changed).ljust(_VARIABLE_OFFSET, b"\0") + _STATE.pack(ChangedState.MADE)
            files.call("changes.allocate", write_fully, fd, head.ljust(_UNIT, b"\0"), 0)
            files.call("changes.begin", os.ftruncate, fd, _UNIT + -(-len(changed.bits) // _UNIT) * _UNIT)
            for at in range(0, len(changed.bits), _UNIT):
                if any(part := changed.bits[at : at + _UNIT]):
                    files.call("changes.allocate", write_fully, fd, part, _UNIT + at)
            files.call("changes.begin", os.rename, new, path)
            return cls(files, fd, path, identity, changed.origin)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, files: FileCalls, path: Path, *, boot: BootIdentity) -> ChangedMap | None:
        """Take up the map at ``path``; None when there is none, or none that says anything in this boot.

        Raises OSError.
        """
        try:
            fd = files.call("changes.open", os.open, path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            identity, origin = _described_in(read_fully(files, "changes.read", fd, _UNIT, 0), boot)
            size = os.fstat(fd).st_size - _UNIT
            if size != -(-bits_size(origin) // _UNIT) * _UNIT:
                raise Damaged("it has the wrong size")
            return cls(files, fd, path, identity, origin)
        except (Damaged, NewerVersion):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise

    # What it says

    @property
    def seen(self) -> Seen | None:
        """The file as it was left; None while it is written to."""
        if self.state is not ChangedState.LEFT:
            return None
        size, mtime_s, mtime_ns, ctime_s, ctime_ns = _SEEN.unpack_from(self._memory, _SEEN_OFFSET)
        return Seen(size, mtime_s * _SECOND_NS + mtime_ns, ctime_s * _SECOND_NS + ctime_ns)

    def changed(self) -> Changed:
        """All bits, as they are now.  Raises OSError."""
        # Read, not looked at in memory: that would allocate what is empty.
        size = bits_size(self.origin)
        bits = read_fully(self._files, "changes.read", self._fd, size, _UNIT)
        if len(bits) != size:
            raise OSError(errno.EIO, "a map of changes is shorter than it was")
        return Changed(self.origin, bits)

    # Changes

    def set_changed(self, offset: int, length: int) -> None:
        """``length`` bytes at ``offset`` are about to be changed.  Raises OSError: then the caller makes it void."""
        touched = chunks_touched(self.origin, offset, length)
        for region in range(touched.start // _REGION_CHUNKS, -(-touched.end // _REGION_CHUNKS)):
            if not self._allocated[region]:
                self._files.call("changes.allocate", os.posix_fallocate, self._fd, (1 + region) * _UNIT, _UNIT)
                self._allocated[region] = 1
        set_range(self._bits, touched.start, touched.end)

    def mark(self) -> None:
        """The record is durably gone, or the file is about to be written to again: from now on this counts."""
        self._set_state(ChangedState.MARKED)

    def leave(self, seen: Seen) -> None:
        """Nobody has the file open any more."""
        mtime, ctime = divmod(seen.mtime_ns, _SECOND_NS), divmod(seen.ctime_ns, _SECOND_NS)
        _SEEN.pack_into(self._memory, _SEEN_OFFSET, seen.size, *mtime, *ctime)
        self._set_state(ChangedState.LEFT)

    def make_void(self) -> None:
        """It says nothing any more."""
        self._set_state(ChangedState.VOID)

    def _set_state(self, state: ChangedState) -> None:
        _STATE.pack_into(self._memory, _VARIABLE_OFFSET, state)
        self.state = state

    def close(self) -> None:
        """Unmap it; the file stays."""
        self._bits.release()
        self._memory.close()
        os.close(self._fd)


def _header(identity: InodeIdentity, boot: BootIdentity, changed: Changed) -> bytes:
    live = {"boot_id": boot.boot_id, "mount_id": boot.mount_id}
    return seal(_MAGIC, _VERSION, {**described(identity, changed.origin), "live": live})


def _described_in(raw: bytes, boot: BootIdentity) -> tuple[InodeIdentity, Origin]:
    body = Body(unseal(raw, magic=_MAGIC, version=_VERSION))
    identity, origin = take_described(body)
    live = body.body("live")
    found = BootIdentity(live.identifier("boot_id"), live.integer("mount_id", high=UINT64_MAX))
    live.finish()
    body.finish()
    if found != boot:
        raise Damaged("it is of another boot or mount")
    return identity, origin
