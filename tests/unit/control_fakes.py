"""A daemon without a datastore: answers the control API from memory."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from vmfs_stub.control import messages
from vmfs_stub.control.jobs import JobProgress, Jobs, open_jobs
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.peer import Peer
from vmfs_stub.control.server import open_control
from vmfs_stub.core.errors import ConfigError, CorruptFrame, InUse, StoreFull, VmNotFound
from vmfs_stub.core.ids import JobId
from vmfs_stub.services.adoption_choice import Told

KNOWN_VMS = ("db", "web")
BACKING = Path("/srv/backing")


class FakeHistory:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.started: list[JobId] = []
        self.ended: list[tuple[JobId, str]] = []

    def start_job(self, job_id: JobId, **fields: Any) -> None:
        self.started.append(job_id)

    def end_job(self, job_id: JobId, *, state: str, **fields: Any) -> None:
        self.ended.append((job_id, state))

    def forget_jobs(self, *, keep: int) -> None:
        pass


class FakeTarget:
    """A ControlTarget with two VMs; `busy` refuses the shutdown, `broken` raises a bug."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.calls: list[tuple[Any, ...]] = []
        self.held = False
        self.paused = False
        self.busy = False
        self.broken = False
        self.healthy = True
        self.stopping = trio.Event()
        self.working = trio.Event()
        self.may_finish = trio.Event()
        self.may_finish.set()

    async def list_disks(self, vm: str | None) -> list[messages.DiskRow]:
        if self.broken:
            raise ValueError("a bug")
        if vm is not None and vm not in KNOWN_VMS:
            raise VmNotFound(f"no VM is called {vm!r}")
        return [
            messages.DiskRow(
                vm=name,
                disk="disk.raw",
                path=f"/srv/vms/{name}/disk.raw",
                state="placeholder" if name == "db" else "resident",
                size_bytes=1 << 30,
                resident_bytes=4096,
                restore_points=2,
                last_access=None if name == "db" else 1_790_000_000.0,
            )
            for name in KNOWN_VMS
            if vm in (None, name)
        ]

    async def vm_usage(self, vm: str, *, days: int) -> messages.VmUsage:
        self.calls.append(("usage", vm, days))
        if vm not in KNOWN_VMS:
            raise VmNotFound(f"no VM is called {vm!r}")
        start = 1_790_000_000.0
        gap = messages.UsageSpan(start=start, end=start + 7200, is_gap=True, unknown_s=7200)
        ran = messages.UsageSpan(
            start=start + 7200,
            end=start + 14400,
            off_s=1800,
            running_s=3600,
            unknown_s=1800,
            cpu_percent=2.25,
            cpu_percent_max=50.0,
            disk_bytes_per_s_max=2048.0,
            read_bytes=1 << 20,
            requests=3,
        )
        return messages.VmUsage(
            vm=vm, vm_id="a" * 32, state="off", last_open=start, last_io=None, domains=["dom"], spans=[gap, ran]
        )

    async def status(self) -> messages.Status:
        finding = messages.Finding(severity="problem", subject="store", message="gone; bring it back")
        return messages.Status(
            healthy=self.healthy,
            daemon=messages.DaemonStatus(
                pid=os.getpid(), version="0", started=1.0, held=self.held, jobs_paused=self.paused
            ),
            mount=messages.MountStatus(mountpoint="/srv/vms", backing=str(BACKING), mounted=True),
            store=messages.StoreStatus(url="file:///srv/store", store_id=None, reachable=self.healthy),
            jobs=[job for job in self._jobs.list() if job.state == "running"],
            findings=[] if self.healthy else [finding],
        )

    async def policy(self) -> list[messages.PolicyRow]:
        return [
            messages.PolicyRow(
                vm=name,
                vm_id=f"{number:032x}",
                path=name,
                state="off",
                archives=name == "web",
                rule="default" if name == "web" else None,
                reason="off for 14 days" if name == "web" else "no rule is for it",
                when_running="skip",
                frees_bytes=1 << 30,
                usable_s=9.0,
                numbers={"used_s": 0.0},
            )
            for number, name in enumerate(KNOWN_VMS)
        ]

    async def protect(self, vms: Sequence[str], *, protected: bool, peer: Peer) -> None:
        self.calls.append(("protect", tuple(vms), protected, peer))
        if unknown := sorted(set(vms).difference(KNOWN_VMS)):
            raise VmNotFound(f"no VM is called {unknown[0]!r}")

    async def hold(self, *, peer: Peer) -> None:
        self.calls.append(("hold", peer))
        self.held = True

    async def unhold(self, *, peer: Peer) -> None:
        self.calls.append(("unhold", peer))
        self.held = False

    async def reload(self, *, peer: Peer) -> list[str]:
        self.calls.append(("reload", peer))
        if self.busy:
            raise ConfigError("c.toml:2: mount.max_background: cannot change while the daemon runs")
        return ["hydration.enabled"]

    async def shutdown(self, *, force: bool, peer: Peer) -> None:
        self.calls.append(("shutdown", force, peer))
        if self.busy and not force:
            raise InUse("db/disk.raw is open in process 7")
        self.stopping.set()

    async def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer) -> JobId:
        self.calls.append(("backup", tuple(vms), archive, *(["rehearsal"] if rehearsal else []), peer))
        return self._jobs.start("backup", vms, self._work(vms), peer=peer)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        self.calls.append(("archive", tuple(vms), peer))
        return self._jobs.start("archive", vms, self._work(vms), peer=peer)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        self.calls.append(("recall", tuple(vms), peer))
        return self._jobs.start("recall", vms, self._work(vms), peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        self.calls.append(("adopt", tuple(vms), everything, told, peer))
        return self._jobs.start("adopt", vms, self._work(vms), peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> messages.JobInfo:
        return await self._jobs.wait(job_id, wait_s=wait_s)

    async def jobs(self) -> list[messages.JobInfo]:
        return self._jobs.list()

    async def cancel_job(self, job_id: JobId, *, peer: Peer) -> None:
        self.calls.append(("cancel", job_id, peer))
        self._jobs.cancel(job_id)

    async def pause_jobs(self, *, paused: bool, peer: Peer) -> None:
        self.calls.append(("pause" if paused else "unpause", peer))
        self.paused = paused

    def _work(self, vms: Sequence[str]) -> Any:
        async def work(progress: JobProgress) -> messages.JobReport:
            progress.update(done_bytes=1, total_bytes=2, doing="copying db")
            self.working.set()
            await self.may_finish.wait()
            if "damaged" in vms:
                raise CorruptFrame("a frame of 'damaged' does not decode")
            if "bug" in vms:
                raise ValueError("a bug")
            return messages.JobReport(
                vms=[
                    messages.VmOutcome(vm=vm, outcome="failed", error=messages.error_info(StoreFull("no room")))
                    if vm == "big"
                    else messages.VmOutcome(vm=vm, outcome="done", message="2 bytes")
                    for vm in vms
                ]
            )

        return work


@asynccontextmanager
async def open_fake_daemon(socket_path: Path, *, backing: Path = BACKING) -> AsyncIterator[FakeTarget]:
    """A fake daemon that answers on ``socket_path``."""
    async with open_jobs(FakeHistory(), running_max=8, kept=10) as jobs:
        target = FakeTarget(jobs)
        async with open_control(
            target, Metrics(), backing=backing, socket_path=socket_path, connections_max=8, idle_s=0.2
        ):
            yield target


async def serve(
    socket_path: Path, *, backing: Path, healthy: bool = True, busy: bool = False, broken: bool = False
) -> None:
    """Run until a shutdown or SIGTERM; prints a line when it answers."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_fake_daemon(socket_path, backing=backing) as target, trio.open_nursery() as nursery:
            target.healthy, target.busy, target.broken = healthy, busy, broken

            async def stop_on_signal() -> None:
                async for _ in signals:
                    target.stopping.set()

            nursery.start_soon(stop_on_signal)
            print("ready", flush=True)
            await target.stopping.wait()
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("--backing", type=Path, required=True)
    parser.add_argument("--unhealthy", action="store_true")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    trio.run(
        lambda: serve(
            options.socket,
            backing=options.backing,
            healthy=not options.unhealthy,
            busy=options.busy,
            broken=options.broken,
        )
    )
