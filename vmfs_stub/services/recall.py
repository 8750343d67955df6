"""Recall: bringing absent chunks back from the store, once each, however many wait for them.

Invariants:
* a chunk has one flight at a time; everyone who waits for it gets the same outcome, also when whoever asked first has
  given up; it is fetched once, unless the mover does not bring it soon: then a guest has it fetched here as well;
* what has arrived fills a placeholder only once its VM is claimed here;
* a recall runs in this service's nursery, never in the task of a reader: giving up abandons the wait, not the fetch;
* every wait has a limit: the caller's deadline, the store's time-out, the number of recalls that may wait.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    ClaimedElsewhere,
    IntegrityError,
    MoverLost,
    NoSpace,
    ObjectMissing,
    PointNotFound,
    PrimaryIOError,
    RecallOverload,
    RecallsHeld,
    RecallTimeout,
    StoreError,
    StoreUnavailable,
    UnknownFormat,
    VmfsStubError,
)
from vmfs_stub.core.recall_plan import Fetch, plan_fetches
from vmfs_stub.services.claims import Claims
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.mover import Mover
from vmfs_stub.services.origin import open_table
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.recall_failures import RecallFailures
from vmfs_stub.services.recall_waits import RecallWaits
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_table import ChunkTable
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

MOVER_PATIENCE_S = 1.0
"""How long a guest waits for what the mover brings already; then it is fetched here."""

RETRY_PAUSE_S = 0.5
"""Between two tries of a recall whose guest still waits."""

SECOND_TRY_S = 1.0
"""Within this time of a time-out, the same read is refused at once.

