"""What is written to disks under test, and in words how what was read differs from it."""

from __future__ import annotations

import random
from typing import Final

BLOCK: Final = 4096


def random_content(chance: random.Random, length: int) -> bytes:
    """Zeros, noise or something compressible."""
    kind = chance.random()
    if kind < 0.1:
        return bytes(length)
    if kind < 0.8:
        return chance.randbytes(length)
    return (chance.randbytes(48) * (length // 48 + 1))[:length]


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
