"""libvirt as the services see it: implements `services.hypervisor.Hypervisor`, and stays connected.

A libvirtd that hangs must not hold up anything here.  Every call runs in a thread of few, under a limit of time; one
that is not answered in it is given up, and the connection with it.  Its thread comes back when libvirt notices that
(its keepalive takes some seconds).  No second try to connect begins while one hangs.  Events keep the list of domains
current: what libvirt told of is read again, and all of it every few minutes.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.times import time_text
from vmfs_stub.core.usage import GuestState, Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.libvirt import DomainEvent, LibvirtConnection, Told
from vmfs_stub.inventory.libvirt_binding import has_binding, has_socket
from vmfs_stub.services.worker_pool import NoThread, WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")

CALLS_MAX: Final = 4
"""At once; libvirtd itself works on five of one client's."""
LONG_CALLS_MAX: Final = 4
"""Saves and starts of guests at once."""
AGENT_CALLS_MAX: Final = 4
"""Freezes at once, and thaws: libvirt waits without end for an agent that had answered before, and hangs."""
AGENT_ANSWERS_S: Final = 6.0
"""How long an agent may take to answer at all; libvirt gives up after 5 s where it has not spoken with it before."""
AGENT_LIMIT_S: Final = 10.0
"""How long an agent in a guest may take to freeze or thaw its filesystems."""
START_LIMIT_S: Final = 600.0
"""A start reads the disk's first blocks, or a memory image, which may have to come back from the store."""
BACKOFF_S: Final = (0.5, 30.0)
"""From, and at most to: how long to wait before connecting again."""
APPEARS_WITHIN_S: Final = 2.0
"""How long a libvirt that was not there when this began is not noticed: two files are looked for."""
LOOK_AGAIN_S: Final = 300.0
"""Everything is read again after this, whatever events say."""
_POLL_S: Final = 2.0
"""How often a guest that should power off is looked at, in case an event is lost."""


class _TooLate(HypervisorAway):
    """There was no answer in time; what was asked for may still be done."""


class Connection(Protocol):
    """What `LibvirtConnection` is; blocking."""

    def close(self) -> None: ...
    def forget(self, uuid: str | None) -> None: ...
    def is_alive(self) -> bool: ...
    def domains(self) -> list[Domain]: ...
    def readings(self) -> Mapping[str, Reading]: ...
    def state(self, uuid: str) -> GuestState: ...
    def ask_to_power_off(self, uuid: str) -> None: ...
    def save(self, uuid: str) -> None: ...
    def stop_saving(self, uuid: str) -> None: ...
    def start(self, uuid: str) -> None: ...
    def has_agent(self, uuid: str) -> bool: ...
    def freeze(self, uuid: str) -> None: ...
    def thaw(self, uuid: str) -> None: ...
    def set_note(self, uuid: str, note: ArchiveNote | None) -> None: ...


Connect = Callable[[Told], Connection]
"""Connects, and has events told; blocking.  Raises HypervisorAway."""


@dataclass(frozen=True, slots=True)
class LibvirtSettings:
    """``is_optional``: until libvirt's socket was there once, this host counts as one without libvirt.

    Not so where it was ``met_before``, by an earlier daemon: then it is away until it answers.
    """

    uri: str
    timeout_s: float
    is_optional: bool = False
    met_before: bool = False


@dataclass(slots=True)
class _State:
    """A domain's state as it was last seen, and since when it is in it, if that is known."""

    state: GuestState
    since_s: float | None


