"""Backup jobs on the services of a rig, with a simulated hypervisor and a policy that says what a test wants."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tests.datastore_harness import Services
from tests.fake_hypervisor import FakeHypervisor
from vmfs_stub.core.errors import Protected
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.policy import Decision, WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.backup_job import BackupJobs, JobSettings
from vmfs_stub.services.backup_turn import TurnMeans
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.domains import link
from vmfs_stub.services.frozen_guests import FrozenGuests
from vmfs_stub.services.hooks import Hooks
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.stopped_guests import StoppedGuests

MOUNT = Path("/srv/vms")


def archived(vm: Vm, when_running: WhenRunning = WhenRunning.SKIP) -> Decision:
    return Decision(vm.id, vm.name, True, "idle for 20 days", rule="idle", when_running=when_running)


def kept(vm: Vm) -> Decision:
    return Decision(vm.id, vm.name, False, "used yesterday", rule="idle")


@dataclass
class Policy:
    """Says of the VMs in ``archives`` that they are to be archived; ``asked`` is of which it was asked, in order.

    ``errors`` are raised by the next questions; ``answers`` are taken instead, one for each question about the VM.
    """

    archives: dict[str, WhenRunning] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    answers: dict[str, list[bool]] = field(default_factory=dict)
    seen: list[Situation | None] = field(default_factory=list)
    """What it was to decide from, each time."""

    async def decide(self, vms: Sequence[Vm], situation: Situation | None = None) -> Mapping[VmId, Decision]:
        self.asked.append(tuple(vm.name for vm in vms))
        self.seen.append(situation)
        if self.errors:
            raise self.errors.pop(0)
        return {vm.id: self._decision(vm) for vm in vms}

    def _decision(self, vm: Vm) -> Decision:
        says = vm.name in self.archives and not vm.is_protected
        if self.answers.get(vm.name):
            says = self.answers[vm.name].pop(0)
        return archived(vm, self.archives.get(vm.name, WhenRunning.SKIP)) if says else kept(vm)


@dataclass
class JobRig:
    """What a test changes before, and looks at after, a job.

    ``refusals`` are raised by what the next looks have seen, one by each; ``seen`` is that, and ``looks`` says of which
    VM it was asked, and whether nobody could use it then.
    """

    services: Services
    hypervisor: FakeHypervisor = field(default_factory=FakeHypervisor)
    policy: Policy = field(default_factory=Policy)
    settings: JobSettings = field(default_factory=JobSettings)
    hooks: Hooks = field(default_factory=Hooks)
    paused: bool = False
    protected: set[VmId] = field(default_factory=set)
    refusals: list[Exception | None] = field(default_factory=list)
    looks: list[tuple[str, bool]] = field(default_factory=list)
    seen: list[Situation] = field(default_factory=list)
    made: set[VmId] = field(default_factory=set)
    save_dir: Path = Path("/var/lib/libvirt/qemu/save")
    limit_s: float = 5.0
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        services, backing = self.services, self.services.rig.backing
        paths = DatastorePaths(files=services.files, backing=backing, mountpoint=MOUNT)
        managed_save = ManagedSave.at(self.save_dir, backing=backing, mountpoint=MOUNT, files=services.files)
        self.inventory = DirectoryInventory(backing, files=services.files, memory_dir=managed_save.memory_dir)
        self.guests = StoppedGuests(
            hypervisor=self.hypervisor,
            threads=services.threads,
            private=services.private,
            placeholders=services.disks.placeholders,
            managed_save=managed_save,
            link=partial(link, paths=paths),
            limit_s=self.limit_s,
            placeholder_bytes_min=services.rig.settings.placeholder_bytes_min,
            clock=self.clock,
        )

        self.frozen = FrozenGuests(
            hypervisor=self.hypervisor,
            threads=services.threads,
            notes=services.private.thaws,
            findings=services.findings,
        )

    def jobs(self) -> BackupJobs:
        means = TurnMeans(
            archiver=self.services.archiver,
            hydration=self.services.hydration,
            guests=self.guests,
            hooks=self.hooks,
            decide=self.policy.decide,
            look=self._look,
            freezer_of=self._freezer_of,
            found_again=self._found_again,
            backed_up=lambda vm_id: None,
            made=self._made,
            forget=self._forget,
        )
        return BackupJobs(
            settings=self.settings, means=means, claims=self.services.claims, is_paused=lambda: self.paused
        )

    def vms(self) -> tuple[Vm, ...]:
        return self.inventory.scan().vms

    async def all_vms(self) -> Sequence[Vm]:
        return self.vms()

    async def _look(self) -> Situation:
        self.seen.append(cast("Situation", SimpleNamespace(refuse=self._refuse)))
        return self.seen[-1]

    def _refuse(self, vm: Vm) -> None:
        self.looks.append((vm.name, all(self.services.disks.is_reserved(file.ino) for file in vm.files)))
        if self.refusals and (refusal := self.refusals.pop(0)):
            raise refusal
        if vm.id in self.protected:
            raise Protected(f"VM {vm.name} is protected")

    async def _freezer_of(self, vm: Vm) -> Freezer | None:
        domain = await self.guests.running(vm)
        return None if domain is None else partial(self.frozen.at_rest, vm, domain)

    async def _made(self, vm_id: VmId) -> None:
        self.made.add(vm_id)

    async def _forget(self, vm: Vm) -> tuple[list[PointId], str]:
        return [], ""

    async def _found_again(self, vm: Vm) -> Vm:
        if any(each.state is GuestState.SAVED for each in self.hypervisor.known.values()):
            self.inventory.give_memory(vm, f"{vm.name}.save")
        return self.inventory.find(vm.id)
