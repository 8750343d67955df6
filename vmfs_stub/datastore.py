"""The datastore as the control API sees it: lists disks, runs jobs, tells its state.

Purpose: turns requests into calls of services and their results into messages.  It decides nothing about bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import TypeVar

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import JobProgress, Jobs, failed_outcome, failure_info, one_by_one
from vmfs_stub.control.messages import (
    DaemonStatus,
    DiskRow,
    DiskState,
    Finding,
    JobInfo,
    JobKind,
    JobReport,
    MountStatus,
    RecallStatus,
    ReplicaStatus,
    Status,
    StoreStatus,
    VmOutcome,
    error_info,
)
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import InUse, PrimaryIOError, RecallsHeld, VmfsStubError
from vmfs_stub.core.ids import JobId, PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.times import time_text
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Scan, UnreadVm, Vm, VmFile
from vmfs_stub.mount.serving import Mount
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services import memory
from vmfs_stub.services.adopt import Missed, Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.disk import Caller, Disk
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.retention import apply_rules, problem_of
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

V = TypeVar("V", Vm, Wanted)

Step = Callable[[V, Callable[[int], None]], Awaitable[VmOutcome]]
"""What a job does with one VM; the function gets the number of bytes dealt with since it was last called."""

PROBE_INTERVAL_S = 15.0
"""How often the store is asked whether it is there."""
ACCESS_INTERVAL_S = 10.0
"""How often accesses go into the catalog."""
POINT_COUNT_WAIT_S = 2.0
"""How long `ls` waits for the store to count restore points; after that it shows what it knew before."""


class Datastore:
    """Implements what control.target describes; wired together by the daemon."""

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        inventory: DirectoryInventory,
        catalog: Catalog,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        findings: Findings,
        jobs: Jobs,
        mount: Mount,
        reserve: Callable[[], None],
        stop: trio.Event,
    ) -> None:
        self._config = config
        self._threads = threads
        self._inventory = inventory
        self._catalog = catalog
        self._store = store
        self._claims = services.claims
        self._replica = replica
        self._disks = services.disks
        self._recall = services.recall
        self._hydration = services.hydration
        self._archiver = services.archiver
        self._adopter = services.adopter
        self._jobs = jobs
        self._mount = mount
        self._fill_reserve = reserve
        self._stop = stop
        self._started_s = time.time()
        self._findings = findings
        self._point_counts: dict[VmId, int] = {}
        self._store_error: str | None = None
        self._unread: tuple[UnreadVm, ...] = ()
        self._accessed: dict[int, tuple[Caller, float]] = {}
        self._disks.on_open = self._opened
        self._recall.held = config.hold_path.exists()
        self._files = services.files
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._backing_fd = self._files.call("list.backing", os.open, config.datastore.backing, flags)

    def close(self) -> None:
        """Give back the descriptor of the backing directory."""
        os.close(self._backing_fd)

    # Listing

    async def list_disks(self, vm: str | None) -> list[DiskRow]:
        """One row per disk, of all VMs or of the one named; raises VmNotFound, AmbiguousName."""
        scan = await self._scan()
        vms = scan.vms if vm is None else [scan.find(vm)]
        await self._count_points()
        accesses: dict[tuple[VmId, str], float] = {}
        with _only_warned("the last accesses could not be read"):
            accesses = await self._threads.files(self._catalog.last_accesses)
        return await self._threads.files(self._rows, vms, accesses)

    async def _scan(self) -> Scan:
        scan = await self._threads.files(self._inventory.scan)
        for unread in scan.unread:
            if unread.path not in {known.path for known in self._unread}:
                log.warning("%s", unread.error)
        self._unread = scan.unread
        with _only_warned("the VMs could not be recorded"):
            seen = [(vm.id, vm.name) for vm in scan.vms]
            await self._threads.files(self._catalog.see_vms, seen, now=time.time())
        return scan

    async def _count_points(self) -> None:
        with trio.move_on_after(POINT_COUNT_WAIT_S):
            try:
                self._point_counts = await self._threads.store(self._store.point_counts)
            except VmfsStubError as exc:
                log.warning("restore points could not be counted: %s", exc)

    def _rows(self, vms: Sequence[Vm], accesses: dict[tuple[VmId, str], float]) -> list[DiskRow]:
        rows = []
        for vm in vms:
            for file in vm.files:
                try:
                    st = self._stat(file)
                except OSError as exc:
                    if not isinstance(exc, FileNotFoundError):
                        log.warning("%s cannot be listed: %s", disk_label(file.path), exc.strerror)
                    continue
                pending = self._accessed.get(st.st_ino)
                last = max(accesses.get((vm.id, printable(file.relative)), 0.0), pending[1] if pending else 0.0)
                rows.append(
                    DiskRow(
                        vm=vm.name,
                        disk=file.relative,
                        path=str(self._config.datastore.mountpoint / file.path),
                        state=self._state(st.st_ino),
                        size_bytes=st.st_size,
                        resident_bytes=min(st.st_size, st.st_blocks * 512),
                        restore_points=self._point_counts.get(vm.id, 0),
                        last_access=last or None,
                    )
                )
        return rows

    def _stat(self, file: VmFile) -> os.stat_result:
        path_fd = self._files.call("list.open", open_beneath, self._backing_fd, file.path)
        try:
            return os.fstat(path_fd)
        finally:
            os.close(path_fd)

    def _state(self, ino: int) -> DiskState:
        if self._disks.placeholders.get(ino) is None:
            return "resident"
        disk = self._disks.get(ino)
        placeholder = None if disk is None else disk.placeholder
        busy = self._hydration.is_hydrating(ino) or (placeholder is not None and self._recall.is_recalling(placeholder))
        return "recalling" if busy else "placeholder"

    # State

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        vfs = os.fstatvfs(self._backing_fd)
        datastore = self._config.datastore
        findings = [
            Finding(
                severity="problem" if finding.is_problem else "warning",
                subject=finding.subject,
                message=str(finding.error),
            )
            for finding in self._findings.all()
        ]
        findings += [
            Finding(severity="warning", subject=f"VM {unread.name}", message=str(unread.error))
            for unread in self._unread
        ]
        if (elsewhere := self._stored_elsewhere()) is not None:
            findings.append(Finding(severity="problem", subject="store", message=elsewhere))
        if self._replica is not None:
            findings += [
                Finding(severity="problem" if must_act else "warning", subject="replica", message=message)
                for must_act, message in self._replica.problems()
            ]
        mounted = not self._mount.ended.is_set()
        healthy = mounted and self._store_error is None and all(f.severity != "problem" for f in findings)
        counters = self._recall.counters
        return Status(
            healthy=healthy,
            daemon=DaemonStatus(
                pid=os.getpid(),
                version=version("vmfs-stub"),
                started=self._started_s,
                held=self._recall.held,
                recalled_bytes=counters.demand_bytes + counters.background_bytes,
                recalled_on_demand_bytes=counters.demand_bytes,
                waiting_reads=counters.waiting,
            ),
            mount=MountStatus(
                mountpoint=str(datastore.mountpoint),
                backing=str(datastore.backing),
                mounted=mounted,
                open_disks=len(self._disks.open_disks()),
                free_bytes=vfs.f_bavail * vfs.f_frsize,
                size_bytes=vfs.f_blocks * vfs.f_frsize,
            ),
            store=StoreStatus(
                url=self._config.store.url,
                store_id=self._store.id,
                reachable=self._store_error is None,
                last_error=self._store_error,
            ),
            replica=self._replica_status(),
            jobs=[job for job in self._jobs.list() if job.state == "running"],
            recalls=self._recalls(),
            findings=findings,
        )

    def _replica_status(self) -> ReplicaStatus | None:
        if self._replica is None:
            return None
        away = self._replica.away
        return ReplicaStatus(
            url=self._config.replica.url,
            reachable=away is None,
            last_error=None if away is None else str(away),
            behind=sum(self._replica.lag.values()),
            reads=self._replica.reads,
        )

    def _stored_elsewhere(self) -> str | None:
        """What is wrong when [store] url leads to another store than the one that placeholders depend on."""
        found = self._disks.placeholders.stored_elsewhere(self._store.id)
        if not found:
            return None
        stores = ", ".join(sorted({each.record.store_id for each in found if each.record is not None}))
        return (
            f"{len(found)} placeholders have their bytes in store {stores} and cannot be recalled from "
            f"{self._store.id}, where [store] url leads ({found[0].label} for one); correct the url, or write them out "
            "with `vmfs-stub restore`; then start the daemon again"
        )

    def _recalls(self) -> list[RecallStatus]:
        rows = []
        for ino, _known in self._disks.placeholders.items():
            disk = self._disks.get(ino)
            if disk is None or disk.placeholder is None or self._state(ino) != "recalling":
                continue
            total, absent = disk.placeholder.maps.record.size, disk.placeholder.absent_bytes()
            rows.append(
                RecallStatus(
                    vm=disk.name.vm,
                    disk=disk.name.path,
                    done_bytes=max(0, total - absent),
                    total_bytes=total,
                )
            )
        return rows

    async def watch_store(self) -> None:
        """Ask the store now and then whether it is there, for `status`."""
        if (elsewhere := self._stored_elsewhere()) is not None:
            log.error("%s", elsewhere)
        while True:
            try:
                await self._threads.store(self._store.check)
                self._store_error = None
            except VmfsStubError as exc:
                self._store_error = str(exc)
            await trio.sleep(PROBE_INTERVAL_S)

    async def replicate(self) -> None:
        """Bring restore points of this datastore's VMs into the replica, those that were left behind, too."""
        if self._replica is not None:
            with _only_warned("VMs could not be listed: what the replica lacks is found with their next backups"):
                self._replica.due(vm.id for vm in (await self._scan()).vms)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._replica.watch)
                nursery.start_soon(self._replica.run)

    def _opened(self, disk: Disk, caller: Caller) -> None:
        self._accessed[disk.ino] = (caller, time.time())

    async def record_accesses(self) -> None:
        """Write to the catalog, now and then, who opened which disk."""
        while True:
            await trio.sleep(ACCESS_INTERVAL_S)
            accessed, self._accessed = self._accessed, {}
            if accessed:
                with _only_warned("accesses could not be recorded"):
                    await self._threads.files(self._record, (await self._scan()).vms, accessed)

    def _record(self, vms: Sequence[Vm], accessed: dict[int, tuple[Caller, float]]) -> None:
        for vm in vms:
            for file in vm.files:
                if file.ino in accessed:
                    caller, at = accessed[file.ino]
                    executable, uid = caller.executable, caller.uid
                    self._catalog.record_access(vm.id, file.relative, executable=executable, uid=uid, now=at)

    async def hold(self, *, peer: Peer) -> None:
        """Refuse new recalls until `unhold`, also after a restart."""
        await self._threads.files(self._config.hold_path.touch)
        self._recall.held = True

    async def unhold(self, *, peer: Peer) -> None:
        """Allow recalls again."""
        await self._threads.files(partial(self._config.hold_path.unlink, missing_ok=True))
        self._recall.held = False

    async def shutdown(self, *, force: bool, peer: Peer) -> None:
        """Flush, unmount and stop; raises InUse, and changes nothing, while disks are open and not ``force``."""
        if disks := self._disks.open_disks():
            names = ", ".join(disk.label for disk in disks[:5])
            if not force:
                raise InUse(f"{len(disks)} disks are open ({names}); shut the VMs down, or use --force")
        await self._mount.unmount(force=force)
        self._stop.set()

    # Jobs

    async def start_backup(self, vms: Sequence[str], *, archive: bool, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all)."""
        # Whether a VM is idle is decided from usage samples, and none are kept yet: none count as idle.
        if vms:
            named = await self._named(vms)
            return self._start("backup", named, self._backing_up(named, archive=False), peer=peer)
        scan = await self._scan()
        step = self._backing_up(scan.vms, archive=False)
        return self._start("backup", scan.vms, step, peer=peer, tolerant=True, unread=scan.unread)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; raises InUse."""
        found = await self._named(vms)
        for vm in found:
            for file in vm.files:
                disk = self._disks.get(file.ino)
                if disk is not None and disk.open_count:
                    raise InUse(f"VM {vm.name} is in use: {disk.label} is open; shut it down first")
        return self._start("archive", found, self._backing_up(found, archive=True), peer=peer)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full; raises RecallsHeld."""
        found = await self._named(vms)
        if self._recall.held:
            raise RecallsHeld("recalls are held for this datastore; `vmfs-stub unhold` allows them again")
        return self._start("recall", found, self._bring_back, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""

        async def work(progress: JobProgress) -> JobReport:
            # Which VMs there are takes as long as the store does.
            progress.update(doing="looking for VMs in the store")
            wanted, missed = await self._adopter.find(vms, everything=everything)
            return await self._each("adopt", wanted, partial(self._adopt, told=told), progress, failed=missed)

        return self._jobs.start("adopt", list(vms), work, peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        return await self._jobs.wait(job_id, wait_s=wait_s)

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, newest first."""
        return self._jobs.list()

    async def _named(self, names: Sequence[str]) -> list[Vm]:
        scan = await self._scan()
        return [scan.find(name) for name in dict.fromkeys(names)]

    def _start(
        self,
        kind: JobKind,
        vms: Sequence[Vm],
        step: Step[Vm],
        *,
        peer: Peer,
        tolerant: bool = False,
        unread: Sequence[UnreadVm] = (),
    ) -> JobId:
        work = partial(self._each, kind, vms, step, tolerant=tolerant, failed=unread)
        return self._jobs.start(kind, [vm.name for vm in vms], work, peer=peer)

    async def _each(
        self,
        kind: JobKind,
        vms: Sequence[V],
        step: Step[V],
        progress: JobProgress,
        *,
        failed: Sequence[UnreadVm | Missed],
        tolerant: bool = False,
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
        outcomes += await one_by_one(kind, vms, lambda vm: step(vm, reporting(vm)), tolerant=tolerant)
        await self._threads.files(self._fill_reserve)
        await self._threads.files(memory.give_back)
        return JobReport(vms=outcomes)

    def _backing_up(self, vms: Sequence[Vm], *, archive: bool) -> Step[Vm]:
        """The step of a job that backs up these VMs; the claims of many are listed once, not for each."""
        claimed: Mapping[VmId, int] | None = None

        async def step(vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
            nonlocal claimed
            if claimed is None and len(vms) > 1:
                claimed = await self._claims.survey()
            return await self._back_up(vm, progress, archive=archive, claimed=claimed)

        return step

    async def _back_up(
        self, vm: Vm, progress: Callable[[int], None], *, archive: bool, claimed: Mapping[VmId, int] | None
    ) -> VmOutcome:
        for file in vm.files:
            await self._hydration.stop(file.ino)
        try:
            report = await self._archiver.run(vm, archive=archive, progress=progress, claimed=claimed)
        finally:
            if self._replica is not None:
                self._replica.due([vm.id])
        outcome = "archived" if report.placeholders else "backed up"
        abandoned, placeholders = printable(report.abandoned), [printable(path) for path in report.placeholders]
        left_out = [printable(path) for path in report.left_out]
        message = abandoned
        if left_out and not message:
            message = f"without {len(left_out)} FIFOs, sockets or devices, which no backup holds: {left_out[0]}"
        forgotten, retention = await self._forget(vm)
        shown = {
            "placeholders": placeholders,
            "abandoned": abandoned,
            "left_out": left_out,
            "forgotten": forgotten,
            "message": "; ".join(filter(None, (message, report.warning, retention))),
            "outcome": outcome,
        }
        return VmOutcome.model_validate({**asdict(report), **shown})

    async def _forget(self, vm: Vm) -> tuple[list[PointId], str]:
        """Apply [retention] to a VM that was backed up: what was forgotten, and what to say of it.

        Whatever goes wrong with that is no failure of the backup.
        """
        rules = self._config.retention.rules
        if rules.keeps_all:
            return [], ""
        try:
            verdicts = await apply_rules(
                self._threads, self._store, vm.id, rules, host=socket.gethostname(), now_s=time.time()
            )
        except Exception as exc:
            return [], _not_forgotten(vm, exc)
        forgotten = [verdict.point.point_id for verdict in verdicts if not verdict.is_kept]
        problem = problem_of(verdicts)
        if problem is not None:
            return forgotten, _not_forgotten(vm, problem)
        return forgotten, f"older restore points forgotten: {len(forgotten)}" if forgotten else ""

    async def _adopt(self, wanted: Wanted, progress: Callable[[int], None], *, told: Told) -> VmOutcome:
        report = await self._adopter.run(wanted, told=told, progress=progress)
        for warning in report.warnings:
            log.warning("VM %s: %s", wanted.name, printable(warning))
        message = f"as it was at {time_text(report.created_s)}, restore point {report.point_id}"
        if report.warnings:
            more = len(report.warnings) - 1
            message += f"; {report.warnings[0]}{f' (and {more} more in the log)' if more else ''}"
        fields = {
            "vm": wanted.name,
            "outcome": "adopted",
            "message": message,
            "vm_id": wanted.vm.vm_id,
            "point_id": report.point_id,
            "placeholders": [printable(path) for path in report.placeholders],
        }
        return VmOutcome.model_validate(fields)

    async def _bring_back(self, vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
        for file in vm.files:
            if self._disks.placeholders.get(file.ino) is not None:
                await self._bring_file_back(file, progress)
        return VmOutcome(vm=vm.name, outcome="recalled")

    async def _bring_file_back(self, file: VmFile, progress: Callable[[int], None]) -> None:
        try:
            opened = partial(self._files.call, "hydrate.open", open_beneath, self._backing_fd, file.path)
            path_fd = await self._threads.files(opened)
        except OSError as exc:
            raise PrimaryIOError(f"{disk_label(file.path)}: cannot be opened: {exc.strerror}") from exc
        try:
            await self._hydration.bring_back(path_fd, progress=progress)
        finally:
            os.close(path_fd)


def _not_forgotten(vm: Vm, error: Exception) -> str:
    failure = failure_info(f"forgetting restore points of VM {vm.name}", error)
    return f"not all restore points that are due could be forgotten: {failure.message}"


@contextmanager
def _only_warned(what: str) -> Iterator[None]:
    """History is worth a warning, never a failed command."""
    try:
        yield
    except VmfsStubError as exc:
        log.warning("%s: %s", what, exc)
