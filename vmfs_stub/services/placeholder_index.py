"""What is known of the placeholders of a datastore without opening them: for stat, `ls` and error messages.

Filled by the walk at start-up and kept by whoever makes, opens, closes or ends a placeholder.  In memory only; the
truth is on the files, and an opening compares with it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.ids import PointId, StoreId, VmId
from vmfs_stub.primary.record import PlaceholderRecord


@dataclass(slots=True)
class KnownPlaceholder:
    """One placeholder: its record (None when that is what is damaged), what stat reports, and what is wrong with it.

    ``label`` names file and VM for people; ``mtime_ns`` is the record's time until a guest writes,
    and not known where something is wrong.
    """

    record: PlaceholderRecord | None
    label: str
    mtime_ns: int
    problem: VmfsStubError | None = None


@dataclass(frozen=True, slots=True)
class StatOverride:
    """What stat reports instead of what the backing file says: ``blocks`` of 512 bytes, ``mtime_ns``."""

    blocks: int
    mtime_ns: int


_BLOCKS_MIN = 8
"""Never 0: tar -S archives a file of 0 blocks as one hole, without reading it."""


class PlaceholderIndex:
    """Known placeholders by inode number."""

    def __init__(self) -> None:
        self._by_ino: dict[int, KnownPlaceholder] = {}
        self._of_vm: defaultdict[VmId, set[int]] = defaultdict(set)

    def get(self, ino: int) -> KnownPlaceholder | None:
        return self._by_ino.get(ino)

    def add(self, ino: int, known: KnownPlaceholder) -> None:
        self.remove(ino)
        self._by_ino[ino] = known
        if known.record is not None:
            self._of_vm[known.record.vm_id].add(ino)

    def remove(self, ino: int) -> None:
        known = self._by_ino.pop(ino, None)
        if known is not None and known.record is not None:
            inos = self._of_vm[known.record.vm_id]
            inos.remove(ino)
            if not inos:
                del self._of_vm[known.record.vm_id]

    def items(self) -> Iterator[tuple[int, KnownPlaceholder]]:
        yield from self._by_ino.items()

    def stored_elsewhere(self, store_id: StoreId) -> list[KnownPlaceholder]:
        """Those whose bytes are in another store than this one: nothing of them can be recalled."""
        known = self._by_ino.values()
        return [each for each in known if each.record is not None and each.record.store_id != store_id]

    def moved_out(self, vm_id: VmId, inos: Collection[int], point_id: PointId) -> list[KnownPlaceholder]:
        """Placeholders of a VM, but for its present files, that whoever goes on from this point does not have."""
        known = [self._by_ino[ino] for ino in sorted(self._of_vm.get(vm_id, ())) if ino not in inos]
        return [each for each in known if each.record is not None and each.record.point_id != point_id]

    def __len__(self) -> int:
        return len(self._by_ino)

    def stat_override(self, st: os.stat_result) -> StatOverride | None:
        """What to report for a placeholder; None for an ordinary file."""
        known = self._by_ino.get(st.st_ino)
        if known is None:
            return None
        mtime_ns = known.mtime_ns if known.problem is None else st.st_mtime_ns
        return StatOverride(max(st.st_blocks, _BLOCKS_MIN), mtime_ns)
