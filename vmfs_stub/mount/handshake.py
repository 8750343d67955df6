"""The first request of a FUSE connection and its answer, as bytes.

libfuse's own answer would not set the limits and flags that the mount needs, so the mount answers INIT itself and
lets libfuse read the same request again, from a socket.  Layouts: linux/fuse.h, fuse_init_in and fuse_init_out of
protocol 7.23 and later.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import Unsupported
from vmfs_stub.mount.settings import MountSettings

REQUEST_BYTES_MAX: Final = 8192
"""The kernel wants room for this much in any read of /dev/fuse."""

PAGE_SIZE: Final = 4096
LIBFUSE_WRITE_MAX: Final = 256 * PAGE_SIZE
"""libfuse 3.14 reads requests of at most 256 pages and a header."""

_OPCODE_INIT: Final = 26
_PROTOCOL_MAJOR: Final = 7
_PROTOCOL_MINOR_MAX: Final = 38
_PROTOCOL_MINOR_MIN: Final = 36
_IN_HEADER: Final = struct.Struct("=IIQQIIII")
_INIT_IN: Final = struct.Struct("=IIIII")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")

ASYNC_READ: Final = 1 << 0
BIG_WRITES: Final = 1 << 5
DONT_MASK: Final = 1 << 6
DO_READDIRPLUS: Final = 1 << 13
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
POSIX_ACL: Final = 1 << 20
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30
NO_EXPORT_SUPPORT: Final = 1 << 38

REQUIRED: Final = {
    "BIG_WRITES": BIG_WRITES,
    "DO_READDIRPLUS": DO_READDIRPLUS,
    "MAX_PAGES": MAX_PAGES,
    "POSIX_ACL": POSIX_ACL,
    "DONT_MASK": DONT_MASK,
    "HANDLE_KILLPRIV_V2": HANDLE_KILLPRIV_V2,
}
"""Without these a program would see something else than documented.

POSIX_ACL: without it the kernel would ignore ACLs and take an ACL's mask for the group's rights.  DONT_MASK: a
directory's default ACL replaces the umask.  HANDLE_KILLPRIV_V2: else each write asks for security.capability first.
"""

WANTED: Final = (
    ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | CACHE_SYMLINKS | INIT_EXT | NO_EXPORT_SUPPORT | sum(REQUIRED.values())
)
"""Not wanted: WRITEBACK_CACHE (the kernel would own mtime and size), ATOMIC_O_TRUNC (truncation comes as setattr),
AUTO_INVAL_DATA (only the daemon changes files), READDIRPLUS_AUTO (pyfuse3 has no plain readdir), lock flags (the
kernel's own locks are right on one host)."""


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the kernel offers."""

    unique: int
    minor: int
    max_readahead: int
    flags: int


def parse_init(request: bytes) -> InitRequest:
    """Read an INIT request; Unsupported when it is another one or the kernel is too old."""
    if len(request) < _IN_HEADER.size + _INIT_IN.size:
        raise Unsupported("the kernel's FUSE INIT request is shorter than that of kernel 5.17: update the kernel")
    _length, opcode, unique, *_rest = _IN_HEADER.unpack_from(request)
    major, minor, max_readahead, flags, flags2 = _INIT_IN.unpack_from(request, _IN_HEADER.size)
    if opcode != _OPCODE_INIT or major != _PROTOCOL_MAJOR or minor < _PROTOCOL_MINOR_MIN:
        raise Unsupported(f"FUSE protocol {major}.{minor} is not supported: kernel 5.17 or newer is needed")
    if flags & INIT_EXT:
        flags |= flags2 << 32
    missing = [name for name, bit in REQUIRED.items() if not flags & bit]
    if missing:
        raise Unsupported(f"the kernel's FUSE does not offer {', '.join(missing)}: kernel 5.17 or newer is needed")
    return InitRequest(unique, minor, max_readahead, flags)


def answer_init(init: InitRequest, settings: MountSettings) -> bytes:
    """The answer to an INIT request."""
    flags = init.flags & WANTED
    max_write = min(settings.max_write_bytes, LIBFUSE_WRITE_MAX)
    body = _INIT_OUT.pack(
        _PROTOCOL_MAJOR,
        min(init.minor, _PROTOCOL_MINOR_MAX),
        init.max_readahead,
        flags & 0xFFFFFFFF,
        settings.max_background,
        settings.max_background * 3 // 4,
        max_write,
        1,
        max_write // PAGE_SIZE,
        0,
        flags >> 32,
    )
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, init.unique) + body