class LibvirtHypervisor:
    """Attributes: ``away_since_s`` and ``away_reason`` say since when and why libvirt does not answer, while so.

    ``changes`` counts what happened to domains, and libvirt's coming and going.
    """

    def __init__(
        self,
        settings: LibvirtSettings,
        *,
        connect: Connect | None = None,
        clock: Callable[[], float] = time.time,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._settings = settings
        self._dial = connect or partial(LibvirtConnection.to, settings.uri)
        self._clock = clock
        self._backoff_s = backoff_s
        self._calls = WorkerPool("libvirt", CALLS_MAX)
        self._long_calls = WorkerPool("libvirt-long", LONG_CALLS_MAX)
        self._freezes = WorkerPool("libvirt-freeze", AGENT_CALLS_MAX)
        self._thaws = WorkerPool("libvirt-thaw", AGENT_CALLS_MAX)
        self._connecting = WorkerPool("libvirt-connect", 1)
        self._connection: Connection | None = None
        self._number = 0
        self._tried = trio.Event()
        self._lost = trio.Event()
        self._changed = trio.Event()
        self._was_seen = settings.met_before
        self._states: dict[str, _State] = {}
        self._state_events: dict[str, float] = {}
        self._forgot_s = -math.inf
        self._freezing: set[str] = set()
        self._thawing: set[str] = set()
        """Guests whose agents have yet to answer, be it that nobody waits for it: no other question waits behind it."""
        self.changes = 0
        self.away_since_s: float | None = None
        self.away_reason = ""

    @property
    def uri(self) -> str:
        """Whom it asks."""
        return self._settings.uri

    @property
    def is_away(self) -> bool:
        """Whether libvirt should answer and does not; not so where it is optional and was never there."""
        return self._connection is None and not self._is_absent

    @property
    def is_used(self) -> bool:
        """Whether this is a host with libvirt, be it away or not."""
        return not self._is_absent

    @property
    def _is_absent(self) -> bool:
        """Whether this host counts as one without libvirt."""
        return self._settings.is_optional and not self._was_seen

    async def wait_changed(self, seen: int) -> None:
        """Wait until something happens to a domain, or libvirt comes or goes: until ``changes`` is not ``seen``."""
        while self.changes == seen:
            await self._changed.wait()

    # Asking

    async def domains(self) -> Sequence[Domain]:
        """All domains, by name.  Raises HypervisorAway."""
        if await self._is_without():
            return ()
        if trio.current_time() - self._forgot_s > LOOK_AGAIN_S and self._connection is not None:
            self._forgot_s = trio.current_time()
            self._connection.forget(None)
        found = await self._ask(lambda connection: connection.domains())
        self._states = {uuid: kept for uuid, kept in self._states.items() if uuid in {each.uuid for each in found}}
        return [replace(each, state_since_s=self._since(each.uuid, each.state)) for each in found]

    async def readings(self) -> Mapping[str, Reading]:
        """What each domain has used; of those that are off, the state.  Raises HypervisorAway."""
        if await self._is_without():
            return {}
        found = await self._ask(lambda connection: connection.readings())
        return {uuid: replace(each, state_since_s=self._since(uuid, each.state)) for uuid, each in found.items()}

    async def shut_down(self, uuid: str, *, limit_s: float) -> bool:
        """Press the power button, and wait; whether the guest is off within ``limit_s``.  Raises HypervisorAway."""
        with trio.move_on_after(limit_s):
            if not (await self._ask(lambda connection: connection.state(uuid))).is_off:
                await self._ask(lambda connection: connection.ask_to_power_off(uuid))
            while not (await self._ask(lambda connection: connection.state(uuid))).is_off:
                with trio.move_on_after(_POLL_S):
                    await self._changed.wait()
            return True
        return False

    async def save(self, uuid: str, *, limit_s: float) -> None:
        """Managed save; the guest goes on when it takes longer than ``limit_s``, or nobody waits for it any more.

        Raises HypervisorAway.
        """
        try:
            await self._ask(lambda connection: connection.save(uuid), pool=self._long_calls, limit_s=limit_s)
        except (trio.Cancelled, _TooLate):
            if self._connection is not None:
                with trio.CancelScope(shield=True):
                    await self._stop_saving(uuid)
            raise

    async def _stop_saving(self, uuid: str) -> None:
        try:
            await self._ask(lambda connection: connection.stop_saving(uuid))
        except HypervisorAway as exc:
            log.info("a managed save that was given up could not be stopped: %s", exc)

    async def start(self, uuid: str) -> None:
        """Start a domain; one that runs is left alone.  Raises HypervisorAway."""
        await self._ask(lambda connection: connection.start(uuid), pool=self._long_calls, limit_s=START_LIMIT_S)

    async def freeze(self, uuid: str) -> bool:
        """Have the guest's agent freeze its filesystems; false when no agent answers, and nothing is frozen.

        The same when no thread might be left for its thaw.  Raises HypervisorAway: they may be frozen, now or in a
        while.
        """
        if uuid in self._freezing:
            log.info("domain %s: its agent is not asked to freeze: it has not answered earlier", uuid)
            return False
        # Two questions: one that is given up must not go on to freeze, whenever the agent answers it.  Shielded, since
        # a caller that is cancelled has to know whether it was the first: of the second, the guest may be frozen.
        try:
            with trio.CancelScope(shield=True):
                asked = partial(_alone, self._freezing, uuid, lambda each: each.has_agent(uuid))
                has_agent = await self._ask(asked, pool=self._freezes, limit_s=AGENT_ANSWERS_S)
            if not has_agent:
                return False
        except HypervisorAway as exc:
            log.info("domain %s: its agent is not asked to freeze: %s", uuid, exc)
            return False
        if len(self._thawing) >= AGENT_CALLS_MAX - 1:
            log.info("domain %s is not asked to freeze: so many agents hang in a thaw that its own might wait", uuid)
            return False
        frozen = partial(_alone, self._freezing, uuid, lambda each: each.freeze(uuid))
        await self._ask(frozen, pool=self._freezes, limit_s=AGENT_LIMIT_S)
        return True

    async def thaw(self, uuid: str) -> None:
        """Undo `freeze`.  Raises HypervisorAway unless the guest's agent says that it is done."""
        if uuid in self._thawing:
            raise HypervisorAway("its agent has not answered an earlier thaw yet")
        thawed = partial(_alone, self._thawing, uuid, lambda each: each.thaw(uuid))
        # Not in the pool of freezes: those that hang there are what is to be undone.
        await self._ask(thawed, pool=self._thaws, limit_s=AGENT_LIMIT_S)

    async def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        """Write, or remove, what the domain's metadata says of its archive.  Raises HypervisorAway."""
        await self._ask(lambda connection: connection.set_note(uuid, note))

    async def _is_without(self) -> bool:
        await self._tried.wait()
        return self._is_absent

    async def _ask(
        self, call: Callable[[Connection], T], *, pool: WorkerPool | None = None, limit_s: float | None = None
    ) -> T:
        await self._tried.wait()
        connection, number = self._connection, self._number
        if connection is None:
            since = "" if self.away_since_s is None else f" since {time_text(self.away_since_s)}"
            raise HypervisorAway(f"libvirt ({self.uri}) does not answer{since}: {self.away_reason or 'not there yet'}")
        within_s = self._settings.timeout_s if limit_s is None else limit_s
        with trio.move_on_after(within_s):
            try:
                return await (pool or self._calls).run(partial(call, connection), abandonable=True)
            except NoThread as exc:
                raise HypervisorAway(str(exc)) from exc
            except HypervisorAway as exc:
                if not connection.is_alive():
                    self._lose(number, str(exc))
                raise
        message = f"libvirt ({self.uri}) did not answer within {within_s:g} s"
        if limit_s is None:  # else the guest is slow
            self._lose(number, message)
        raise _TooLate(message)

    # What is told

    def _happened(self, number: int, event: DomainEvent) -> None:
        """An event of the connection of that number; runs on the event loop."""
        if number != self._number or self._connection is None:
            return
        if event.uuid is None:
            self._lose(number, "the connection was closed")
            return
        self._connection.forget(event.uuid)
        if event.is_state:
            self._state_events[event.uuid] = event.at_s
        self._tell()

    def _since(self, uuid: str, state: GuestState) -> float | None:
        """Since when a domain is in its state: what an event told, or from when on it was seen to be another."""
        told_s = self._state_events.pop(uuid, None)
        known = self._states.get(uuid)
        if known is None:
            known = self._states[uuid] = _State(state, told_s)
        elif told_s is not None:
            known.state, known.since_s = state, told_s
        elif known.state is not state:
            known.state, known.since_s = state, self._clock()
        return known.since_s

    def _tell(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = trio.Event()

    # Staying connected

    def _lose(self, number: int, reason: str) -> None:
        if number == self._number and self._connection is not None:
            log.warning("libvirt (%s) is away: %s", self.uri, reason)
            self._go_away(reason)
            self._lost.set()

    def _go_away(self, reason: str) -> None:
        """What happens from now on is not seen, so since when a state lasts is not known either."""
        self._connection = None
        self._states.clear()
        self._state_events.clear()
        self.away_reason = reason
        if self.away_since_s is None:
            self.away_since_s = self._clock()
        self._tell()

    async def stay_connected(self) -> None:
        """Connect, and again whenever the connection is lost; never returns."""
        token = trio.lowlevel.current_trio_token()
        pause_s = self._backoff_s[0]
        while True:
            self._number += 1
            told = partial(_tell_loop, token, partial(self._happened, self._number))
            connection = await self._try_to_connect(told)
            if connection is None:
                await trio.sleep(min(pause_s, APPEARS_WITHIN_S) if self._is_absent else pause_s)
                pause_s = min(pause_s * 2, self._backoff_s[1])
                continue
            pause_s = self._backoff_s[0]
            await self._lost.wait()
            await self._connecting.run(connection.close, abandonable=True)
            await trio.sleep(pause_s)

    async def _try_to_connect(self, told: Told) -> Connection | None:
        if self._is_absent and not is_there(self.uri):
            self._tried.set()
            return None
        self._was_seen = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_waiting)
            try:
                connection = await self._connecting.run(partial(self._dial, told), abandonable=True)
            except (HypervisorAway, NoThread) as exc:
                reason = str(exc)
                if self._settings.is_optional and not has_socket(self.uri):
                    reason += "; it was there before: where it is not to be any more, set [libvirt] enabled = false"
                if reason != self.away_reason:
                    log.warning("libvirt is away: %s", reason)
                self._go_away(reason)
                connection = None
            nursery.cancel_scope.cancel()
        self._tried.set()
        if connection is not None:
            log.info("connected to libvirt (%s)", self.uri)
            self._lost = trio.Event()
            self._connection, self.away_since_s, self.away_reason = connection, None, ""
            self._tell()
        return connection

    async def _give_up_waiting(self) -> None:
        """Nobody else waits longer for a first answer."""
        await trio.sleep(self._settings.timeout_s)
        self._go_away(f"no answer to a connection within {self._settings.timeout_s:g} s")
        self._tried.set()

    def close(self) -> None:
        """Let the threads end; those that wait for libvirt are left to end with the process."""
        for pool in (self._calls, self._long_calls, self._freezes, self._thaws, self._connecting):
            pool.close()


@asynccontextmanager
async def open_libvirt(
    settings: LibvirtSettings,
    *,
    connect: Connect | None = None,
    clock: Callable[[], float] = time.time,
    backoff_s: tuple[float, float] = BACKOFF_S,
) -> AsyncIterator[LibvirtHypervisor]:
    """libvirt, connected to in the background; the first question waits for that, no longer than for any answer.

    ``connect`` and ``backoff_s`` are for tests.
    """
    hypervisor = LibvirtHypervisor(settings, connect=connect, clock=clock, backoff_s=backoff_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hypervisor.stay_connected)
        try:
            yield hypervisor
        finally:
            nursery.cancel_scope.cancel()
            await _closed(hypervisor)


async def _closed(hypervisor: LibvirtHypervisor) -> None:
    connection, hypervisor._connection = hypervisor._connection, None
    if connection is not None:
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await hypervisor._connecting.run(connection.close, abandonable=True)
    hypervisor.close()


def look_at_domains(settings: LibvirtSettings) -> list[Domain]:
    """All domains, for commands that run without the daemon; blocks, but no longer than the settings allow.

    Raises HypervisorAway.
    """
    answers: queue.SimpleQueue[list[Domain] | HypervisorAway] = queue.SimpleQueue()

    def look() -> None:
        try:
            connection = LibvirtConnection.to(settings.uri, lambda event: None)
            answers.put(connection.domains())
            connection.close()
        except HypervisorAway as exc:
            answers.put(exc)

    threading.Thread(target=look, name="libvirt", daemon=True).start()
    try:
        answer = answers.get(timeout=settings.timeout_s)
    except queue.Empty:
        raise HypervisorAway(f"libvirt ({settings.uri}) did not answer within {settings.timeout_s:g} s") from None
    if isinstance(answer, HypervisorAway):
        raise answer
    return answer


def is_there(uri: str) -> bool:
    """Whether ``enabled = "auto"`` would use libvirt: its binding is installed, and its socket is there."""
    return has_socket(uri) and has_binding()


def _alone(asked: set[str], uuid: str, call: Callable[[Connection], T], connection: Connection) -> T:
    """Make a call of a guest's agent, which is in ``asked`` until it has answered; in a thread."""
    asked.add(uuid)
    try:
        return call(connection)
    finally:
        asked.discard(uuid)


def _tell_loop(token: trio.lowlevel.TrioToken, happened: Callable[[DomainEvent], None], event: DomainEvent) -> None:
    """In libvirt's thread, which may outlive the event loop."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(happened, event)
