"""Guests whose filesystems a backup brings to rest for a moment, and which go on whatever becomes of it.

Invariants:
* before a guest is frozen there is a durable note of it (`primary/guest_notes.py`); one that cannot be noted is not;
* the note goes when its agent has said that it is thawed, or the guest is off: until then it is thawed again and again,
  by the daemon that finds the note at its start, too;
* a guest with a note is not frozen: a thaw that is still to be done might undo that at any time.
A freeze of which nothing was heard may still come, even after the thaw: then one more thaw follows when it no longer
can.  Memory that was saved of a frozen guest comes back frozen, so its note stays.
"""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from vmfs_stub.core.errors import HypervisorAway, VmfsStubError
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.guest_notes import GuestNote, GuestNotes
from vmfs_stub.services.findings import Findings, Severity
from vmfs_stub.services.hypervisor import WatchedHypervisor, domains_by_uuid
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

FREEZE_S_MAX: Final = 20.0
THAW_S_MAX: Final = 20.0
"""How long a backup waits, longer than a hypervisor; after that it is left to `FrozenGuests.run`."""
LOOK_INTERVAL_S: Final = 5.0
LOGGED_MAX: Final = 5
"""How often it is logged that a guest may be frozen; `status` goes on to say so."""
PAUSES_S: Final = (5.0, 60.0)
"""From, and at most to: how long a guest that did not say that it is thawed is left alone before the next try."""
FREEZE_COMES_S: Final = 60.0
"""A freeze comes within this or not at all: libvirt lets a call wait half as long for others on the same domain."""


class StillFrozen(VmfsStubError):
    """A guest may be frozen, and does not say that it is thawed."""


@dataclass(slots=True)
class _Owed:
    """A thaw that is to be done, or at least a note that is to go; ``next_s`` is when, by trio's clock.

    ``may_be_frozen`` is whether the guest may ever have been asked to freeze, ``may_freeze`` whether that may still be
    on its way to it.  ``is_in_hand`` while a backup sees to it; ``is_late`` when it should have been thawed by then.
    ``tries`` were in vain, of which the operator was ``told``; ``subject`` is what the finding is about.
    """

    may_be_frozen: bool = True
    may_freeze: bool = True
    is_in_hand: bool = False
    is_late: bool = False
    tries: int = 0
    told: int = 0
    next_s: float = -math.inf
    subject: str = ""

    def waits(self) -> None:
        """Another try is in vain for now, and for longer each time."""
        self.next_s = trio.current_time() + min(PAUSES_S[0] * 2**self.tries, PAUSES_S[1])
        self.tries += 1


