"""Scrub: proves that what restore points need of a store is still what was written, and names who needs what is not.

Purpose: `verify` follows restore points, and reads what they share again for each run over some of them; this goes over
the store's objects, each once, past any cache, at a limited rate, and takes up where it was stopped.

1. Manifests, of forgotten points too (placeholders may need them), and segments: which packs are needed, and which
   frames of those of which frames have moved.
2. Packs by name: the footer, and every frame by checksum and by identity.  What is damaged is marked at once, so that
   no backup refers to it any more (`store/quarantine.py`).  Progress is kept pack by pack.  A pack that is missing
   was retired (`store/retirement.py`), and that is no damage, when every frame that is needed of it is sound where it
   was moved to; when packs turn out to be damaged, missing ones of which anything was moved there are looked at again.
   Where a frame of a missing pack seems to be lost, the mark waits for 3: what needed it may be deleted by then.
3. Only when something is wrong: all points again, for what they need of it.  That is repaired where there is another
   copy (`scrub_repair.py`); of the rest those are named that need it.  What was deleted meanwhile, point and all, is
   nobody's then.

Packs, not points: damage in what nothing needs today would be handed out by deduplication tomorrow.
Blocking code with a few threads.  This module must not know primary storage.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from vmfs_stub.core.batches import batched
from vmfs_stub.core.chunking import FrameRef, chunk_count
from vmfs_stub.core.errors import IntegrityError, ObjectMissing, PointNotFound, StoreDenied, StoreFull
from vmfs_stub.core.ids import PackId, PointId, SegmentId, VmId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.services.rate import Rate
from vmfs_stub.services.scrub_progress import PackDamage, ScrubProgress
from vmfs_stub.services.scrub_repair import Frame, repair, replace_damaged, replace_manifest, was_moved
from vmfs_stub.services.scrub_report import DAMAGES_MAX, Damage, Need, ScrubReport, damage_of, urgency
from vmfs_stub.store import frames
from vmfs_stub.store.format import SEGMENT_CHUNKS, SEGMENT_SIZE_MAX
from vmfs_stub.store.keys import MOVED, PACKS, is_id, manifest_key, noted_pack, pack_key, segment_key
from vmfs_stub.store.manifest import Manifest, StoredFile
from vmfs_stub.store.moved import read_moves
from vmfs_stub.store.objects import drop_cache, exists
from vmfs_stub.store.packs import read_footer
from vmfs_stub.store.quarantine import Quarantine, put_quarantine, read_quarantine
from vmfs_stub.store.segments import Segment
from vmfs_stub.store.store import Store

WORKERS: Final = 2
RUN_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes that are read and checked together."""
DAMAGED_AT_ONCE: Final = 200
"""Damaged packs that are looked into together, which bounds the frames that are held in memory."""
MOVED_TO_DAMAGED_MAX: Final = 100_000
"""Damaged packs of which it is looked up what was moved to them."""
SEGMENTS_AT_ONCE: Final = 64

log = logging.getLogger(__name__)


