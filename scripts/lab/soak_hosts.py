"""Hosts: two daemons on two mounts share one S3 store, and every byte and every restore point is compared with memory.

In each *round* both hosts work at the same time, on VMs of their own: they write, read, back up, archive, recall,
delete and forget; one collects garbage, the other scrubs.  Between two rounds a VM may move: it is archived on one host
and adopted by the other.  The seed and the number of the round decide what is tried; what it meets may differ.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import math
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from scripts.lab.content import BLOCK, CHUNK, difference, random_content
from scripts.lab.datastore import Datastore, Settings, datastore_in, working_directory
from scripts.lab.failure import LabError
from scripts.lab.kill_jobs import Point, point_of, run_job
from scripts.lab.s3_proxy import NOTHING, s3_proxy
from scripts.lab.s3_server import Bucket, ceph_s3, new_bucket
from scripts.lab.s3_troubles import SeededTroubles
from scripts.lab.soak_steps import run_steps
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.messages import JobKind
from vmfs_stub.core.errors import VmfsStubError

LAG_S: Final = 1.0
"""How long a listing may miss a change, as both hosts are told; those of the troubled store are that late."""
SETTINGS: Final[Settings] = {
    "archive": {"resident_head_bytes": 0, "resident_tail_bytes": 0, "placeholder_bytes_min": "64 KiB"},
    "store": {"listing_lag_s": LAG_S, "retries_max": 8},
    # Reads fail while the store is troubled, and it may be that nothing is left to be recalled after that.
    "monitoring": {"recall_failure_hours": 0},
}
_SIZES: Final = (1 << 20, 3_000_000, (4 << 20) + 4097)
_VMS: Final = 3
"""That each host keeps; what is deleted is made anew under another name."""
_STEPS: Final = (1, 4)
"""Of each host in a round, at least and at most."""
_MOVE_CHANCE: Final = 0.3
_TRANSFER_MAX: Final = 200_000
_CLIENT_TIMEOUT_S: Final = 120.0
_LOG_SHOWN: Final = 3000
_OVERTAKEN: Final = "StoreConflict"
"""Garbage collection took a backup for dead, or a chunk that it was about to use: it is to be run again."""
_UNANSWERED: Final = ("StoreUnavailable", f"exit code {ExitCode.STORE.value}")
"""The same of a request that the troubled store kept for too long."""
_UNLISTED: Final = "the store has no restore points of a VM"
_PATIENCE_S: Final = 10.0
"""How long the daemon waits for one request."""
_SLOW_SHARE: Final = 0.002
"""Of the requests, which take longer than that: what made them fails then, but a guest's read is tried again."""


@dataclass(eq=False)
class Vm:
    """A VM with one disk, and what it has to hold."""

    name: str
    content: bytearray


