"""What one file must hold, as bytes in memory: now, and what it may hold after a kill or a power loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.medium import BLOCK, Key

Write = tuple[int, bytes]
"""Offset and data."""


class Wrong(AssertionError):
    """Something is not what it must be."""


@dataclass(eq=False)
class Contents:
    """One file, whatever its names are.

    ``content`` is what it holds.  ``unsure`` is what it may hold instead, since a change was cut short or failed;
    ``versions`` are all contents since the last moment when all of it was durable, and ``is_lost`` says that a power
    loss came since and nobody looked: any of them may be there, block by block.
    """

    content: bytearray
    key: Key | None = None
    mtime_ns: int | None = None
    """What stat must report; None when that is not known."""
    versions: list[bytes] = field(default_factory=list)
    unsure: list[bytes] = field(default_factory=list)
    is_lost: bool = False
    is_doubtful: bool = False
    """A sync of it as an ordinary file failed: none that comes later is to be trusted until the next boot."""
    is_copy: bool = False
    """A copy of a placeholder, made behind the daemon: it gives errors and nothing else."""
    _ends: set[int] = field(default_factory=set)
    """Every size that it had."""

    def __post_init__(self) -> None:
        self.synced()

    @property
    def is_settled(self) -> bool:
        """Whether it holds ``content`` and nothing else."""
        return not self.unsure and not self.is_lost

    # Changes

    def begin_writes(self, writes: Sequence[Write]) -> None:
        """Writes at once that do not overlap: until `done`, any of them may have been made."""
        for made in itertools.product((False, True), repeat=len(writes)):
            changed = bytearray(self.content)
            for (offset, data), is_made in zip(writes, made, strict=True):
                if is_made:
                    changed.extend(bytes(max(0, offset - len(changed))))
                    changed[offset : offset + len(data)] = data
            self._begin(bytes(changed))

    def begin_truncate(self, size: int) -> None:
        self._begin(bytes(self.content[:size].ljust(size, b"\0")))

    def _begin(self, result: bytes) -> None:
        self._ends |= {len(self.content), len(result)}
        self.unsure.append(result)
        self.versions.append(result)

    def done(self) -> None:
        """What was begun is done, all of it."""
        self.content = bytearray(self.unsure[-1])
        self.unsure.clear()

    def not_done(self) -> None:
        """Nothing of what was begun has been done."""
        self.unsure.clear()

    def synced(self) -> None:
        """All of it is durable."""
        if not self.is_doubtful:
            self._ends |= {len(self.content)}
            self.versions = [bytes(self.content)]

    def power_lost(self) -> None:
        self.is_lost, self.is_doubtful, self.mtime_ns = True, False, None

    # Looking

    def settle(self, found: bytes) -> None:
        """Go on with what was found, if that is possible.  Raises Wrong."""
        possible = [bytes(self.content), *self.unsure, *(self.versions if self.is_lost else ())]
        sizes = {len(version) for version in possible}
        between = self.is_lost and len(found) % BLOCK == 0 and min(sizes) < len(found) < max(sizes)
        if len(found) not in sizes and not between:
            raise Wrong(f"its size is {len(found)}, which it never had since it was last synced ({sorted(sizes)})")
        for at in range(0, len(found), BLOCK):
            block = found[at : at + BLOCK]
            blocks = {version[at : at + BLOCK].ljust(BLOCK, b"\0") for version in possible}
            if block not in {each[: len(block)] for each in blocks} and block not in self._torn(blocks, at, len(block)):
                raise Wrong(f"block {at // BLOCK} is none that it was since it was last synced")
        if not self.is_settled:
            self.content, self.mtime_ns = bytearray(found), None
            self.unsure.clear()
            if self.is_lost:
                self.is_lost = False
                self.synced()
            else:
                self.versions.append(bytes(found))

    def _torn(self, blocks: set[bytes], at: int, length: int) -> set[bytes]:
        """What a block may be in which the file once ended: up to that end as archived, what was written behind it."""
        if not self.is_lost and not self.unsure:
            return set()
        ends = {end - at for end in self._ends if at < end < at + BLOCK}
        return {(old[:end] + new[end:])[:length] for end in ends for old in blocks for new in blocks}