The kernel repeats a buffered read that failed as a read-ahead; with a second wait a guest would hang twice as long.
"""


@dataclass(slots=True, eq=False)
class Flight:
    """One chunk on its way; ``error`` is set before ``landed`` when it did not arrive.

    ``waiting`` counts those who wait for it, ``fetches`` those that may still bring it: only the mover does when it
    ``is_background``.
    """

    is_background: bool
    landed: trio.Event = field(default_factory=trio.Event)
    waiting: int = 0
    fetches: int = 1
    error: VmfsStubError | None = None

    @property
    def is_over(self) -> bool:
        return self.landed.is_set()

    def land(self, error: VmfsStubError | None = None) -> None:
        if not self.landed.is_set():
            self.error = error
            self.landed.set()

    def fail(self, error: VmfsStubError) -> None:
        """One fetch does not bring it; the last one that does not is the end."""
        self.fetches -= 1
        if not self.fetches:
            self.land(error)


@dataclass(slots=True)
class RecallCounters:
    """What this daemon has recalled since it started; ``*_bytes`` are raw bytes of whole chunks."""

    demand_bytes: int = 0
    background_bytes: int = 0
    fetches: int = 0
    failures: int = 0
    waiting: int = 0


class RecallService:
    """Fetches, verifies and fills chunks of placeholders.

    Attributes: ``deadline_s``, ``waiting_max`` and ``fetch_bytes_max`` count for what begins after they were changed.
    """

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        store: Store,
        threads: Threads,
        mover: Mover,
        deadline_s: float,
        concurrency_max: int,
        background_max: int,
        waiting_max: int,
        fetch_bytes_max: int,
        failures: RecallFailures,
        guests: GuestActivity,
        claims: Claims,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._threads = threads
        self._mover = mover
        self.deadline_s = deadline_s
        self._slots = trio.CapacityLimiter(concurrency_max)
        self._background_slots = trio.Semaphore(background_max)
        self.waiting_max = waiting_max
        self.fetch_bytes_max = fetch_bytes_max
        self._failures = failures
        self._flights: dict[tuple[Placeholder, int], Flight] = {}
        """By opening: what lands for one that is over fills nothing, and helps no later one of the same disk."""
        self._tables: dict[str, ChunkTable] = {}
        self._timed_out_s: dict[tuple[str, int], float] = {}
        """Chunks for which a guest has waited in vain, and when; those of the last moments only."""
        self._is_mover_late = False
        """A guest has waited for it in vain since it last brought something."""
        self._quiet = trio.lowlevel.ParkingLot()
        self.guests = guests
        self.claims = claims
        self.held = False
        self.counters = RecallCounters()
        self.waits = RecallWaits()

    def set_concurrency(self, concurrency_max: int) -> None:
        """How many fetches for guests are under way at once, from the next on."""
        self._slots.total_tokens = concurrency_max

    # For those who wait

    async def make_resident(self, placeholder: Placeholder, offset: int, length: int) -> None:
        """Return when ``length`` bytes at ``offset`` are on primary; a guest waits for it.

        Raises RecallTimeout at the deadline, RecallsHeld, RecallOverload, or what went wrong (ClaimedElsewhere,
        StoreError, IntegrityError, PrimaryIOError).
        """
        if self.held:
            raise RecallsHeld(
                f"{placeholder.label}: recalls are held for this datastore; `vmfs-stub unhold` allows them"
            )
        self._refuse_again(placeholder, offset, length)
        self.claims.use(placeholder.maps.record.vm_id)
        with self.waits.measured(), self._waiting(placeholder):
            away: VmfsStubError | None = None
            with trio.move_on_after(self.deadline_s):
                while chunks := placeholder.absent_chunks(offset, length):
                    try:
                        await self.recall_chunks(placeholder, chunks, demand=True)
                    except (StoreUnavailable, MoverLost) as exc:
                        # The store's own retries are short; a guest can wait longer, until its deadline.
                        away = exc
                        await trio.sleep(RETRY_PAUSE_S)
                return
            absent = placeholder.absent_chunks(offset, length)
            for chunk in absent:
                self._timed_out_s[placeholder.maps.record.placeholder_id, chunk] = trio.current_time()
            if absent:
                raise self._timeout(placeholder) from away

    async def claim(self, placeholder: Placeholder) -> None:
        """Return when the placeholder's VM is claimed here, so that a guest, which waits, may change it.

        Raises as `make_resident`.
        """
        with self._waiting(placeholder):
            away: VmfsStubError | None = None
            with trio.move_on_after(self.deadline_s):
                while not self.claims.use(placeholder.maps.record.vm_id):
                    try:
                        await self.claims.require(placeholder.maps.record)
                    except VmfsStubError as exc:
                        away = _as_ours(placeholder.label, exc)
                        self._failures.add(placeholder, (), away)
                        if not isinstance(exc, StoreUnavailable):
                            raise away from exc
                        await trio.sleep(RETRY_PAUSE_S)
                self._failures.arrived(placeholder, ())
                return
            raise self._timeout(placeholder) from away

    @contextmanager
    def _waiting(self, placeholder: Placeholder) -> Iterator[None]:
        """Within the block a guest waits.  Raises RecallOverload."""
        if self.counters.waiting >= self.waiting_max:
            raise RecallOverload(
                f"{placeholder.label}: {self.waiting_max} recalls wait already ([recall] recall_queue_max); try again"
            )
        self.counters.waiting += 1
        try:
            yield
        finally:
            self.counters.waiting -= 1
            if self.counters.waiting == 0:
                self._quiet.unpark_all()

    def _timeout(self, placeholder: Placeholder) -> RecallTimeout:
        return RecallTimeout(
            f"{placeholder.label}: the store did not return its bytes in {self.deadline_s:g} s; "
            "`vmfs-stub status` shows the store's state"
        )

    def _refuse_again(self, placeholder: Placeholder, offset: int, length: int) -> None:
        """Fail the kernel's second try of a read-ahead that has just timed out: the guest has waited already."""
        if not self._timed_out_s:
            return
        oldest_s = trio.current_time() - SECOND_TRY_S
        self._timed_out_s = {key: at_s for key, at_s in self._timed_out_s.items() if at_s >= oldest_s}
        owner = placeholder.maps.record.placeholder_id
        if any((owner, chunk) in self._timed_out_s for chunk in placeholder.absent_chunks(offset, length)):
            raise self._timeout(placeholder)

    async def recall_chunks(self, placeholder: Placeholder, chunks: Sequence[int], *, demand: bool) -> None:
        """Fetch these chunks, or join whoever fetches them already.  Raises as `make_resident`, but has no deadline."""
        placeholder.check()
        flights = self._take_off(placeholder, chunks, demand=demand)
        if demand and any(flight.is_background for flight in flights.values()):
            if not self._is_mover_late:
                with trio.move_on_after(MOVER_PATIENCE_S), self._mover.hurried():
                    await _landed(flights.values())
            self._overtake(placeholder, flights)
        await _landed(flights.values())
        for flight in flights.values():
            if flight.error is not None:
                raise flight.error

    async def wait_quiet(self) -> None:
        """Wait while a guest waits for a recall: background work goes below demand."""
        while self.counters.waiting:
            await self._quiet.park()

    def is_recalling(self, placeholder: Placeholder) -> bool:
        """Whether any chunk of it is on its way."""
        return any(owner is placeholder for owner, _ in self._flights)

    def forget(self, placeholder: Placeholder) -> None:
        """Drop what is cached for a placeholder that is closed."""
        self._tables.pop(placeholder.maps.record.placeholder_id, None)

    # The recall itself

    def _take_off(self, placeholder: Placeholder, chunks: Iterable[int], *, demand: bool) -> dict[int, Flight]:
        flights: dict[int, Flight] = {}
        new: dict[int, Flight] = {}
        for chunk in chunks:
            flight = self._flights.get((placeholder, chunk))
            if flight is None or flight.is_over:
                # One that has landed is over, also while others that took off with it are still under way.
                flight = self._flights[placeholder, chunk] = new[chunk] = Flight(not demand)
            flights[chunk] = flight
        if new:
            self._nursery.start_soon(self._fly, placeholder, new, demand)
        return flights

    def _overtake(self, placeholder: Placeholder, flights: Mapping[int, Flight]) -> None:
        """Fetch here, too, what the mover has not brought: a guest waits for no other process."""
        late = {chunk: flight for chunk, flight in flights.items() if flight.is_background and not flight.is_over}
        for flight in late.values():
            flight.is_background = False
            flight.fetches += 1
        if late:
            self._is_mover_late = True
            self._nursery.start_soon(self._fly, placeholder, late, True)

    async def _fly(self, placeholder: Placeholder, flights: dict[int, Flight], demand: bool) -> None:
        try:
            with self._failing(placeholder, flights, flights):
                self.claims.ask(placeholder.maps.record)  # beside the first fetch
                table = await self.table(placeholder)
                found = await self._locate(table, sorted(flights))
                zeros = [chunk for chunk, frame in found if frame is None]
                frames = [(chunk, frame) for chunk, frame in found if frame is not None]
                async with trio.open_nursery() as nursery:
                    if zeros:
                        nursery.start_soon(self._fill_zeros, placeholder, zeros, flights)
                    for fetch in plan_fetches(frames, fetch_bytes_max=self.fetch_bytes_max):
                        nursery.start_soon(self._fetch, placeholder, fetch, flights, demand)
        except BaseException:
            for flight in flights.values():
                flight.land(RecallTimeout(f"{placeholder.label}: the recall was cancelled"))
            raise
        finally:
            for chunk, flight in flights.items():
                if flight.is_over and self._flights.get((placeholder, chunk)) is flight:
                    del self._flights[placeholder, chunk]

    async def table(self, placeholder: Placeholder) -> ChunkTable:
        """The chunk table of the restore point that the placeholder stands for.  Raises StoreError, IntegrityError."""
        record = placeholder.maps.record
        table = self._tables.get(record.placeholder_id)
        if table is None:
            table = await self._threads.store(open_table, self._store, placeholder.origin)
            if not placeholder.ended:  # else nobody will `forget` it
                self._tables[record.placeholder_id] = table
        return table

    async def archived_chunk(self, placeholder: Placeholder, chunk: int) -> Buffer | None:
        """The archived bytes of a chunk, which nobody waits for, and which are not filled in; None for zeros.

        Raises StoreError, IntegrityError.
        """
        table = await self.table(placeholder)
        ((_, ref),) = await self._locate(table, [chunk])
        return None if ref is None else (await self._threads.background(self._store.fetch, [ref]))[0]

    async def _locate(self, table: ChunkTable, chunks: Sequence[int]) -> list[tuple[int, FrameRef | None]]:
        frames = await self._threads.store(table.locate, chunks[0], chunks[-1] + 1)
        return [(chunk, frames[chunk - chunks[0]]) for chunk in chunks]

    async def _fetch(self, placeholder: Placeholder, fetch: Fetch, flights: dict[int, Flight], demand: bool) -> None:
        with self._failing(placeholder, flights, fetch.chunks):
            is_damaged = False
            async with self._slots if demand else self._background_slots:
                if not any(flights[chunk].waiting for chunk in fetch.chunks):
                    # Its readers gave up while it waited for its turn: a store that hangs must not leave a queue.
                    for chunk in fetch.chunks:
                        flights[chunk].fail(self._timeout(placeholder))
                    return
                try:
                    async with self._fetched(fetch, demand=demand) as raws:
                        await self.claims.require(placeholder.maps.record)
                        for first, run in _consecutive(fetch.chunks, raws):
                            await placeholder.fill(first, run, paced=not demand and self.guests.is_recent)
                except (IntegrityError, ObjectMissing):
                    if len(fetch.chunks) == 1:
                        raise
                    is_damaged = True
            if is_damaged:
                # One of them is damaged: alone, the others still arrive.
                for chunk, frame in zip(fetch.chunks, fetch.frames, strict=True):
                    await self._fetch(placeholder, Fetch((chunk,), (frame,)), flights, demand)
                return
            self._arrived(placeholder, flights, fetch.chunks)
            self.counters.fetches += 1
            size = sum(frame.raw_length for frame in fetch.frames)
            if demand:
                self.counters.demand_bytes += size
            else:
                self.counters.background_bytes += size
                self._is_mover_late = False

    @asynccontextmanager
    async def _fetched(self, fetch: Fetch, *, demand: bool) -> AsyncIterator[Sequence[Buffer]]:
        if demand:
            yield await self._threads.store(self._store.fetch, fetch.frames)
        else:
            async with self._mover.fetch(fetch.frames) as raws:
                yield raws

    async def _fill_zeros(self, placeholder: Placeholder, chunks: Sequence[int], flights: dict[int, Flight]) -> None:
        with self._failing(placeholder, flights, chunks):
            await self.claims.require(placeholder.maps.record)
            nothing: list[Buffer | None] = [None] * len(chunks)
            for first, run in _consecutive(chunks, nothing):
                await placeholder.fill(first, run, paced=False)
            self._arrived(placeholder, flights, chunks)

    def _arrived(self, placeholder: Placeholder, flights: Mapping[int, Flight], chunks: Collection[int]) -> None:
        self._failures.arrived(placeholder, chunks)
        self.waits.arrived()
        for chunk in chunks:
            flights[chunk].land()

    @contextmanager
    def _failing(
        self, placeholder: Placeholder, flights: Mapping[int, Flight], chunks: Collection[int]
    ) -> Iterator[None]:
        """What goes wrong in the block is why those of ``chunks`` that have not arrived do not by this fetch."""
        try:
            yield
        except Exception as exc:
            error = _as_ours(placeholder.label, exc)
            missing = [chunk for chunk in chunks if not flights[chunk].is_over]
            if missing:
                self.counters.failures += 1
                self._failures.add(placeholder, missing, error)
            for chunk in missing:
                flights[chunk].fail(error)


