"""What is written to disks under test, and in words how what was read differs from it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Final

BLOCK: Final = 4096
CHUNK: Final = 64 << 10


def random_content(chance: random.Random, length: int) -> bytes:
    """Zeros, noise or something compressible."""
    kind = chance.random()
    if kind < 0.1:
        return bytes(length)
    if kind < 0.8:
        return chance.randbytes(length)
    return (chance.randbytes(48) * (length // 48 + 1))[:length]


def salted_copies(source: Path, target: Path, *, copies: int, salt: int) -> None:
    """Several copies of an image in one, of which no chunk is in another: nothing of it is deduplicated.

    What is made with another ``salt`` has no chunk of it, either.
    """
    number = salt << 32
    with target.open("wb") as out:
        for _ in range(copies):
            with source.open("rb") as image:
                while part := image.read(CHUNK):
                    number += 1
                    out.write(number.to_bytes(8, "little") + part[8:])


def change_extents(disk: Path, chance: random.Random, *, share: float, extent_bytes: int) -> int:
    """Write noise over a share of a disk, in separate extents at the starts of blocks; durable, returns the bytes."""
    size = disk.stat().st_size
    slot_bytes = 2 * extent_bytes
    count = round(size * share / extent_bytes)
    with disk.open("r+b") as file:
        for slot in sorted(chance.sample(range(size // slot_bytes), count)):
            file.seek(slot * slot_bytes + chance.randrange(extent_bytes // BLOCK) * BLOCK)
            file.write(chance.randbytes(extent_bytes))
        file.flush()
        os.fsync(file.fileno())
    return count * extent_bytes


def difference(found: bytes, wanted: bytes | bytearray, offset: int) -> str:
    """How bytes that were read at ``offset`` differ from what they should be; empty when they do not."""
    if found == wanted:
        return ""
    if len(found) != len(wanted):
        return f"{len(found)} bytes at {offset} instead of {len(wanted)}"
    differing = [at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    first, last = differing[0], differing[-1]
    kind = "zeros" if not any(found[first : last + 1]) else "other bytes"
    return (
        f"WRONG BYTES: {kind} from {offset + first} to {offset + last} (blocks {(offset + first) // BLOCK} to "
        f"{(offset + last) // BLOCK}): {found[first : first + 16].hex()} instead of "
        f"{bytes(wanted[first : first + 16]).hex()}"
    )
