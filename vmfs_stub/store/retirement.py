"""Retiring packs that are mostly garbage: what is needed of them is copied, then they go, though they are still needed.

Some packs at a time, each time in this order (must = needed data is lost otherwise):
1. Packs are chosen by what the last look has shown, and what is needed of them is found out from segments.
2. That is copied, and documents tell readers where (`repacking.py`); the replica, where there is one, gets the same.
3. Must: their names are on a list as retired, and manifests are looked at again (`condemning.py`).  From then on a
   backup may need of them what was moved, and nothing else, and sees to that itself.
4. Must: after that look the same documents are counted on anew, here and in the replica (`standing.py`): the copies may
   have gone meanwhile, when another collector did not see that the pack was needed, nor a backup that a list was there.
5. Must: a pack goes when all that is needed of it now was moved, and when it holds nothing that was moved from another
   one that is needed: the collector does not know which of those frames are needed.
6. Must: its mark of quarantine goes after it, if there is one; the index names it no more; then the list goes.

Which packs are worth it is a guess, which costs nothing: those of which one segment refers to half are not, and those
of which all segments refer to few parts come first.  Of the others some are looked into in each run, drawn by lot, so
that what turns out to be needed is not in the way of the rest.  Packs that a collector which died was about to retire
come before all: its list stays as long as they do, and backups can refer to nothing of them but what was moved.  So of
these all is moved that is sound, though they cannot go when something else is damaged.
This module must not know how frames are moved, nor who is alive.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappush, heappushpop
from typing import Final

from xxhash import xxh3_64_digest

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import IntegrityError, ObjectMissing, StoreError, UnknownFormat
from vmfs_stub.core.ids import PackId
from vmfs_stub.store.condemned import Condemned, list_keys, read_lists
from vmfs_stub.store.condemning import Condemning
from vmfs_stub.store.keys import LEASES, PACKS, is_id, pack_key, quarantine_key, writer_of
from vmfs_stub.store.moved import PLACES_MAX, Documents
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.repacking import Repacking

log = logging.getLogger(__name__)

RETIRED_BELOW: Final = 0.5
"""Share of a pack's bytes: what less is needed of is copied elsewhere."""
CANDIDATES_MAX: Final = 16_384
"""Packs of one run; bounds its memory, and how long it takes."""
MOVED_BEFORE_MAX: Final = 8
"""Documents about a pack that may be retired: of runs that were cut short; half of the places that a reader tries."""
STUCK_MOVED_BEFORE_MAX: Final = PLACES_MAX - 1
PACKS_AT_ONCE: Final = 512
FRAMES_AT_ONCE: Final = 262_144
"""Of all packs that are dealt with together; bounds the memory that they take."""


@dataclass(slots=True)
class Retired:
    """``packs`` of ``bytes`` in all went, or would; ``copied_bytes`` were stored for them.

    ``kept`` are the manifests that the last look has shown, and the index objects that are there.
    """

    packs: int = 0
    bytes: int = 0
    copied_bytes: int = 0
    kept: set[str] = field(default_factory=set)


class _Rank(IntEnum):
    STUCK = 0
    """On the list of a collector that died, perhaps."""
    LIKELY = 1
    DOUBTFUL = 2


@dataclass(frozen=True, slots=True, order=True)
class _Candidate:
    rank: _Rank
    pack_id: PackId
    size: int