async def _landed(flights: Collection[Flight]) -> None:
    for flight in flights:
        flight.waiting += 1
    try:
        for flight in flights:
            if not flight.is_over:  # most landed with the first: each wait is a turn of the event loop
                await flight.landed.wait()
    finally:
        for flight in flights:
            flight.waiting -= 1


def _as_ours(label: str, exc: Exception) -> VmfsStubError:
    """What a reader is told of a recall's failure: it names the disk."""
    if isinstance(exc, (IntegrityError, ObjectMissing, PointNotFound)):
        return type(exc)(
            f"{label}: {exc}; `vmfs-stub verify` lists what is damaged: bring it back from a copy of the store"
        )
    if isinstance(exc, (StoreError, UnknownFormat, ClaimedElsewhere)):
        return type(exc)(f"{label}: {exc}")
    if isinstance(exc, VmfsStubError):
        return exc
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{label}: recalled bytes find no room: the backing filesystem is full; make room")
    if isinstance(exc, OSError):
        return PrimaryIOError(f"{label}: writing recalled bytes failed: {exc.strerror}; check the backing filesystem")
    log.error("%s: a recall met a programming error", label, exc_info=exc)
    return PrimaryIOError(f"{label}: internal error: a bug in vmfs-stub, whose traceback is in the log")


def _consecutive(chunks: Sequence[int], raws: Sequence[Buffer | None]) -> list[tuple[int, list[Buffer | None]]]:
    """Group chunks (in any order) with their bytes into runs of consecutive indexes."""
    runs: list[tuple[int, list[Buffer | None]]] = []
    for chunk, raw in sorted(zip(chunks, raws, strict=True), key=lambda pair: pair[0]):
        if runs and runs[-1][0] + len(runs[-1][1]) == chunk:
            runs[-1][1].append(raw)
        else:
            runs.append((chunk, [raw]))
    return runs