class FrozenGuests:
    """Freezes and thaws the guests of one datastore; ``clock`` gives seconds since the epoch."""

    def __init__(
        self,
        *,
        hypervisor: WatchedHypervisor,
        threads: Threads,
        notes: GuestNotes,
        findings: Findings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hypervisor = hypervisor
        self._threads = threads
        self._notes = notes
        self._findings = findings
        self._clock = clock
        self._owed = {note: _Owed(is_late=True) for note in notes.all()}
        self._notes_lock = trio.Lock()

    @asynccontextmanager
    async def at_rest(self, vm: Vm, domain: Domain) -> AsyncIterator[bool]:
        """Within the block the guest's filesystems are at rest, if it is told so; after it they are not.

        Raises nothing of its own: a guest that cannot be frozen runs on.  What the end cannot do is left to `run`.
        """
        if any(note.uuid == domain.uuid for note in self._owed):
            log.info("domain %s is not frozen: it has yet to be thawed after an earlier time", domain.name)
            yield False
            return
        note = GuestNote(vm.id, domain.uuid, int(self._clock() * 1000))
        owed = self._owed[note] = _Owed(may_be_frozen=False, may_freeze=False, is_in_hand=True)
        try:
            yield await self._note(note, domain) and await self._freeze(note, owed, domain)
        finally:
            try:
                with trio.move_on_after(THAW_S_MAX, shield=True) as limit:
                    await self._thaw_or_tell(note, owed, domain.name)
                if limit.cancelled_caught:
                    self._tell(owed, domain.name, f"no answer within {THAW_S_MAX:g} s")
            finally:
                owed.is_in_hand = False

    async def _note(self, note: GuestNote, domain: Domain) -> bool:
        try:
            async with self._notes_lock:
                await self._threads.files(self._notes.add, note)
        except OSError as exc:
            log.warning("domain %s is not frozen, since that cannot be noted: %s", domain.name, exc.strerror)
            return False
        return True

    async def _freeze(self, note: GuestNote, owed: _Owed, domain: Domain) -> bool:
        owed.may_be_frozen = owed.may_freeze = True
        with trio.move_on_after(FREEZE_S_MAX):
            try:
                owed.may_be_frozen = await self._hypervisor.freeze(note.uuid)
            except HypervisorAway as exc:
                log.info("domain %s: its filesystems are not brought to rest: %s", domain.name, exc)
                return False
            owed.may_freeze = False
            return owed.may_be_frozen
        return False

    # Thawing

    async def run(self) -> None:
        """See to thaws that no backup sees to, at once and then now and again; never returns."""
        while True:
            await self.settle()
            await trio.sleep(LOOK_INTERVAL_S)

    async def settle(self) -> None:
        """Thaw each guest that is to be, and was not asked a moment ago; what fails is told, and tried again."""
        left = [(note, owed) for note, owed in self._owed.items() if not owed.is_in_hand]
        if not left:
            return
        try:
            domains = await domains_by_uuid(self._hypervisor)
        except HypervisorAway as exc:
            for note, owed in left:
                self._tell(owed, note.uuid, str(exc))
            return
        for note, owed in left:
            domain = domains.get(note.uuid)
            if domain is None or domain.state is GuestState.OFF:
                await self._end(note, owed, note.uuid if domain is None else domain.name)
            elif domain.state is GuestState.SAVED:
                self._tell_saved(owed, domain.name)
            elif trio.current_time() >= owed.next_s:
                await self._thaw_or_tell(note, owed, domain.name)

    async def _thaw_or_tell(self, note: GuestNote, owed: _Owed, name: str) -> None:
        if owed.may_be_frozen:
            try:
                await self._hypervisor.thaw(note.uuid)
            except HypervisorAway as exc:
                self._tell(owed, name, str(exc))
                owed.waits()
                return
            if owed.is_late:
                log.warning("domain %s: its filesystems were thawed late", name)
        owed.is_late, owed.tries, owed.told = False, 0, 0
        self._take_back(owed)
        if owed.may_freeze and abs(self._clock() - note.asked_ms / 1000) < FREEZE_COMES_S:
            owed.waits()
        else:
            await self._forget(note, owed, name)

    async def _end(self, note: GuestNote, owed: _Owed, name: str) -> None:
        """The guest is off, and with that nothing of it is frozen, if it is not another host's now."""
        if owed.may_be_frozen:
            log.warning(
                "domain %s does not run here any more, so it is not thawed; if it was migrated: `virsh domfsthaw %s` "
                "there",
                name,
                shlex.quote(name),
            )
        self._take_back(owed)
        await self._forget(note, owed, name)

    async def _forget(self, note: GuestNote, owed: _Owed, name: str) -> None:
        """Its note goes; one that cannot does so later."""
        owed.may_be_frozen = owed.may_freeze = False
        try:
            async with self._notes_lock:
                await self._threads.files(self._notes.remove, note)
        except OSError as exc:
            log.warning("domain %s: the note that it was to be frozen cannot be removed: %s", name, exc.strerror)
            owed.waits()
        else:
            del self._owed[note]

    # Telling

    def _tell(self, owed: _Owed, name: str, reason: str) -> None:
        """What an operator should know while it is so; also in the log, but not for ever."""
        error = StillFrozen(
            f"its filesystems may be frozen since a backup, and what writes in it waits: {reason}; it is tried again "
            f"and again; by hand: `virsh domfsthaw {shlex.quote(name)}`, or reset it"
        )
        if owed.told < LOGGED_MAX:
            log.warning("domain %s: %s", name, error)
        owed.told += 1
        owed.is_late = True
        self._find(owed, name, error, "problem")

    def _tell_saved(self, owed: _Owed, name: str) -> None:
        owed.is_late, owed.tries, owed.next_s = True, 0, -math.inf
        error = StillFrozen(
            "its memory was saved while its filesystems may have been frozen: it is thawed when it runs"
        )
        self._find(owed, name, error, "warning")

    def _find(self, owed: _Owed, name: str, error: StillFrozen, severity: Severity) -> None:
        self._take_back(owed)
        owed.subject = f"domain {name}"
        self._findings.add(owed.subject, error, stays=False, severity=severity)

    def _take_back(self, owed: _Owed) -> None:
        self._findings.settle(owed.subject, StillFrozen)
