"""Which VMs' newest state is in this datastore: no other host runs them then, and this one runs no older state.

Invariants:
* a VM's claim is held here, for certain, before a byte of its placeholders becomes resident or a guest changes one;
* what is held is known without the store, also after a restart: it is noted after the claim is there, and the note
  goes, durably, before the VM is given up;
* without a note the next epoch is taken, though the newest be ours: a put that was given up may still arrive, and must
  find its number taken;
* what is held and is not in the store any more is put there again, under its own number, at the next look.
The files of a VM that are no placeholders are never asked about here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from vmfs_stub.core.errors import DAMAGE, ClaimedElsewhere, PointNotFound, StoreUnavailable, VmfsStubError, WrongStore
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.placeholder_index import KnownPlaceholder
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_table import holds_same
from vmfs_stub.store.claims import (
    Claim,
    ClaimState,
    claimed_elsewhere,
    claimed_vms,
    newest_claim,
    newest_epoch,
    put_claim,
    try_claim,
)
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 30.0
"""How often a store that was away at the start is asked again whether VMs were taken over meanwhile."""

TRIES_MAX = 3
"""Of taking a VM whose number was taken meanwhile."""


@dataclass(slots=True)
class _Held:
    """A claim that is held here; ``is_used`` unless nobody has used the VM since its last backup began."""

    epoch: int
    is_used: bool = True


@dataclass(slots=True)
class _Attempt:
    """One try to take a VM, for all who wait; ``error`` is set before ``over`` when it failed."""

    over: trio.Event = field(default_factory=trio.Event)
    error: VmfsStubError | None = None


class Claims:
    """The claims of one datastore; ``host`` and ``datastore`` are what others are told of it."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        threads: Threads,
        store: Store,
        private: PrivateState,
        findings: Findings,
        host: str,
        datastore: str,
    ) -> None:
        self._nursery = nursery
        self._threads = threads
        self._store = store
        self._findings = findings
        self._datastore_id = private.datastore_id
        self._host = host
        self._datastore = datastore
        self._notes = private.claims
        self._held = {vm_id: _Held(epoch) for vm_id, epoch in private.claims.held(store.id).items()}
        self._attempts: dict[VmId, _Attempt] = {}
        self._locks: dict[VmId, trio.Lock] = {}
        """Of VMs that are being taken or given up."""

    # For guests

    def use(self, vm_id: VmId) -> bool:
        """Note that the VM is used; whether it may be: else `require` first.  One look, does not block."""
        held = self._held.get(vm_id)
        if held is None:
            return False
        held.is_used = True
        return True

    def ask(self, record: PlaceholderRecord) -> None:
        """Begin to do what `require` waits for."""
        if record.vm_id not in self._held and record.vm_id not in self._attempts:
            attempt = self._attempts[record.vm_id] = _Attempt()
            self._nursery.start_soon(self._try, record, attempt)

    async def require(self, record: PlaceholderRecord) -> None:
        """Return when the VM of this placeholder is claimed here; all who wait share one attempt, and its outcome.

        It is taken when nobody has it, or it is free and nothing is newer than this placeholder's restore point.
        Raises ClaimedElsewhere, WrongStore, StoreError, CorruptStoreObject, UnknownFormat.
        """
        while record.vm_id not in self._held:
            self.ask(record)
            attempt = self._attempts[record.vm_id]
            await attempt.over.wait()
            if attempt.error is not None:
                raise attempt.error

    async def _try(self, record: PlaceholderRecord, attempt: _Attempt) -> None:
        vm_id = record.vm_id
        attempt.error = StoreUnavailable(f"VM {vm_id}: claiming it was cancelled")
        try:
            if record.store_id != self._store.id:
                raise WrongStore(f"VM {vm_id} is in store {record.store_id}, and [store] url leads to {self._store.id}")
            async with self._lock(vm_id):
                if vm_id not in self._held:
                    await self._take(vm_id, {record.point_id})
            attempt.error = None
        except VmfsStubError as exc:
            attempt.error = exc
        except Exception:
            log.exception("VM %s: claiming it met a programming error", vm_id)
            attempt.error = StoreUnavailable("internal error: a bug in vmfs-stub, whose traceback is in the log")
        finally:
            del self._attempts[vm_id]
            attempt.over.set()

    # For jobs

    async def survey(self) -> Mapping[VmId, int]:
        """The newest epoch of every VM, in one listing; what was taken over from here is not held any more.

        Raises StoreError, CorruptStoreObject, UnknownFormat.
        """
        listed = await self._threads.background(claimed_vms, self._store.objects)
        for vm_id in [vm_id for vm_id, held in self._held.items() if listed.get(vm_id, 0) != held.epoch]:
            async with self._lock(vm_id):
                await self._see(vm_id, listed.get(vm_id, 0))
        return listed

    async def run(self) -> None:
        """Find out once after the start, in the background, which VMs were taken over meanwhile."""
        while self._held:
            try:
                await self.survey()
            except VmfsStubError as exc:
                log.info("whether VMs were taken over by other hosts is not known yet: %s", exc)
                await trio.sleep(LOOK_INTERVAL_S)
            else:
                return

    async def begin(
        self, vm_id: VmId, points: Collection[PointId | None], listed: Mapping[VmId, int] | None = None
    ) -> PointId | None:
        """A backup of the VM begins, which nobody has open: from now on it is noticed when it is used.

        ``points`` are those that its placeholders are of (None, of what is no placeholder, is left out); ``listed`` is
        what `survey` returned, for a job of many VMs.  Returns the point that the VM was free at; None when it was not.
        Raises ClaimedElsewhere when another datastore has it, or something newer; as `require`.
        """
        async with self._lock(vm_id):
            if listed is None:
                await self._look(vm_id)
            else:
                await self._see(vm_id, listed.get(vm_id, 0))
            before = None
            if vm_id not in self._held:
                before = await self._take(vm_id, set(points) - {None}, guest_waits=False)
            self._held[vm_id].is_used = False
        return None if before is None else before.point_id

    async def set_free(self, vm_id: VmId, point_id: PointId) -> str:
        """Let whoever needs the VM next go on from this restore point, which has all of it; not if it is in use again.

        That is: somebody used it since `begin` or `take`.  Returns why it stays held though nobody did, else "".
        """
        async with self._lock(vm_id):
            held = self._held.get(vm_id)
            if held is None or held.is_used:
                return ""
            # Whoever uses it from here on has to take it again, after this.
            del self._held[vm_id]
            try:
                await self._threads.files(self._notes.remove, self._store.id, vm_id)
            except OSError as exc:
                self._held[vm_id] = held
                return f"it stays claimed here: {exc.strerror}"
            try:
                claim = self._claim(vm_id, ClaimState.FREE, held.epoch + 1, point_id)
                await self._threads.background(put_claim, self._store.objects, claim)
            except VmfsStubError as exc:
                return f"it may stay claimed here until it is archived again: {exc}"
        return ""

    async def take(self, vm_id: VmId, point_id: PointId, *, force: bool = False, seen: Claim | None = None) -> bool:
        """Claim a VM of which placeholders of this restore point are about to be made here.

        One that another datastore holds, or whose newest state is another restore point there, only with ``force``, or
        when its newest claim is the one that was ``seen`` by whoever has decided that it may be taken.
        Returns whether it was not held here before: then `set_free` undoes it.  What a guest did before this does not
        count as use of the VM any more.
        Raises ClaimedElsewhere, StoreError, CorruptStoreObject, UnknownFormat.
        """
        async with self._lock(vm_id):
            await self._look(vm_id)
            if vm_id in self._held:
                self._held[vm_id].is_used = False
                return False

            def is_told(newest: Claim) -> bool:
                return force or (seen is not None and newest.epoch == seen.epoch)

            await self._take(vm_id, {point_id}, is_told=is_told, guest_waits=False)
            self._held[vm_id].is_used = False
            return True

    async def newest(self, vm_id: VmId) -> Claim | None:
        """The claim that counts, None when there is none.  Raises as `newest_claim`."""
        return await self._threads.background(newest_claim, self._store.objects, vm_id)

    # With the VM's lock

    async def _look(self, vm_id: VmId) -> None:
        if vm_id in self._held:
            await self._see(vm_id, await self._threads.background(newest_epoch, self._store.objects, vm_id))

    async def _see(self, vm_id: VmId, epoch: int) -> None:
        """The store has this epoch: a claim that is held here does not count any more when its own is lower.

        When it is higher, the claim is not listed yet, or the store has lost it, as a replica that became the store
        never had it: it is put again, so that others are told that the VM is in use here.
        """
        held = self._held.get(vm_id)
        if held is None or epoch == held.epoch:
            return
        if epoch < held.epoch:
            await self._threads.background(self._store.check_there)
            again = self._claim(vm_id, ClaimState.HELD, held.epoch)
            later = await self._threads.background(try_claim, self._store.objects, again)
            if later is None:
                log.warning("VM %s is in use here, and the store did not say so any more: it does again", vm_id)
            if later is None or (later.epoch, later.datastore_id) == (held.epoch, self._datastore_id):
                return
        log.warning("VM %s was taken over: what is absent of it here is not recalled any more", vm_id)
        del self._held[vm_id]
        try:
            await self._threads.files(self._notes.remove, self._store.id, vm_id)
        except OSError as exc:
            log.warning("the note that VM %s is claimed stays until the next start: %s", vm_id, exc.strerror)
        newest = await self._threads.background(newest_claim, self._store.objects, vm_id)
        if newest is not None:
            self._find(vm_id, claimed_elsewhere(newest))

    async def _take(
        self,
        vm_id: VmId,
        points: Set[PointId | None],
        *,
        is_told: Callable[[Claim], bool] = lambda newest: False,
        guest_waits: bool = True,
    ) -> Claim | None:
        """Take the next epoch; returns the claim before it.  Raises ClaimedElsewhere when it may not follow that.

        ``points`` are those that the placeholders here are of; ``is_told`` says that it may follow whatever they are.
        One put at a time: what is given up leaves no other one to come.
        """
        call = self._threads.store if guest_waits else self._threads.background
        newest = await call(newest_claim, self._store.objects, vm_id)
        if newest is None:  # perhaps this is not the store, but an empty place to which its url leads by mistake
            await call(self._store.check_there)
        for _ in range(TRIES_MAX):
            if newest is not None and not (is_told(newest) or await call(self._may_follow, newest, points)):
                error = claimed_elsewhere(newest)
                raise error if guest_waits else self._find(vm_id, error)
            made = self._claim(vm_id, ClaimState.HELD, 1 if newest is None else newest.epoch + 1)
            later = await call(try_claim, self._store.objects, made)
            if later is None:
                await self._note(vm_id, made.epoch)
                self._held[vm_id] = _Held(made.epoch)
                self._findings.settle(_subject(vm_id), ClaimedElsewhere)
                return newest
            # Lost, perhaps to a put of our own that was given up and came late.
            newest = later
        raise StoreUnavailable(f"the claims of VM {vm_id} change faster than one can be made")

    def _find(self, vm_id: VmId, error: ClaimedElsewhere) -> ClaimedElsewhere:
        """What is here of the VM is not its newest state: `status` says so until it is claimed here.

        What a guest is refused is found by whoever asked for it.
        """
        self._findings.add(_subject(vm_id), error, stays=False)
        return error

    async def _note(self, vm_id: VmId, epoch: int) -> None:
        try:
            await self._threads.files(self._notes.add, self._store.id, vm_id, epoch)
        except OSError as exc:
            log.warning("VM %s is claimed here, but that could not be noted (%s): a restart asks the store", vm_id, exc)

    def _claim(self, vm_id: VmId, state: ClaimState, epoch: int, point_id: PointId | None = None) -> Claim:
        return Claim(vm_id, epoch, state, self._datastore_id, self._host, self._datastore, time.time(), point_id)

    def _may_follow(self, newest: Claim, points: Set[PointId | None]) -> bool:
        """Who has the state of the newest claim's point may follow, and whose claim that is.  Blocking.

        Other points may have the same state: a backup of a former host, in which nothing has changed, sets the VM free
        at a point of its own; an archive that was cut short leaves some placeholders of its point, and some of before.
        """
        if newest.datastore_id == self._datastore_id:
            return True
        if newest.point_id is None or not points:
            return False
        others = points - {newest.point_id}
        return all(
            point_id is not None and self._is_same(newest.vm_id, newest.point_id, point_id) for point_id in others
        )

    def _is_same(self, vm_id: VmId, one: PointId, other: PointId) -> bool:
        try:
            return holds_same(self._store.open_point(vm_id, one), self._store.open_point(vm_id, other))
        except (PointNotFound, *DAMAGE):
            return False

    @asynccontextmanager
    async def _lock(self, vm_id: VmId) -> AsyncIterator[None]:
        lock = self._locks.setdefault(vm_id, trio.Lock())
        async with lock:
            yield
        if not lock.locked():
            self._locks.pop(vm_id, None)


def _subject(vm_id: VmId) -> str:
    return f"VM {vm_id}"


def kept_for(moved: Sequence[KnownPlaceholder]) -> str:
    """Why a VM is not set free while placeholders that were ``moved`` out of it need an earlier state; "" for none."""
    if not moved:
        return ""
    more = f" (and {len(moved) - 1} more)" if moved[1:] else ""
    return (
        f"it stays claimed here: {moved[0].label}{more} was moved out of it, and needs an earlier restore point; "
        "archive the VM that has it now, then this one again"
    )