@dataclass(eq=False)
class Host:
    """A datastore, and the VMs whose newest state is there; ``points`` are those that may be forgotten."""

    name: str
    datastore: Datastore
    client: ControlClient
    vms: list[Vm] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    made: int = 0

    def disk(self, vm: Vm) -> Path:
        """Where a VM's disk is seen."""
        return self.datastore.mountpoint / vm.name / "disk.raw"

    def create(self, chance: random.Random) -> None:
        """A new VM, under a name that no other ever had."""
        vm = Vm(f"{self.name}{self.made}", bytearray(chance.randbytes(chance.choice(_SIZES))))
        self.made += 1
        self.disk(vm).parent.mkdir()
        self.disk(vm).write_bytes(vm.content)
        self.vms.append(vm)

    def compare(self, vm: Vm, offset: int, length: int) -> None:
        """Raises LabError of a wrong byte."""
        fd = os.open(self.disk(vm), os.O_RDONLY)
        try:
            wanted = vm.content[offset : offset + length]
            if wrong := difference(os.pread(fd, len(wanted), offset), wanted, offset):
                raise LabError(f"{vm.name} on host {self.name}: {wrong}")
        finally:
            os.close(fd)

    def forget_pages(self, vm: Vm) -> None:
        """Or a reader is served by the kernel, not by the daemon."""
        fd = os.open(self.disk(vm), os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    # Steps

    def write(self, vm: Vm, chance: random.Random) -> None:
        fd = os.open(self.disk(vm), os.O_RDWR)
        try:
            for _ in range(chance.randint(1, 6)):
                length = min(chance.randint(1, _TRANSFER_MAX), len(vm.content))
                offset = chance.randrange(len(vm.content) - length + 1)
                data = random_content(chance, length)
                if os.pwrite(fd, data, offset) != length:
                    raise LabError(f"{vm.name}: a write was short")
                vm.content[offset : offset + length] = data
            if chance.random() < 0.5:
                os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, vm: Vm, chance: random.Random) -> None:
        self.forget_pages(vm)
        for _ in range(chance.randint(1, 6)):
            self.compare(vm, chance.randrange(len(vm.content)), chance.randint(1, _TRANSFER_MAX))

    def back_up(self, vm: Vm, chance: random.Random) -> None:
        self._make_point("backup", vm)

    def archive(self, vm: Vm, chance: random.Random) -> None:
        self._make_point("archive", vm)

    def _make_point(self, kind: JobKind, vm: Vm) -> None:
        digests = {"disk.raw": hashlib.sha256(vm.content).hexdigest()}
        self.points.append(point_of(vm.name, digests, run_job(self.client, kind, vm.name)))

    def recall(self, vm: Vm, chance: random.Random) -> None:
        run_job(self.client, "recall", vm.name)

    def delete(self, vm: Vm, chance: random.Random) -> None:
        """Its restore points stay."""
        shutil.rmtree(self.disk(vm).parent)
        self.vms.remove(vm)
        self.create(chance)

    def forget(self, vm: Vm, chance: random.Random) -> None:
        """One of a VM that this host has or had; refused while a placeholder depends on it."""
        if not self.points:
            return
        point = chance.choice(self.points)
        try:
            self.datastore.vmfs("forget", f"{point.vm}@{point.point_id}")
        except LabError as exc:
            if f"exit code {ExitCode.REFUSED.value}" not in str(exc):
                raise
            self.counts["refused to forget"] += 1
        else:
            self.points.remove(point)

    def collect(self, vm: Vm, chance: random.Random) -> None:
        self.datastore.vmfs("gc")

    def scrub(self, vm: Vm, chance: random.Random) -> None:
        """Raises LabError where it finds damage."""
        self.datastore.vmfs("scrub")


Step = Callable[[Host, Vm, random.Random], object]
_COMMON: Final[dict[Step, int]] = {
    Host.write: 8,
    Host.read: 6,
    Host.back_up: 4,
    Host.archive: 5,
    Host.recall: 2,
    Host.delete: 1,
    Host.forget: 3,
}


