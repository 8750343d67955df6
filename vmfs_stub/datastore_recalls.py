"""Jobs that bring VMs back, one after the other: placeholders recalled in full, or VMs adopted from the store."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from vmfs_stub.control.jobs import JobProgress, Jobs, failed_outcome, one_by_one
from vmfs_stub.control.messages import JobKind, JobReport, VmOutcome, error_info
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import PrimaryIOError, RecallsHeld
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.names import printable
from vmfs_stub.datastore_listing import Listing
from vmfs_stub.datastore_reports import adopted, names_of
from vmfs_stub.inventory.vm import UnreadVm, Vm, VmFile
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.adopt import Missed, Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

V = TypeVar("V", Vm, Wanted)

Step = Callable[[V, Callable[[int], None]], Awaitable[VmOutcome]]
"""What a job does with one VM; the function gets the number of bytes dealt with since it was last called."""


class Recalls:
    """Recalls and adoptions of one datastore.

    ``backing_fd`` is the backing directory, and stays the caller's; ``clean_up`` is called at the end of each job.
    """

    def __init__(
        self,
        *,
        threads: Threads,
        services: DiskServices,
        jobs: Jobs,
        listing: Listing,
        backing_fd: int,
        clean_up: Callable[[], Awaitable[None]],
    ) -> None:
        self._threads = threads
        self._services = services
        self._jobs = jobs
        self._listing = listing
        self._backing_fd = backing_fd
        self._clean_up = clean_up

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full.  Raises VmNotFound, AmbiguousName, RecallsHeld, PrimaryIOError."""
        scan = (await self._listing.scan()).named(vms)
        if self._services.recall.held:
            raise RecallsHeld("recalls are held for this datastore; `vmfs-stub unhold` allows them again")
        work = partial(self._each, "recall", scan.vms, self._bring_back, failed=scan.unread)
        return self._jobs.start("recall", names_of(scan), work, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""

        async def work(progress: JobProgress) -> JobReport:
            # Which VMs there are takes as long as the store does.
            progress.update(doing="looking for VMs in the store")
            wanted, missed = await self._services.adopter.find(vms, everything=everything)
            return await self._each("adopt", wanted, partial(self._adopt, told=told), progress, failed=missed)

        return self._jobs.start("adopt", list(vms), work, peer=peer)

    async def _each(
        self,
        kind: JobKind,
        vms: Sequence[V],
        step: Step[V],
        progress: JobProgress,
        *,
        failed: Sequence[UnreadVm | Missed],
    ) -> JobReport:
        """Run ``step`` for one VM after the other; what goes wrong with one, whatever it is, spoils no other's turn."""
        done, total = 0, sum(vm.size_bytes for vm in vms)

        def advance(count: int, doing: str) -> None:
            nonlocal done
            done += count
            progress.update(done_bytes=min(done, total), total_bytes=total, doing=doing)

        def reporting(vm: V) -> Callable[[int], None]:
            advance(0, doing := f"{kind} of {vm.name}")
            return partial(advance, doing=doing)

        outcomes = [failed_outcome(each.name, error_info(each.error)) for each in failed]
        outcomes += await one_by_one(kind, vms, lambda vm: step(vm, reporting(vm)), tolerant=False)
        await self._clean_up()
        return JobReport(vms=outcomes)

    async def _adopt(self, wanted: Wanted, progress: Callable[[int], None], *, told: Told) -> VmOutcome:
        report = await self._services.adopter.run(wanted, told=told, progress=progress)
        for warning in report.warnings:
            log.warning("VM %s: %s", wanted.name, printable(warning))
        await self._listing.adopted(wanted.vm.vm_id, wanted.name, created_s=report.created_s)
        return adopted(wanted, report)

    async def _bring_back(self, vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
        for file in vm.files:
            if self._services.disks.placeholders.get(file.ino) is not None:
                await self._bring_file_back(file, progress)
        return VmOutcome(vm=vm.name, outcome="recalled")

    async def _bring_file_back(self, file: VmFile, progress: Callable[[int], None]) -> None:
        try:
            opened = partial(self._services.files.call, "hydrate.open", open_beneath, self._backing_fd, file.path)
            path_fd = await self._threads.files(opened)
        except OSError as exc:
            raise PrimaryIOError(f"{disk_label(file.path)}: cannot be opened: {exc.strerror}") from exc
        try:
            await self._services.hydration.bring_back(path_fd, progress=progress)
        finally:
            os.close(path_fd)
