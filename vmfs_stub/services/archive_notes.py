"""Notes in the domains' metadata: that a VM is archived, since when, how large it is, how long its start may take.

Nobody tells this service what to write.  It compares what is archived with what the domains say, when either changes
and every few minutes, and writes what differs.  So it does not matter at which step a job, the daemon or libvirt was
killed, nor that a domain was renamed or defined anew.  A note of another datastore is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from vmfs_stub.core.errors import HypervisorAway, VmfsStubError
from vmfs_stub.core.ids import PlaceholderId
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.domains import LinkDomains
from vmfs_stub.services.hypervisor import WatchedHypervisor
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 300.0
_POLL_S: Final = 2.0
"""How soon it is noticed that placeholders came or went; looks at memory only."""


class ArchiveNotes:
    """Keeps the notes of one datastore's VMs; ``datastore`` is its name, ``scan`` lists its VMs.

    ``expected_s`` says how many seconds an archived VM may take until it is usable.
    """

    def __init__(
        self,
        *,
        hypervisor: WatchedHypervisor,
        scan: Callable[[], Awaitable[Scan]],
        placeholders: PlaceholderIndex,
        link: LinkDomains,
        threads: Threads,
        datastore: str,
        expected_s: Callable[[Vm], float],
    ) -> None:
        self._hypervisor = hypervisor
        self._scan = scan
        self._placeholders = placeholders
        self._link = link
        self._threads = threads
        self._datastore = datastore
        self._expected_s = expected_s
        self._complained: set[str] = set()

    async def run(self) -> None:
        """Reconcile for ever."""
        while True:
            changes, shown = self._hypervisor.changes, self._shown()
            try:
                await self.reconcile()
            except HypervisorAway:
                pass  # which `status` says; its coming back is a change
            except VmfsStubError as exc:
                log.warning("what libvirt says of archived VMs could not be compared: %s", exc)
            await trio.sleep(_POLL_S)  # several events are one look
            with trio.move_on_after(LOOK_AGAIN_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_placeholders, shown, nursery.cancel_scope)
                    await self._hypervisor.wait_changed(changes)
                    nursery.cancel_scope.cancel()

    async def reconcile(self) -> None:
        """Write, change and remove notes until they say what is so.  Raises HypervisorAway, PrimaryIOError.

        One domain's failure is logged, and keeps none of the others from being dealt with.
        """
        domains = await self._hypervisor.domains()
        if not domains:
            return
        vms = {vm.id: vm for vm in (await self._scan()).vms}
        links = await self._threads.files(self._link, list(vms.values()), domains)
        for domain in domains:
            wanted = self._wanted([vms[vm_id] for vm_id in links.vms_of(domain.uuid)])
            if self._differs(domain.note, wanted):
                await self._write(domain, wanted)

    def _wanted(self, vms: Sequence[Vm]) -> ArchiveNote | None:
        """What is to be said of a domain with files of these VMs; None when none of them is archived."""
        archived_s, size_bytes, expected_s = 0.0, 0, 0.0
        for vm in vms:
            known = [(file, self._placeholders.get(file.ino)) for file in vm.files]
            records = [(file, each.record) for file, each in known if each is not None and each.record is not None]
            if records:
                archived_s = max(archived_s, *(record.archived_ns // 10**9 for _, record in records))
                size_bytes += sum(file.size for file, _ in records)
                expected_s = max(expected_s, self._expected_s(vm))
        return ArchiveNote(archived_s, size_bytes, expected_s, self._datastore) if archived_s else None

    def _differs(self, note: ArchiveNote | None, wanted: ArchiveNote | None) -> bool:
        if note is None or wanted is None:
            return (note or wanted) is not None and (note is None or note.datastore == self._datastore)
        # While it comes back its size in placeholders shrinks disk by disk, and what is expected is but a guess.
        return note.datastore == self._datastore and note.archived_s != wanted.archived_s

    async def _write(self, domain: Domain, wanted: ArchiveNote | None) -> None:
        try:
            await self._hypervisor.set_note(domain.uuid, wanted)
        except HypervisorAway as exc:
            if self._hypervisor.is_away:
                raise
            if domain.uuid not in self._complained:
                self._complained.add(domain.uuid)
                log.warning("the metadata of domain %s could not be changed: %s", domain.name, exc)
        else:
            self._complained.discard(domain.uuid)
            log.info("domain %s: %s", domain.name, "archived" if wanted else "not archived any more")

    def _shown(self) -> frozenset[PlaceholderId]:
        return frozenset(each.record.placeholder_id for _, each in self._placeholders.items() if each.record)

    async def _wait_placeholders(self, seen: frozenset[PlaceholderId], scope: trio.CancelScope) -> None:
        while self._shown() == seen:  # noqa: ASYNC110 - many places change them, none of which should know of this
            await trio.sleep(_POLL_S)
        scope.cancel()