class Hosts:
    """The two hosts; ``host.name`` is also how their VMs are called."""

    def __init__(self, seed: int, first: Datastore, second: Datastore, *, troubled: bool) -> None:
        self._seed = seed
        self._may_fail = (_OVERTAKEN, *_UNANSWERED) if troubled else (_OVERTAKEN,)
        self._rounds = 0
        self._hosts = [
            Host(name, each, ControlClient(load_config(each.config).socket_path, timeout_s=_CLIENT_TIMEOUT_S))
            for name, each in (("a", first), ("b", second))
        ]
        self._steps: dict[str, dict[Step, int]] = {
            "a": {**_COMMON, Host.collect: 2},
            "b": {**_COMMON, Host.scrub: 1},
        }
        self._adopts = False

    def start(self) -> None:
        """Both are mounted, and have their VMs."""
        for host in self._hosts:
            host.datastore.mount()
            for number in range(_VMS):
                host.create(random.Random(f"{self._seed} {host.name} {number}"))
        self._adopts = _has_command(self._hosts[0].datastore, "adopt")

    def round(self) -> str:
        """What both do at the same time, and perhaps a move; raises LabError, OSError, VmfsStubError."""
        failures: list[BaseException] = []
        threads = [threading.Thread(target=self._work, args=(host, failures)) for host in self._hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        chance = random.Random(f"{self._seed} {self._rounds} move")
        if chance.random() < _MOVE_CHANCE:
            source, target = chance.sample(self._hosts, 2)
            self._move(source, target, chance.choice(source.vms), chance)
        self._rounds += 1
        return f"round {self._rounds}"

    def _work(self, host: Host, failures: list[BaseException]) -> None:
        steps = self._steps[host.name]
        for number in range(random.Random(f"{self._seed} {self._rounds} {host.name}").randint(*_STEPS)):
            chance = random.Random(f"{self._seed} {self._rounds} {host.name} {number}")
            (step,) = chance.choices(list(steps), list(steps.values()))
            vm = chance.choice(host.vms)
            try:
                self._try(host, step, vm, chance)
            except (LabError, OSError, VmfsStubError) as exc:
                failures.append(LabError(f"{step.__name__} {vm.name} on host {host.name}: {exc}"))
                return

    def _try(self, host: Host, step: Step, vm: Vm, chance: random.Random) -> bool:
        """Whether it was done, and not cut short by what may do so."""
        try:
            step(host, vm, chance)
        except LabError as exc:
            if not any(each in str(exc) for each in self._may_fail):
                raise
            host.counts[f"{step.__name__} cut short"] += 1
            return False
        host.counts[step.__name__] += 1
        return True

    def _move(self, source: Host, target: Host, vm: Vm, chance: random.Random) -> None:
        """The target adopts what the source has archived; the source's copy is void from then on.

        What is absent there is never read again, whatever the target does: an error, until the copy is deleted.
        """
        if not self._adopts or not self._try(source, Host.archive, vm, chance):
            return
        self._adopt(target, vm)
        target.compare(vm, 0, len(vm.content))
        target.write(vm, chance)
        _expect_refused(source, vm)
        shutil.rmtree(source.disk(vm).parent)
        source.vms.remove(vm)
        target.vms.append(vm)
        source.create(chance)
        target.counts["adopt"] += 1
        if len(target.vms) > 2 * _VMS:
            target.delete(target.vms[0], chance)

    def _adopt(self, target: Host, vm: Vm) -> None:
        """Once more when its first restore point was not listed yet, or the store did not answer."""
        try:
            target.datastore.vmfs("adopt", vm.name)
        except LabError as exc:
            if not any(each in str(exc) for each in (_UNLISTED, *self._may_fail)):
                raise
            target.counts["adopt again"] += 1
            time.sleep(LAG_S)
            target.datastore.vmfs("adopt", vm.name)

    def check_end(self) -> None:
        """Every byte and every restore point is what it should be, and the store is whole."""
        first = self._hosts[0].datastore
        for host in self._hosts:
            for vm in host.vms:
                host.forget_pages(vm)
                host.compare(vm, 0, len(vm.content))
        first.vmfs("scrub", "--restart")
        first.vmfs("verify")
        for number, point in enumerate(point for host in self._hosts for point in host.points):
            target = first.home / "restored" / str(number)
            target.mkdir(parents=True)
            first.vmfs("restore", f"{point.vm}@{point.point_id}", "--to", str(target))
            for name, digest in point.digests.items():
                if hashlib.sha256((target / name).read_bytes()).hexdigest() != digest:
                    raise LabError(f"{name} of {point.vm} is not what it was at restore point {point.point_id}")
            shutil.rmtree(target)
        for host in self._hosts:
            host.datastore.status()
            host.datastore.unmount()

    def summary(self) -> str:
        """What was done."""
        counts = sum((host.counts for host in self._hosts), Counter[str]())
        done = ", ".join(f"{what} {count}" for what, count in counts.most_common())
        return f"{sum(len(host.points) for host in self._hosts)} restore points compared; {done}"

    @contextmanager
    def told(self) -> Iterator[None]:
        """A failure shows what the daemons logged last."""
        try:
            yield
        except (LabError, OSError, VmfsStubError) as exc:
            logs = []
            for host in self._hosts:
                path = host.datastore.home / "run" / "daemon.log"
                said = path.read_text("utf-8", "backslashreplace") if path.exists() else ""
                logs.append(f"the log of host {host.name}:\n{said[-_LOG_SHOWN:]}")
            raise LabError("\n".join([f"{exc}", *logs])) from exc


def _has_command(datastore: Datastore, command: str) -> bool:
    try:
        datastore.vmfs(command, "--help")
    except LabError as exc:
        if f"exit code {ExitCode.USAGE.value}" not in str(exc):
            raise
        return False
    return True


def _expect_refused(host: Host, vm: Vm) -> None:
    """What is absent cannot be read: an error, which is no guess at what it may be.  Zeros are no data, and there."""
    host.forget_pages(vm)
    errors = 0
    fd = os.open(host.disk(vm), os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, len(vm.content), CHUNK):
            try:
                found = os.pread(fd, BLOCK, offset)
            except OSError as exc:
                if exc.errno != errno.EIO:
                    raise
                errors += 1
            else:
                if any(found):
                    raise LabError(f"{vm.name} was adopted elsewhere, and host {host.name} reads {offset} of it")
    finally:
        os.close(fd)
    if not errors:
        raise LabError(f"{vm.name} was adopted elsewhere, and host {host.name} reads all of it")


class HostsSoak:
    """Two daemons, one store."""

    about = "Two daemons share one S3 store while garbage is collected; every byte and point is compared with memory."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How long, and over what."""
        length = parser.add_mutually_exclusive_group()
        length.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
        length.add_argument("--rounds", type=int, help="how many rounds instead, however long they take")
        parser.add_argument(
            "--troubled", action="store_true", help="with a proxy that refuses, cuts, forgets and lists late"
        )

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Raises LabError naming seed and round."""
        with working_directory(Path("/var/tmp")) as home:
            (home / "s3").mkdir()
            with ceph_s3(home / "s3") as server:
                return play_hosts(
                    home,
                    new_bucket(server.account),
                    seed,
                    rounds=options.rounds,
                    minutes=options.minutes,
                    troubled=options.troubled,
                )


def play_hosts(
    home: Path, bucket: Bucket, seed: int, *, rounds: int | None, minutes: float = 10, troubled: bool = False
) -> str:
    """So many rounds, or for so long, then the end; what was done.  ``home`` gets a directory for each host.

    Raises LabError naming seed and round.
    """
    for name in ("a", "b"):
        (home / name).mkdir()
    with s3_proxy(bucket.account.endpoint, lag_s=LAG_S / 2) as proxy:
        reached = bucket.through(proxy.endpoint)
        with (
            datastore_in(home / "a", SETTINGS, bucket=reached) as first,
            datastore_in(home / "b", SETTINGS, bucket=reached) as second,
        ):
            hosts = Hosts(seed, first, second, troubled=troubled)
            with hosts.told():
                hosts.start()
                if troubled:
                    proxy.plan = SeededTroubles(seed, patience_s=_PATIENCE_S, slow_share=_SLOW_SHARE)
                done = run_steps(
                    "hosts",
                    hosts.round,
                    seed=seed,
                    duration_s=math.inf if rounds is not None else minutes * 60,
                    steps_max=math.inf if rounds is None else rounds,
                )
                proxy.plan = lambda method, path: NOTHING
                hosts.check_end()
            met = f"; the store's troubles: {dict(proxy.happened)}" if troubled else ""
            return f"{done} rounds, nothing was wrong; {hosts.summary()}{met}"
