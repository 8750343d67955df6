"""The file in which chunks of a disk that is backed up while it is used are set aside, before a guest changes them.

It has the layout of the disk, with holes for all that nobody changed; behind that, one byte for each chunk: not zero
once the chunk is here.  Invariants:
* a chunk's byte is set after its bytes are here, and before the disk's own are changed;
* so whoever reads a chunk from the disk, then looks at its byte, and finds none, has read what it was at the moment.
It has no name: what is left of it by a crash is what the kernel frees.  Blocking.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import struct
from pathlib import Path

from vmfs_stub.core.chunking import chunk_count
from vmfs_stub.core.extents import Extent
from vmfs_stub.paced_io import read_into
from vmfs_stub.primary.files import FileCalls, read_fully, write_fully

_UNIT = 4096
_IS_HERE = re.compile(rb"[^\0]+")
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
"""From which descriptor, at which offset, how many bytes, to which offset."""


def make_nameless(files: FileCalls, directory: Path) -> int:
    """A new, empty file that nobody can find; returns its descriptor.  Raises OSError."""
    path = directory / secrets.token_hex(16)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = files.call("aside.create", os.open, path, flags, 0o600)
    try:
        files.call("aside.unlink", path.unlink)
    except BaseException:
        os.close(fd)
        raise
    return fd


def marks_offset(size: int) -> int:
    """Where the bytes of the chunks begin, for a disk of ``size`` bytes."""
    return -(-size // _UNIT) * _UNIT


def lay_out(files: FileCalls, fd: int, *, size: int, chunk_size: int) -> None:
    """Make it a file in which nothing is set aside yet, of a disk of ``size`` bytes.  Raises OSError."""
    files.call("aside.size", os.ftruncate, fd, 0)
    files.call("aside.size", os.ftruncate, fd, marks_offset(size) + chunk_count(size, chunk_size))


def mark(files: FileCalls, fd: int, chunks: Extent, *, size: int) -> None:
    """These chunks are here now.  Raises OSError."""
    files.call("aside.mark", write_fully, fd, b"\1" * chunks.length, marks_offset(size) + chunks.start)


def take_set_aside(
    files: FileCalls, fd: int, buffer: bytearray, offset: int, *, read_bytes: int, size: int, chunk_size: int
) -> None:
    """Of what was read from the disk at ``offset`` (of a chunk) into ``buffer``, replace what was set aside by then.

    Where ``read_bytes`` are fewer than there is room for, the rest has to be set aside, having been cut off since.
    Raises OSError.
    """
    first, end = offset // chunk_size, chunk_count(offset + len(buffer), chunk_size)
    marks = read_fully(files, "aside.marks", fd, end - first, marks_offset(size) + first)
    if len(marks) != end - first:
        raise OSError(errno.EIO, "what was set aside is shorter than it was")
    if read_bytes < len(buffer) and not all(marks[read_bytes // chunk_size :]):
        raise OSError(errno.EIO, f"{read_bytes} of {len(buffer)} bytes at {offset} could be read")
    for found in _IS_HERE.finditer(marks):
        start, stop = found.start() * chunk_size, min(len(buffer), found.end() * chunk_size)
        taken = bytearray(stop - start)
        if files.call("aside.take", read_into, fd, taken, offset + start) != len(taken):
            raise OSError(errno.EIO, "what was set aside is shorter than it was")
        buffer[start:stop] = taken


def can_clone(files: FileCalls, fd: int, directory: Path) -> bool:
    """Whether the filesystem lets two files share their bytes.  Raises OSError when not even that can be tried."""
    to = make_nameless(files, directory)
    try:
        wanted = _CLONE_RANGE.pack(fd, 0, _UNIT if os.fstat(fd).st_size >= _UNIT else 0, 0)
        files.call("aside.probe", fcntl.ioctl, to, _FICLONERANGE, wanted)
    except OSError:
        return False
    finally:
        os.close(to)
    return True


def clone(files: FileCalls, fd: int, to: int) -> None:
    """Let the empty file ``to`` have what ``fd`` has now, all of it at one moment.  Raises OSError."""
    files.call("aside.clone", fcntl.ioctl, to, _FICLONE, fd)
