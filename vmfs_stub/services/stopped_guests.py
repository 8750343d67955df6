"""Guests that a backup job stops, so that their VMs can be archived, and starts again when they could not be.

Invariants:
* before a guest is asked to stop there is a durable note of it (`primary/guest_notes.py`), which goes when the guest
  runs, or stays off because its VM was archived: a daemon that was killed in between leaves the note to the next one;
* nobody takes a guest's power: one that does not stop when it is asked runs on;
* a guest is started only where no hypervisor runs it.
A guest that has not stopped in time keeps its note for a while: it may obey yet, and is started then, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from vmfs_stub.core.errors import HypervisorAway, InUse, PrimaryIOError, VmfsStubError
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.guest_notes import GuestNote
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.domains import LinkDomains
from vmfs_stub.services.hypervisor import Hypervisor, domains_by_uuid
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 20.0
"""How often guests are looked at that an earlier daemon, or a job whose hypervisor went away, has left behind."""
LATE_S = 3600.0
"""How long beyond its limit a guest that powers off is taken to have obeyed, and not somebody else.

Those that obey late end their services, or install updates, which are minutes and seldom an hour.  Longer would be in
the way of the person who reads next morning that the guest did not stop, and then shuts it down for good.
"""
START_LIMIT_S = 60.0
"""How long the end of a job waits for a guest to be started; after that it is left to the next look."""


class NotStopped(InUse):
    """The guest runs on: it did not stop, or must not be asked to."""


@dataclass(slots=True)
class Stopped:
    """A guest that is off because a job asked for it; ``was_archived`` when it is to stay so."""

    domain: Domain
    was_archived: bool = False


class StoppedGuests:
    """Stops and starts the guests of one datastore; ``clock`` gives seconds since the epoch.

    Attributes: ``limit_s`` and ``placeholder_bytes_min`` may be replaced.
    """

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        threads: Threads,
        private: PrivateState,
        placeholders: PlaceholderIndex,
        managed_save: ManagedSave,
        link: LinkDomains,
        limit_s: float,
        placeholder_bytes_min: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hypervisor = hypervisor
        self._threads = threads
        self._notes = private.stopped
        self._placeholders = placeholders
        self._managed_save = managed_save
        self._link = link
        self.limit_s = limit_s
        self.placeholder_bytes_min = placeholder_bytes_min
        self._clock = clock
        self._busy: set[GuestNote] = set()
        """Notes that a running job sees to."""
        self._notes_lock = trio.Lock()

    async def running(self, vm: Vm) -> Domain | None:
        """The domain of this VM when it is not off; None when it is, or there is none.

        Raises HypervisorAway; NotStopped when several domains have disks in it.
        """
        links = await self._threads.files(self._link, [vm], await self._hypervisor.domains())
        found = links.of(vm.id)
        if len(found) > 1:
            names = ", ".join(domain.name for domain in found)
            raise NotStopped(f"VM {vm.name}: {len(found)} domains have disks in it ({names}); none of them is stopped")
        return found[0] if found and not found[0].state.is_off else None

    async def all_running(self) -> frozenset[str]:
        """The UUIDs of all domains that are not off; none while the hypervisor does not answer."""
        try:
            return frozenset(domain.uuid for domain in await self._hypervisor.domains() if not domain.state.is_off)
        except HypervisorAway as exc:
            log.warning("no guest is stopped by this job: %s", exc)
            return frozenset()

    @asynccontextmanager
    async def stopped(self, vm: Vm, domain: Domain, how: WhenRunning) -> AsyncIterator[Stopped]:
        """Within the block the guest is off; after it, it runs again unless ``was_archived``.

        Raises NotStopped (also when its memory could not be archived), HypervisorAway, PrimaryIOError.  What the end
        cannot do is left to `run`.
        """
        if how is WhenRunning.MANAGED_SAVE and (problem := self._managed_save.problem(vm, domain)):
            raise NotStopped(f"VM {vm.name}: its guest is not saved: {problem}")
        if how is WhenRunning.SHUTDOWN and domain.state is GuestState.PAUSED:
            # It would do so whenever it goes on, which may be in weeks.
            raise NotStopped(f"VM {vm.name}: its guest is paused, and cannot power off")
        note = GuestNote(vm.id, domain.uuid, int(self._clock() * 1000))
        stopped = Stopped(domain)
        is_off = False
        self._busy.add(note)
        try:
            await self._note(vm, note)
            await self._stop(vm, domain, how)
            is_off = True
            yield stopped
        finally:
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(START_LIMIT_S):
                    await self._settle_or_warn(note, vm, is_off=is_off, was_archived=stopped.was_archived)
            finally:
                self._busy.discard(note)

    async def _note(self, vm: Vm, note: GuestNote) -> None:
        try:
            async with self._notes_lock:
                await self._threads.files(self._notes.add, note)
        except OSError as exc:
            raise PrimaryIOError(
                f"VM {vm.name}: that its guest is to be stopped cannot be noted, so it is not: {exc.strerror}"
            ) from exc

    async def _stop(self, vm: Vm, domain: Domain, how: WhenRunning) -> None:
        if how is WhenRunning.MANAGED_SAVE:
            await self._hypervisor.save(domain.uuid, limit_s=self.limit_s)
        elif not await self._hypervisor.shut_down(domain.uuid, limit_s=self.limit_s):
            raise NotStopped(
                f"VM {vm.name}: its guest did not power off within {self.limit_s:g} s: it is still running, and left "
                f"alone (if it powers off within {LATE_S / 60:g} min, it is started again)"
            )

    def has_memory(self, vm: Vm, stopped: Stopped) -> bool:
        """Whether a saved guest's memory image is among the files of ``vm``, as they were found after the save."""
        return self._managed_save.has_image(vm, stopped.domain)

    async def run(self, find_vms: Callable[[], Awaitable[Sequence[Vm]]]) -> None:
        """See to notes that no job sees to, at once and then now and again."""
        while True:
            await self.settle(find_vms)
            await trio.sleep(LOOK_INTERVAL_S)

    async def settle(self, find_vms: Callable[[], Awaitable[Sequence[Vm]]]) -> None:
        """Start each guest that was left off, once it is off; what fails is logged, and tried at the next look."""
        left = [note for note in self._notes.all() if note not in self._busy]
        if not left:
            return
        try:
            vms = {vm.id: vm for vm in await find_vms()}
        except VmfsStubError as exc:
            log.warning("guests that a job has stopped wait, since VMs cannot be listed: %s", exc)
            return
        for note in left:
            await self._settle_or_warn(note, vms.get(note.vm_id), is_off=False, was_archived=False)

    async def _settle_or_warn(self, note: GuestNote, vm: Vm | None, *, is_off: bool, was_archived: bool) -> None:
        try:
            await self._settle(note, vm, is_off=is_off, was_archived=was_archived)
        except (VmfsStubError, OSError) as exc:
            log.warning(
                "domain %s was stopped by a job, and cannot be started again now (%s); it is tried every %g s",
                note.uuid,
                exc,
                LOOK_INTERVAL_S,
            )

    async def _settle(self, note: GuestNote, vm: Vm | None, *, is_off: bool, was_archived: bool) -> None:
        domain = (await domains_by_uuid(self._hypervisor)).get(note.uuid)
        if domain is not None and not domain.state.is_off:
            if not is_off:
                # It was asked, and may be on its way.
                if abs(self._clock() - note.asked_ms / 1000) < self.limit_s + LATE_S:
                    return
                log.warning(
                    "domain %s was asked to stop by a job, and runs on %g s after its limit: if it stops yet, it is "
                    "left so",
                    domain.name,
                    LATE_S,
                )
        elif domain is not None and not (was_archived or (vm is not None and self._was_archived(vm, note))):
            log.warning("domain %s: a job has stopped it, and did not archive it: it is started again", domain.name)
            await self._hypervisor.start(domain.uuid)
        async with self._notes_lock:
            await self._threads.files(self._notes.remove, note)

    def _was_archived(self, vm: Vm, note: GuestNote) -> bool:
        """Whether all that becomes placeholders of the VM has, some of it since the note was made."""
        large = [file for file in vm.files if file.size >= self.placeholder_bytes_min]
        known = [self._placeholders.get(file.ino) for file in large]
        records = [None if each is None else each.record for each in known]
        since = [record for record in records if record is not None and record.archived_ns >= note.asked_ms * 10**6]
        return bool(since) and None not in records