def scrub(
    store: Store,
    progress: ScrubProgress,
    *,
    replica: Store | None = None,
    rate: Rate | None = None,
    workers: int = WORKERS,
    advance: Callable[[int], None] = lambda count: None,
) -> ScrubReport:
    """Go over the store until a round is complete; ``advance`` is called with the bytes of packs just dealt with.

    What is damaged is repaired from ``replica``, too, whose copies are checked before they are used.
    Raises: UnknownFormat for what a newer version wrote; StoreUnavailable, StoreDenied: what was dealt with so far is
    kept in ``progress``.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="scrub") as executor:
        return _Scrub(store, progress, replica, rate or Rate(), executor, workers, advance).run()


class _Scrub:
    def __init__(
        self,
        store: Store,
        progress: ScrubProgress,
        replica: Store | None,
        rate: Rate,
        executor: ThreadPoolExecutor,
        workers: int,
        advance: Callable[[int], None],
    ) -> None:
        self._store = store
        self._progress = progress
        self._replica = replica
        self._rate = rate
        self._executor = executor
        self._workers = workers
        self._advance = advance
        self._bad_segments: dict[SegmentId, str] = {}
        self._slots: dict[SegmentId, tuple[Frame, ...]] = {}
        """Of a segment, the damaged frame of each chunk that has one."""
        self._others: dict[str, Damage] = {}
        self._moved: frozenset[PackId] = frozenset()
        """Packs of which frames had moved when the round began."""
        self._pack_count = 0

    def run(self) -> ScrubReport:
        point_count, segment_count, is_sound = self._look_at_points()
        self._look_at_packs()
        self._look_at_copies()
        found: list[Damage] = []
        after = ""
        while batch := self._progress.damaged(after, DAMAGED_AT_ONCE):
            found += self._judged({damage.pack_id: damage for damage in batch})
            after = batch[-1].pack_id
        if not is_sound and not found:
            self._judged({})
        found = sorted([*found, *self._others.values()], key=urgency)
        self._progress.finish()
        told = tuple(found[:DAMAGES_MAX])
        return ScrubReport(
            point_count, segment_count, self._pack_count, self._rate.bytes, told, more_damages=len(found) - len(told)
        )

    # Manifests and segments

    def _look_at_points(self) -> tuple[int, int, bool]:
        """Returns the number of points and segments, and whether all of them are sound."""
        seen: set[SegmentId] = set()
        self._moved = frozenset(noted_pack(info.key) for info in self._store.objects.list(MOVED))
        point_count, is_sound = 0, True
        for _, manifest in self._points():
            point_count += 1
            if not isinstance(manifest, Manifest):
                is_sound = False
                continue
            new = {one for stored in manifest.files for one in stored.segments if one is not None} - seen
            seen |= new
            for part in batched(sorted(new), SEGMENTS_AT_ONCE):
                for packs, moved in self._executor.map(self._check_segment, part):
                    self._progress.need(packs)
                    self._progress.need_frames(moved)
        return point_count, len(seen), is_sound and not self._bad_segments

    def _points(self) -> Iterator[tuple[tuple[VmId, PointId], Manifest | str]]:
        """Every point that is there, with what is wrong where its manifest cannot be read."""
        for vm_id, point_id in self._store.stored_points():
            drop_cache(self._store.objects, manifest_key(vm_id, point_id))
            try:
                yield (vm_id, point_id), self._store.open_point(vm_id, point_id).manifest
            except PointNotFound:
                continue  # deleted since the listing, or void
            except IntegrityError as exc:
                key = manifest_key(vm_id, point_id)
                if self._replica is not None and replace_manifest(self._store, self._replica, key):
                    yield (vm_id, point_id), self._store.open_point(vm_id, point_id).manifest
                else:
                    yield (vm_id, point_id), str(exc)

    def _check_segment(self, segment_id: SegmentId) -> tuple[Sequence[PackId], Sequence[FrameRef]]:
        """Its packs, and all frames of those of which any have moved."""
        try:
            segment = self._segment(segment_id)
            for slot in range(segment.slot_count):
                segment.ref(slot)
        except (IntegrityError, ObjectMissing) as exc:
            key, check = segment_key(segment_id), partial(Segment, segment_id=segment_id, sealing=self._store.sealing)
            if self._replica is None or not replace_damaged(self._store, self._replica, key, check):
                self._bad_segments[segment_id] = str(exc)
                return (), ()
            segment = self._segment(segment_id)
        return segment.packs, segment.refs_to(self._moved)

    def _segment(self, segment_id: SegmentId) -> Segment:
        key = segment_key(segment_id)
        drop_cache(self._store.objects, key)
        data = self._store.objects.get(key, size_max=SEGMENT_SIZE_MAX)
        self._rate.take(len(data))
        return Segment(data, segment_id, self._store.sealing)

    # Packs

    def _look_at_packs(self) -> None:
        after = self._progress.after
        folders = {info.key.removeprefix(PACKS)[:2] for info in self._store.objects.list(PACKS)}
        for number in range(256):  # a folder at a time, or all names of a large store would be in memory
            digits = f"{number:02x}"
            needed = self._progress.needed(digits)
            if digits not in folders and not needed:
                continue
            sizes = {
                PackId(name): info.size
                for info in self._store.objects.list(f"{PACKS}{digits}/")
                if is_id(name := info.key.rpartition("/")[2])
            }
            names = sorted(sizes.keys() | needed)
            self._advance(sum(sizes.get(name, 0) for name in names if name <= after))
            for part in batched([name for name in names if name > after], self._workers):
                for pack_id, found in zip(part, self._executor.map(self._check_pack, part), strict=True):
                    self._pass(pack_id, found, is_needed=pack_id in needed)
                    self._advance(sizes.get(pack_id, 0))

    def _pass(self, pack_id: PackId, found: PackDamage | ObjectMissing | None, *, is_needed: bool) -> None:
        if isinstance(found, ObjectMissing):
            # One that is gone is damage to those alone who need it.
            damage = self._missing(pack_id, str(found)) if is_needed else None
        else:
            damage = found
            self._pack_count += 1
            if damage is not None:
                self._quarantine(damage)
        self._progress.passed(pack_id, damage)

    def _quarantine(self, damage: PackDamage) -> None:
        offsets = tuple(sorted(damage.offsets or ()))
        mark = Quarantine(time.time(), offsets, damage.problem, secrets.token_hex(8))
        try:
            put_quarantine(self._store.objects, mark, damage.pack_id)
        except (StoreDenied, StoreFull) as exc:  # what is found is told all the same
            log.warning("pack %s could not be put in quarantine: %s", damage.pack_id, exc)

    def _check_pack(self, pack_id: PackId) -> PackDamage | ObjectMissing | None:
        """Only what is found twice is damage: the mark stays, and what came wrong over a network once is none."""
        return self._look_at_pack(pack_id) and self._look_at_pack(pack_id)

    def _look_at_pack(self, pack_id: PackId) -> PackDamage | ObjectMissing | None:
        drop_cache(self._store.objects, pack_key(pack_id))
        problems: dict[int, str] = {}
        try:
            for run in _runs(read_footer(self._store.objects, pack_id, self._store.sealing)):
                problems |= self._check_run(run)
        except ObjectMissing as exc:
            return exc
        except IntegrityError as exc:
            return PackDamage(pack_id, str(exc), None)
        if not problems:
            return None
        return PackDamage(pack_id, next(iter(problems.values())), frozenset(problems))

    def _missing(self, pack_id: PackId, problem: str) -> PackDamage | None:
        """What is lost with a pack that is gone; nothing when all that is needed of it is sound elsewhere."""
        moves = read_moves(self._store.objects, pack_id)
        if not moves or read_quarantine(self._store.objects, pack_id) is not None:
            return PackDamage(pack_id, problem, None)
        if pack_id not in self._moved:
            return None  # it was retired since the round began, after its copies were read back
        for copy_id in {move.pack_id for move in moves}:
            drop_cache(self._store.objects, pack_key(copy_id))
        self._store.moved.look_again()
        left = {ref.offset: ref for ref in self._progress.needed_frames(pack_id)}
        places = [
            (offset, place) for offset, ref in left.items() if (place := self._store.moved.place(ref)) is not None
        ]
        for fetch in plan_fetches(places, fetch_bytes_max=RUN_BYTES, gap_bytes_max=RUN_BYTES):
            with suppress(ObjectMissing):
                problems = self._check_run(fetch.frames)
                for offset, place in zip(fetch.chunks, fetch.frames, strict=True):
                    if place.offset not in problems:
                        del left[offset]
        lost = frozenset(offset for offset, ref in left.items() if not was_moved(self._store, ref))
        return PackDamage(pack_id, problem, lost) if lost else None

    def _look_at_copies(self) -> None:
        """Packs that are gone, and were moved to what turned out to be damaged after they were dealt with."""
        damaged = {damage.pack_id for damage in self._progress.damaged("", MOVED_TO_DAMAGED_MAX)}
        for pack_id in sorted(self._moved - damaged) if damaged else ():
            copies = {move.pack_id for move in read_moves(self._store.objects, pack_id)}
            if copies & damaged and not exists(self._store.objects, pack_key(pack_id)):
                damage = self._missing(pack_id, f"{pack_key(pack_id)} is gone, and what was moved of it is damaged")
                if damage is not None:
                    self._progress.found(damage)

    def _check_run(self, run: Sequence[FrameRef]) -> dict[int, str]:
        """What is wrong with neighbouring frames, by offset."""
        self._rate.take(run[-1].end - run[0].offset)
        try:
            self._read(run)
        except IntegrityError as exc:
            if len(run) == 1:
                return {run[0].offset: str(exc)}
        else:
            return {}
        # Something in it is wrong: find out exactly which, one by one.
        return {offset: problem for ref in run for offset, problem in self._check_run([ref]).items()}

    def _read(self, run: Sequence[FrameRef]) -> None:
        for ref, raw in zip(run, self._store.fetch_in_place(run), strict=True):
            frames.check_identity(raw, ref, self._store.sealing)

    # Who needs what is damaged

    def _judged(self, damaged: Mapping[PackId, PackDamage]) -> list[Damage]:
        """Repair what can be, and name who needs the rest; ``_others`` is then what is wrong beside packs."""
        refs, names = self._needed_frames(damaged)
        repaired = repair(self._store, refs, self._replica)
        problems, needs = self._needs(refs.keys() - repaired, names)
        self._others = {key: damage_of(key, problem, needs[key]) for key, problem in problems.items()}
        needed_counts, repaired_counts = (Counter(pack_id for pack_id, _ in each) for each in (refs, repaired))
        found = []
        for pack_id, damage in damaged.items():
            key, frame_count = pack_key(pack_id), needed_counts[pack_id]
            is_there = exists(self._store.objects, key)
            if frame_count or is_there:  # or else it was deleted, together with what needed it
                if not is_there and repaired_counts[pack_id] < frame_count:  # or else it may have been retired
                    self._quarantine(damage)
                mark = read_quarantine(self._store.objects, pack_id)
                found.append(
                    replace(
                        damage_of(key, damage.problem, needs[key]),
                        frame_count=frame_count,
                        repaired_count=repaired_counts[pack_id],
                        since_s=None if mark is None else mark.found_s,
                    )
                )
        return found

    def _needed_frames(self, damaged: Mapping[PackId, PackDamage]) -> tuple[dict[Frame, FrameRef], dict[VmId, str]]:
        """The damaged frames that points need, and the names of VMs."""
        self._slots.clear()
        refs: dict[Frame, FrameRef] = {}
        names: dict[VmId, str] = {}
        for (vm_id, _), manifest in self._points():
            if isinstance(manifest, Manifest):
                names[vm_id] = manifest.vm_name
                for segment_id in {one for stored in manifest.files for one in stored.segments if one is not None}:
                    if segment_id not in self._slots and segment_id not in self._bad_segments:
                        self._slots[segment_id] = self._damaged_slots(segment_id, damaged, refs)
        return refs, names

    def _damaged_slots(
        self, segment_id: SegmentId, damaged: Mapping[PackId, PackDamage], refs: dict[Frame, FrameRef]
    ) -> tuple[Frame, ...]:
        try:
            segment = self._segment(segment_id)
            if damaged.keys().isdisjoint(segment.packs):
                return ()
            found = [ref for ref in map(segment.ref, range(segment.slot_count)) if _is_damaged(ref, damaged)]
        except (IntegrityError, ObjectMissing) as exc:
            self._bad_segments[segment_id] = str(exc)
            return ()
        slots = tuple((ref.pack_id, ref.offset) for ref in found if ref is not None)
        refs.update((frame, ref) for frame, ref in zip(slots, found, strict=True) if ref is not None)
        return slots

    def _needs(
        self, lost: Set[Frame], names: Mapping[VmId, str]
    ) -> tuple[dict[str, str], defaultdict[str, list[Need]]]:
        """What is wrong with manifests and segments, and who needs what, both by key."""
        pins = self._store.pin_counts()
        problems: dict[str, str] = {}
        needs: defaultdict[str, list[Need]] = defaultdict(list)
        for (vm_id, point_id), manifest in self._points():
            pin_count, name = pins.get((vm_id, point_id), 0), names.get(vm_id, "")
            if not isinstance(manifest, Manifest):
                key = manifest_key(vm_id, point_id)
                problems[key] = manifest
                needs[key].append(Need(vm_id, name, point_id, pin_count, "", 0))
                continue
            for stored in manifest.files:
                for key, count in self._lost_chunks(stored, lost, problems).items():
                    needs[key].append(Need(vm_id, name, point_id, pin_count, stored.path, count))
        return problems, needs

    def _lost_chunks(self, stored: StoredFile, lost: Set[Frame], problems: dict[str, str]) -> Counter[str]:
        """Chunks of a file that cannot be read, by the object that is damaged."""
        counts: Counter[str] = Counter()
        for number, segment_id in enumerate(stored.segments):
            if segment_id in self._bad_segments:
                key = segment_key(segment_id)
                problems[key] = self._bad_segments[segment_id]
                chunks = chunk_count(stored.size, self._store.chunk_size) - number * SEGMENT_CHUNKS
                counts[key] += min(SEGMENT_CHUNKS, chunks)
            elif segment_id is not None:
                counts.update(pack_key(frame[0]) for frame in self._slots.get(segment_id, ()) if frame in lost)
        return counts


def _is_damaged(ref: FrameRef | None, damaged: Mapping[PackId, PackDamage]) -> bool:
    damage = None if ref is None else damaged.get(ref.pack_id)
    return damage is not None and ref is not None and (damage.offsets is None or ref.offset in damage.offsets)


def _runs(refs: Iterable[FrameRef]) -> Iterator[Sequence[FrameRef]]:
    """Neighbouring frames of a pack, as many as are read at once."""
    for fetch in plan_fetches(enumerate(refs), fetch_bytes_max=RUN_BYTES, gap_bytes_max=RUN_BYTES):
        yield fetch.frames
