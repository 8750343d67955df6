"""The daemon's end: a mover (services.mover.Mover) whose work is done by a process of its own.

Invariants:
* a process that has gone, or says nothing for long, ends every conversation with MoverLost; the next request starts
  another process;
* a slot is free again only when the conversation that used it is over; slots belong to one process, and go with it;
* at the end of a backup its conversation is over, so that the process has no descriptor of a file left; a process that
  hangs in a system call when it is killed is remembered, as what it does there may take effect later.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import trio

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import MoverLost, PrimaryError, PrimaryIOError
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.mover.channel import Channel, ChannelClosed
from vmfs_stub.mover.lock import MoverLock
from vmfs_stub.mover.messages import (
    LAST,
    AllParts,
    Aside,
    BeginBackup,
    BeginCopying,
    Cancel,
    Commit,
    Committed,
    Copied,
    Copy,
    EndCopying,
    Failed,
    Fetch,
    Files,
    FromDaemon,
    FromMover,
    IndexState,
    MoverSettings,
    NewClients,
    Ping,
    Pong,
    Replicate,
    Replicated,
    Started,
)
from vmfs_stub.mover.priority import share_processor, yield_processor
from vmfs_stub.mover.process import MoverProcess, could_not_start
from vmfs_stub.mover.shared_slots import SharedSlots
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.mover import FETCHES_AT_ONCE, CopyOrder, Part, PointFile, PointOrder
from vmfs_stub.store.backup_writer import WriterCounts
from vmfs_stub.store.clients import ErrorsByPlace
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.objects_url import StoreAt

log = logging.getLogger(__name__)

START_WAIT_S = 10.0
"""How long the start of a process is waited for by those who can do without."""
PING_INTERVAL_S = 2.0
PINGS_UNANSWERED_MAX = 10
"""Then a mover is killed: below the usual recall deadline, since a guest may wait for it.  Time in which this process
did not run either does not count.  After half of them it is hurried: it may only be short of the processor."""
PARTS_AHEAD = 16
"""Parts of a file that the mover knows and has not dealt with.  Not bytes: what is stored already is no work, and of a
disk that has changed here and there several places are read at once."""
EARLIER_WAIT_S = 5.0
"""How long after our start those of other daemons are waited for that were killed and have not gone."""
FILES_AT_ONCE = 64
"""Files of a restore point in one message."""


@dataclass(slots=True, eq=False)
class Conversation:
    """What is answered to one request; ``on_over`` is called when nothing more will be."""

    number: int
    send: trio.MemorySendChannel[FromMover]
    answers: trio.MemoryReceiveChannel[FromMover]
    on_over: Callable[[], None]
    lost: MoverLost | None = None
    is_over: bool = False

    def end(self, lost: MoverLost | None = None) -> None:
        self.is_over, self.lost = True, lost
        self.send.close()
        self.on_over()


@dataclass(eq=False)
class Life:
    """One process and the conversations with it.

    ``fetches`` began so far; when ``given_back`` of them had, the memory of the slots was given back.
    """

    process: MoverProcess
    channel: Channel
    slots: SharedSlots
    chunk_size: int
    free: list[int] = field(default_factory=lambda: list(range(FETCHES_AT_ONCE)))
    conversations: dict[int, Conversation] = field(default_factory=dict)
    fetches: int = 0
    given_back: int = 0
    last_number: int = 0
    pings_unanswered: int = 0
    index_error: PrimaryError | None = None
    store_errors: ErrorsByPlace = field(default_factory=dict)
    beside_guests: bool | None = None
    """What it was last told."""
    started: trio.Event = field(default_factory=trio.Event)
    _hurries: int = 0

    def __post_init__(self) -> None:
        self.hurry(1)  # until it has started, which on a busy host it would not soon

    def begin(self, request: FromDaemon, on_over: Callable[[], None] = lambda: None) -> Conversation:
        """Start a conversation."""
        self.last_number += 1
        send, receive = trio.open_memory_channel[FromMover](math.inf)
        conversation = Conversation(self.last_number, send, receive, on_over)
        self.conversations[conversation.number] = conversation
        self.channel.post(conversation.number, request)
        return conversation

    async def answer(self, conversation: Conversation) -> FromMover:
        """What is said next.  Raises what went wrong: MoverLost, or the error that the mover met."""
        try:
            answer = await conversation.answers.receive()
        except trio.EndOfChannel:
            raise conversation.lost or RuntimeError("the data mover's answer came twice") from None
        if isinstance(answer, Failed):
            raise answer.error or RuntimeError("the data mover met a programming error; its traceback is in the log")
        return answer

    def ping(self, *, beside_guests: bool) -> None:
        """Ask whether it is alive, and say whether guests use their disks."""
        self.beside_guests = beside_guests
        self.channel.post(0, Ping(beside_guests))

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """See mover.Mover."""
        self.hurry(1)
        try:
            yield
        finally:
            self.hurry(-1)

    def hurry(self, more: int) -> None:
        """So many more, or fewer, wait for the process."""
        was, self._hurries = self._hurries, self._hurries + more
        if not was:
            share_processor(self.process.pid)
        elif not self._hurries:
            yield_processor(self.process.pid)

    async def close(self, conversation: Conversation) -> None:
        """End a conversation; returns when it is over."""
        if conversation.is_over:
            return
        self.channel.post(conversation.number, Cancel())
        with trio.CancelScope(shield=True), self.hurried():  # perhaps a guest waits to open what is copied
            async for _ in conversation.answers:
                pass


class ProcessMover:
    """Implements services.mover.Mover; made by `open_mover`.  ``on_index`` gets the chunk index's error, or None."""

    def __init__(
        self,
        nursery: trio.Nursery,
        settings: MoverSettings,
        guests: GuestActivity,
        on_index: Callable[[PrimaryError | None], None],
        lock: MoverLock,
    ) -> None:
        self._nursery = nursery
        self._settings = settings
        self._lock = lock
        self._began_s = trio.current_time()
        self._hanging: list[MoverProcess] = []
        self._guests = guests
        guests.on_return = self._make_way
        self._on_index = on_index
        self._life: Life | None = None
        self._free = trio.Semaphore(FETCHES_AT_ONCE)
        self.starts = 0
        """Processes that were started: all but the first because one had gone."""
        self._store_errors: Counter[tuple[str, str]] = Counter()

    def store_errors(self) -> ErrorsByPlace:
        """Calls of all processes so far that failed, as they told when they were last asked whether they are alive."""
        return self._store_errors

    def ask_like(self, store: StoreAt, replica: StoreAt | None) -> None:
        """Ask the store and its replica with what these say from now on: their credentials may have changed."""
        self._settings = replace(self._settings, store=store, replica=replica)
        if self._life is not None:
            self._life.channel.post(0, NewClients(store, replica))

    @property
    def pid(self) -> int | None:
        """Process id of the mover, while there is one."""
        return None if self._life is None else self._life.process.pid

    async def wait_started(self) -> None:
        """Return when the process is ready for work, and what its chunk index is like was told; or after a while."""
        if self._life is not None:
            with trio.move_on_after(START_WAIT_S):
                await self._life.started.wait()

    def life(self) -> Life:
        """The running process; starts one where there is none.  Raises MoverLost."""
        if self._life is None:
            self._lock.take()
            try:
                slots, fd = SharedSlots.create(count=FETCHES_AT_ONCE, size=self._settings.slot_bytes)
            except OSError as exc:
                raise could_not_start(exc) from exc
            try:
                process = MoverProcess(fd, self._lock)
            finally:
                os.close(fd)
            life = Life(process, Channel(process.socket), slots, self._settings.store_description.chunk_size)
            life.channel.post(0, self._settings)
            self._life = life
            self.starts += 1
            self._nursery.start_soon(self._live, life)
        return self._life

    async def _live(self, life: Life) -> None:
        """Listen to a process until it has gone, then tell everybody."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(life.channel.run_sender)
                nursery.start_soon(self._watch, life, nursery.cancel_scope)
                with suppress(ChannelClosed):
                    while True:
                        number, message, _ = await life.channel.receive()
                        self._hear(life, number, message)
                log.error("the data mover (process %d) has gone; the next job starts another one", life.process.pid)
                nursery.cancel_scope.cancel()
        finally:
            self._life = None
            life.channel.close()
            life.hurry(1)
            how = await life.process.end()
            if not life.process.has_gone():
                self._hanging.append(life.process)
            lost = MoverLost(f"the data mover (process {life.process.pid}) {how} before this was done; try again")
            for conversation in list(life.conversations.values()):
                self._over(life, conversation, lost)
            life.started.set()
            if life.index_error is not None:
                self._on_index(None)

    def _hear(self, life: Life, number: int, message: FromMover | FromDaemon) -> None:
        life.pings_unanswered = 0
        if isinstance(message, Started):
            life.started.set()
            life.hurry(-1)
        elif isinstance(message, IndexState):
            life.index_error = message.error
            self._on_index(message.error)
        elif isinstance(message, Pong):
            self._store_errors.update(Counter(message.errors) - Counter(life.store_errors))
            life.store_errors = message.errors
        elif (conversation := life.conversations.get(number)) is not None:
            conversation.send.send_nowait(message)  # type: ignore[arg-type]
            if isinstance(message, LAST):
                self._over(life, conversation)

    def _over(self, life: Life, conversation: Conversation, lost: MoverLost | None = None) -> None:
        del life.conversations[conversation.number]
        conversation.end(lost)

    async def _watch(self, life: Life, scope: trio.CancelScope) -> None:
        """Give up a process that does not answer, however much it has to do; take back memory that is not used."""
        was_slow = False
        while True:
            self._lock.take()  # also when nobody here has waited: the next daemon will
            life.ping(beside_guests=self._guests.is_recent)
            life.pings_unanswered += 1
            fetches = life.fetches
            await trio.sleep(PING_INTERVAL_S)
            if life.fetches == fetches != life.given_back:
                await self._give_back(life)
            is_slow = life.pings_unanswered > PINGS_UNANSWERED_MAX // 2
            if is_slow != was_slow:
                life.hurry(1 if is_slow else -1)
                was_slow = is_slow
            if life.pings_unanswered > PINGS_UNANSWERED_MAX:
                log.error("the data mover (process %d) does not answer; it is killed", life.process.pid)
                scope.cancel()

    def _make_way(self) -> None:
        """Guests use their disks again: do not wait for the next ping to tell of it."""
        if self._life is not None:
            self._life.ping(beside_guests=True)

    async def _give_back(self, life: Life) -> None:
        """Return the memory of the slots to the system, one at a time: each takes a while."""
        fetches, slots = life.fetches, tuple(life.free)
        for slot in slots:
            if slot in life.free:
                life.slots.give_back(slot)
            await trio.lowlevel.checkpoint()
        # Else one was still in use, or has been used since it was dealt with.
        if len(slots) == FETCHES_AT_ONCE and life.fetches == fetches:
            life.given_back = fetches

    # The mover

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """See mover.Mover."""
        with nullcontext() if self._life is None else self._life.hurried():
            yield

    async def wait_earlier_gone(self) -> None:
        """See mover.Mover."""
        while not self._lock.take():
            if trio.current_time() > self._began_s + EARLIER_WAIT_S:
                raise MoverLost("a data mover of an earlier daemon, which has gone, hangs in a system call")
            await trio.sleep(0.05)
        self._hanging = [process for process in self._hanging if not process.has_gone()]
        if self._hanging:
            raise MoverLost(f"the data mover (process {self._hanging[0].pid}) was killed, but hangs in a system call")

    def close(self) -> None:
        """After the end: wait for no process that hangs."""
        for process in self._hanging:
            process.forget()

    @asynccontextmanager
    async def backup(self) -> AsyncIterator[ProcessBackup]:
        """See mover.Mover."""
        life = self.life()
        conversation = life.begin(BeginBackup())
        try:
            await life.answer(conversation)
            yield ProcessBackup(life, conversation, self._guests)
        finally:
            await life.close(conversation)

    async def replicate(self, vm_id: VmId, points: Sequence[PointId], progress: Callable[[int], None]) -> None:
        """See mover.Mover."""
        life = self.life()
        conversation = life.begin(Replicate(vm_id, points))
        try:
            while isinstance(answer := await life.answer(conversation), Copied):
                progress(answer.size)
            assert isinstance(answer, Replicated)
        finally:
            await life.close(conversation)

    @asynccontextmanager
    async def fetch(self, frames: Sequence[FrameRef]) -> AsyncIterator[Sequence[Buffer]]:
        """See mover.Mover."""
        await self._free.acquire()
        try:
            life = self.life()
            slot = life.free.pop()
            life.fetches += 1
        except BaseException:
            self._free.release()
            raise
        in_use = [True, True]

        def give_back(user: int) -> None:
            in_use[user] = False
            if not any(in_use):
                life.free.append(slot)
                self._free.release()

        try:
            conversation = life.begin(Fetch(slot, frames), lambda: give_back(1))
            await life.answer(conversation)
            views = life.slots.read(slot, [ref.raw_length for ref in frames])
            try:
                yield views
            finally:
                for view in views:
                    view.release()
        finally:
            give_back(0)


class ProcessBackup:
    """Implements mover.Backup and mover.Copying."""

    def __init__(self, life: Life, conversation: Conversation, guests: GuestActivity) -> None:
        self._life = life
        self._conversation = conversation
        self._guests = guests

    @asynccontextmanager
    async def copying(self, *, verify: bool) -> AsyncIterator[ProcessBackup]:
        """See mover.Backup."""
        self._post(BeginCopying(verify))
        yield self
        self._post(EndCopying())
        await self._life.answer(self._conversation)

    async def copy(
        self,
        fd: int,
        order: CopyOrder,
        parts: AsyncIterable[Part],
        progress: Callable[[int], None],
        *,
        aside_fd: int | None = None,
    ) -> None:
        """See mover.Copying."""
        try:
            if aside_fd is not None:
                self._post(Aside(), fd=aside_fd)
            self._post(Copy(order), fd=fd)
        except OSError as exc:
            raise PrimaryIOError(f"{order.label}: the data mover cannot be given it: {exc.strerror}") from exc
        window = _Window()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, parts, window)
            while isinstance(answer := await self._life.answer(self._conversation), Copied):
                window.dealt_with(answer.size)
                progress(answer.size)
            nursery.cancel_scope.cancel()

    async def _tell(self, parts: AsyncIterable[Part], window: _Window) -> None:
        async for part in parts:
            await window.enter(part.chunks.length * self._life.chunk_size)
            if self._life.beside_guests and not self._guests.is_recent:  # else it would learn that by the next ping
                self._life.ping(beside_guests=False)
            self._post(part)
        self._post(AllParts())

    async def commit(self, order: PointOrder, files: Sequence[PointFile]) -> WriterCounts:
        """See mover.Backup."""
        for at in range(0, len(files), FILES_AT_ONCE):
            self._post(Files(files[at : at + FILES_AT_ONCE]))
            await trio.lowlevel.checkpoint()
        self._post(Commit(order))
        committed = await self._life.answer(self._conversation)
        assert isinstance(committed, Committed)
        return committed.counts

    def _post(self, message: FromDaemon, *, fd: int | None = None) -> None:
        self._life.channel.post(self._conversation.number, message, fd=fd)


class _Window:
    """Which parts of a file the mover knows of and has not dealt with, in file order."""

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._changed = trio.lowlevel.ParkingLot()

    async def enter(self, size: int) -> None:
        """Wait until there is room, then let a part in."""
        while len(self._sizes) >= PARTS_AHEAD:
            await self._changed.park()
        self._sizes.append(size)

    def dealt_with(self, size: int) -> None:
        """So many bytes more are; the last part of a file may have fewer than it was said to have."""
        while size and self._sizes:
            done = min(size, self._sizes[0])
            self._sizes[0] -= done
            size -= done
            if not self._sizes[0]:
                self._sizes.popleft()
        self._changed.unpark_all()


@asynccontextmanager
async def open_mover(
    settings: MoverSettings,
    guests: GuestActivity,
    on_index: Callable[[PrimaryError | None], None],
    *,
    lock: MoverLock,
) -> AsyncIterator[ProcessMover]:
    """A mover within the block; at its end the process has gone.

    The process is started at once.  If that fails, things go on without: the first job tries again.
    """
    async with trio.open_nursery() as nursery:
        mover = ProcessMover(nursery, settings, guests, on_index, lock)
        try:
            mover.life()
        except MoverLost as exc:
            log.warning("%s", exc)
        try:
            yield mover
        finally:
            nursery.cancel_scope.cancel()
    mover.close()