class Retirement:
    """That part of one run of garbage collection."""

    def __init__(self, condemning: Condemning, repacking: Repacking) -> None:
        self._condemning = condemning
        self._objects = condemning.objects
        self._reachability = condemning.reachability
        self._repacking = repacking

    def survey(self) -> Retired:
        """What a run would do after the last look; changes nothing.  Raises: StoreUnavailable, StoreDenied."""
        found = Retired()
        try:
            for batch in self._batches(set(list_keys(self._objects))):
                needed = self._needed_of(batch)
                found.packs += len(needed)
                found.bytes += sum(one.size for one in batch if one.pack_id in needed)
                found.copied_bytes += sum(ref.length for refs in needed.values() for ref in refs.values())
        except (ObjectMissing, IntegrityError, UnknownFormat) as exc:
            log.warning("which packs are mostly garbage cannot be told: %s", exc)
        return found

    def run(self, earlier: Set[str]) -> Retired:
        """Retire packs; ``earlier`` are lists that were there long before.

        What fails is said in the log, and ends it: what was garbage has gone before, and the next run goes on.
        """
        done = Retired()
        try:
            for batch in self._batches(earlier):
                if needed := self._needed_of(batch):
                    self._condemning.say(f"copying what is needed of {len(needed)} packs that are mostly garbage")
                    stuck = {one.pack_id for one in batch if one.rank is _Rank.STUCK}
                    self._retire(batch, needed, self._repacking.move(needed, stuck=stuck), done)
        except (StoreError, IntegrityError, UnknownFormat) as exc:
            log.warning("packs that are mostly garbage stay as they are: %s", exc)
        done.copied_bytes = self._repacking.copied_bytes
        return done

    # Which packs

    def _batches(self, earlier: Set[str]) -> Iterator[Sequence[_Candidate]]:
        candidates = self._candidates(earlier)
        for at in range(0, len(candidates), PACKS_AT_ONCE):
            batch = candidates[at : at + PACKS_AT_ONCE]
            yield batch
            if batch[-1].rank is _Rank.DOUBTFUL:
                return

    def _candidates(self, earlier: Set[str]) -> list[_Candidate]:
        """The most worthwhile first.  Packs of a living writer, and what others are about to delete, are left out.

        Those that are damaged are left to scrub, unless they are stuck: then what can be read of them counts.
        """
        stuck, going = self._on_lists(earlier)
        but = going | (quarantined_packs(self._objects) - stuck)
        alive = {info.key.removeprefix(LEASES) for info in self._objects.list(LEASES)}
        best = _Best(CANDIDATES_MAX)
        for info in self._objects.list(PACKS):
            pack_id = PackId(info.key.rpartition("/")[2])
            use = self._reachability.use(pack_id) if is_id(pack_id) else None
            half = info.size * RETIRED_BELOW
            if use is None or not (use.used < half or pack_id in stuck):
                continue
            documents_max = STUCK_MOVED_BEFORE_MAX if pack_id in stuck else MOVED_BEFORE_MAX
            may_move = self._reachability.may_move(pack_id, documents_max)
            if pack_id not in but and writer_of(pack_id) not in alive and may_move:
                rank = _Rank.LIKELY if use.guess < half else _Rank.DOUBTFUL
                best.add(_Candidate(_Rank.STUCK if pack_id in stuck else rank, pack_id, info.size))
        return best.ordered()

    def _on_lists(self, earlier: Set[str]) -> tuple[frozenset[PackId], frozenset[PackId]]:
        """Packs that were about to be retired long ago, and those that are about to go."""
        stuck, going = Condemned(), Condemned()
        for key, listed in read_lists(self._objects):
            if key in earlier:
                stuck |= listed
            else:
                going |= listed
        return stuck.retired, going.retired | going.packs | stuck.packs

    def _needed_of(self, batch: Sequence[_Candidate]) -> dict[PackId, dict[int, FrameRef]]:
        """The frames that are needed of each pack, by offset; without packs of which too much is needed after all."""
        found: dict[PackId, dict[int, FrameRef]] = {one.pack_id: {} for one in batch}
        room = {one.pack_id: one.size * RETIRED_BELOW for one in batch if one.rank is not _Rank.STUCK}
        count = 0
        for named, refs in self._reachability.references(found.keys()):
            for ref in refs or ():
                if ref.pack_id in found and ref.offset not in found[ref.pack_id]:
                    found[ref.pack_id][ref.offset] = ref
                    count += 1
                    if ref.pack_id in room:
                        room[ref.pack_id] -= ref.length
            over = {pack_id for pack_id in named & found.keys() if refs is None or room.get(pack_id, 1) <= 0}
            while over or count > FRAMES_AT_ONCE:  # those that do not fit are for another run
                count -= len(found.pop(over.pop() if over else next(reversed(found))))
        return {pack_id: frames for pack_id, frames in found.items() if frames}

    # That they go

    def _retire(
        self,
        batch: Sequence[_Candidate],
        needed: Mapping[PackId, Mapping[int, FrameRef]],
        told: Mapping[PackId, Documents],
        done: Retired,
    ) -> None:
        lists, keys = self._condemning.condemn(Condemned(retired=frozenset(told)), done.kept)
        if not lists:
            return
        try:
            going = self._may_go(needed, told)
        except BaseException:
            with suppress(StoreError):  # nothing will be deleted, so backups may need all of it
                self._condemning.delete(lists)
            raise
        self._condemning.delete([pack_key(pack_id) for pack_id in sorted(going)])
        # Of a pack in quarantine that is gone a backup takes what was moved for all that there ever was to save.
        self._condemning.delete([quarantine_key(pack_id) for pack_id in sorted(going)])
        done.kept = keys | self._condemning.clear_index(going)
        self._condemning.delete(lists)
        done.packs += len(going)
        done.bytes += sum(one.size for one in batch if one.pack_id in going)

    def _may_go(
        self, needed: Mapping[PackId, Mapping[int, FrameRef]], told: Mapping[PackId, Documents]
    ) -> frozenset[PackId]:
        """Those of which no more was needed in the last look than can be found elsewhere."""
        left = {pack_id: set(needed[pack_id]) for pack_id in told if not self._reachability.is_target(pack_id)}
        for named, refs in self._reachability.references(left.keys(), only_new=True):
            for ref in refs or ():
                if ref.pack_id in left:
                    left[ref.pack_id].add(ref.offset)
            for pack_id in named if refs is None else ():
                left.pop(pack_id, None)
        standing = self._repacking.standing({pack_id: told[pack_id] for pack_id in left})
        return frozenset(pack_id for pack_id in standing if left[pack_id] <= standing[pack_id])


class _Best:
    """At most so many of all candidates that are added, those of the lowest rank; of the same one, drawn by lot."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._salt = secrets.token_hex(8)
        self._kept: list[tuple[int, bytes, _Candidate]] = []

    def add(self, one: _Candidate) -> None:
        entry = (-one.rank, xxh3_64_digest((self._salt + one.pack_id).encode()), one)
        if len(self._kept) < self._count_max:
            heappush(self._kept, entry)
        else:
            heappushpop(self._kept, entry)

    def ordered(self) -> list[_Candidate]:
        return [one for *_, one in sorted(self._kept, reverse=True)]
