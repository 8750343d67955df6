"""A backup job that policy lets shut a guest down, or freeze it, and what must hold of it whatever became of the job.

At every moment the guest runs, or its VM is archived, or a note says that a job has stopped it: the next daemon, with
a hypervisor that answers, makes one of the first two of the third.  After a power loss a guest is off that no job had
stopped.  While its filesystems are frozen there is a note of that, too, and the next daemon thaws them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from tests.backup_jobs import Policy
from tests.datastore_harness import CHUNK, Rig, Services
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import PATHS, ROOT_PEER, NotWhole, done, with_datastore
from vmfs_stub.control.messages import JobReport, VmOutcome
from vmfs_stub.core.errors import HypervisorAway, VmfsStubError
from vmfs_stub.core.names import PRIVATE_DIR, THAWS_DIR
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm

CONFIG = """
[archive]
enabled = true
placeholder_bytes_min = 1
resident_head_bytes = 0
resident_tail_bytes = 0
[jobs]
shutdown_limit_s = 3600
"""


SAVED = "saved"
"""The directory at the top for memory alone."""
MEMORY = b"what the guest was at" * CHUNK


class SavingHypervisor(FakeHypervisor):
    """Saves memory in ``save_place``, from where a guest that is started gets it, as a user of the ``services``.

    That is the VM's directory, or one at the top.  ``how`` is how jobs are to stop guests.
    """

    services: Services
    how = WhenRunning.SHUTDOWN
    save_place = "vm"

    @property
    def image(self) -> str:
        """The memory image, from the backing directory."""
        return f"{self.save_place}/vm.save"

    async def freeze(self, uuid: str) -> bool:
        """Raises NotWhole when nothing says that it will have to be thawed."""
        if not _thaws_noted(self.services.rig):
            raise NotWhole("the guest is frozen, and that is not noted")
        return await super().freeze(uuid)

    async def save(self, uuid: str, *, limit_s: float) -> None:
        """The image is there before the guest is gone."""
        await self._asked(f"save {self.known[uuid].name}")
        await self.end(uuid)

    async def end(self, uuid: str) -> None:
        """What a save does, sooner or later; memory that was left by a start that went wrong makes room."""
        if self.how is WhenRunning.SHUTDOWN:
            self.put(uuid, state=GuestState.OFF)
            return
        if (self.services.rig.backing / self.image).exists():
            await self._take_memory()
        self.services.rig.make_disk(self.image, MEMORY)
        self.put(uuid, state=GuestState.SAVED)

    async def start(self, uuid: str) -> None:
        """Raises NotWhole when the memory is not what was saved."""
        await self._asked(f"start {self.known[uuid].name}")
        await self.begin(uuid)

    async def begin(self, uuid: str) -> None:
        """What a start does, whoever wants it."""
        if self.known[uuid].state is GuestState.SAVED:
            if not (self.services.rig.backing / self.image).exists():
                raise NotWhole("the guest's memory is gone")
            await self._take_memory()
        self.put(uuid, state=GuestState.RUNNING)

    async def _take_memory(self) -> None:
        try:
            await take_memory(self.services)
        except (VmfsStubError, OSError) as exc:
            raise HypervisorAway(f"the guest's memory cannot be read: {exc!r}") from exc


async def take_memory(services: Services) -> None:
    """Read the image, and remove it as the mount does."""
    image = guest_of(services.rig).image
    path = services.rig.backing / image
    disk = await services.open(image)
    try:
        if bytes(await disk.read(0, len(MEMORY) + 1)) != MEMORY:
            raise NotWhole("the guest's memory is another")
    finally:
        await services.disks.release(disk)
    with services.rig.path_fd(image) as fd:
        await services.disks.removing(fd)
        try:
            await services.threads.files(services.files.call, "mount.unlink", os.unlink, path)
        finally:
            await services.disks.removed(fd)


async def with_guest_to_save(rig: Rig) -> None:
    """The same, of which the policy is to save the guest's memory."""
    await with_guest(rig)
    guest_of(rig).how = WhenRunning.MANAGED_SAVE


async def with_guest_to_save_at_top(rig: Rig) -> None:
    """The same; its memory goes into a directory at the top, where nothing else is."""
    await with_guest_to_save(rig)
    guest_of(rig).save_place = rig.memory_dir = SAVED
    (rig.backing / SAVED).mkdir()


async def with_guest(rig: Rig) -> None:
    """Plain files, and a guest that runs on them."""
    disks = [rig.mountpoint / path for path in PATHS]
    rig.hypervisor = SavingHypervisor(domain("vm", *disks, state=GuestState.RUNNING))


async def with_agent(rig: Rig) -> None:
    """The same, of which an agent can freeze the filesystems."""
    await with_guest(rig)
    guest_of(rig).agents.update(guest_of(rig).known)


def guest_of(rig: Rig) -> SavingHypervisor:
    """What runs the guest."""
    assert isinstance(rig.hypervisor, SavingHypervisor)
    return rig.hypervisor


def lose_guests(rig: Rig) -> None:
    """The host has lost power, and the hypervisor starts none by itself."""
    _set_state(guest_of(rig), GuestState.SAVED if (rig.backing / guest_of(rig).image).exists() else GuestState.OFF)


def is_left_archived(services: Services) -> bool:
    """Whether nothing runs on the VM until a user wants it."""
    return _guest(services).state.is_off and _is_archived(services.rig)


async def start_by_user(services: Services) -> None:
    """Somebody starts the guest, who may be told that its memory cannot be read, and has it go on without."""
    hypervisor = guest_of(services.rig)
    hypervisor.services = services
    hypervisor.asked.append("start, by a user")
    for uuid in hypervisor.known:
        with suppress(HypervisorAway):
            await hypervisor.begin(uuid)
    _set_state(hypervisor, GuestState.RUNNING)


def _set_state(hypervisor: FakeHypervisor, state: GuestState) -> None:
    for uuid in hypervisor.known:
        hypervisor.put(uuid, state=state)


def _guest(services: Services) -> Domain:
    (guest,) = guest_of(services.rig).known.values()
    return guest


def _is_archived(rig: Rig) -> bool:
    return all(rig.is_placeholder(path) for path in PATHS)


async def stop_and_archive(services: Services) -> None:
    """What an earlier job has left is seen to, and then the VM is idle."""
    await _with_policy(services, _stop_and_archive)


async def back_up_at_rest(services: Services) -> None:
    """What an earlier job has left is seen to, and then the VM is backed up while it is used."""
    await _with_policy(services, _back_up_at_rest)


async def _back_up_at_rest(datastore: Datastore, services: Services) -> None:
    await _settle(datastore)
    disk = await services.open(PATHS[0])
    try:
        outcome = await _back_up(datastore, archive=False)
    finally:
        _check_noted(services.rig)
        if not services.files.dead:
            await services.disks.release(disk)
    if "(quiesced)" not in outcome.message and not services.files.spoiled:
        raise NotWhole(f"not at rest: {outcome}")


def _check_noted(rig: Rig) -> None:
    if guest_of(rig).frozen and not _thaws_noted(rig):
        raise NotWhole("the guest is frozen, and nothing says so")


def _thaws_noted(rig: Rig) -> bool:
    return any((rig.backing / PRIVATE_DIR / THAWS_DIR).iterdir())


async def _with_policy(services: Services, act: Callable[[Datastore, Services], Awaitable[None]]) -> None:
    hypervisor = guest_of(services.rig)
    hypervisor.services = services
    decide = Policy({"vm": hypervisor.how}).decide
    await with_datastore(services, CONFIG, act, decide=decide, save_place=hypervisor.save_place)


async def _stop_and_archive(datastore: Datastore, services: Services) -> None:
    await _settle(datastore)
    try:
        outcome = await _back_up(datastore)
    finally:
        if not services.files.dead:
            _check_seen_to(services)
    if outcome.outcome == "archived":
        _check_memory(services)
    elif not services.files.spoiled:
        raise NotWhole(f"not archived: {outcome}")


def _check_memory(services: Services) -> None:
    """Of a VM that was archived."""
    if _guest(services).state is GuestState.SAVED and not services.rig.is_placeholder(guest_of(services.rig).image):
        raise NotWhole("the guest's memory is not archived")


def _check_seen_to(services: Services) -> None:
    if _guest(services).state.is_off and not (_is_archived(services.rig) or services.private.stopped.all()):
        raise NotWhole("the guest is off, its VM is not archived, and nothing says that a job has stopped it")


async def _settle(datastore: Datastore) -> None:
    """What the daemon does now and again."""

    async def vms() -> Sequence[Vm]:
        return (await datastore.listing.scan()).vms

    await datastore.backups.guests.settle(vms)
    await datastore.backups.frozen.settle()


async def _back_up(datastore: Datastore, *, archive: bool = True) -> VmOutcome:
    """One job; raises what it failed with, and OSError when the VM could not even be found."""
    info = await done(datastore, await datastore.start_backup([], archive=archive, peer=ROOT_PEER))
    vms = JobReport.model_validate(info.result).vms
    if not vms:
        raise OSError(errno.EIO, "no VM is found")
    (outcome,) = vms
    if "log has the traceback" in outcome.message:
        raise NotWhole(f"a programming error: {outcome.message}")
    return outcome


async def check_guest(services: Services) -> None:
    """In the next life, in which nothing goes wrong, the guest runs, or its VM is archived; and so does the next job.

    Raises NotWhole.
    """
    guest_of(services.rig).away = False
    await _with_policy(services, _check_guest)


async def _check_guest(datastore: Datastore, services: Services) -> None:
    hypervisor, notes = guest_of(services.rig), services.private.stopped
    await _settle(datastore)
    if hypervisor.frozen:
        raise NotWhole("the guest's filesystems are frozen")
    if _thaws_noted(services.rig):
        raise NotWhole("a note of a thaw is left")
    if notes.all():
        # It had been asked a moment ago, and is on its way: now it has arrived.
        for uuid in hypervisor.known:
            await hypervisor.end(uuid)
        await _settle(datastore)
    if notes.all():
        raise NotWhole(f"a note is left: {notes.all()}")
    if _guest(services).state.is_off and not _is_archived(services.rig) and _was_stopped(hypervisor):
        raise NotWhole("a job has stopped the guest, which is off, and its VM is not archived")
    if not _guest(services).state.is_off and (services.rig.backing / hypervisor.image).exists():
        await take_memory(services)  # which an earlier start has left
    await start_by_user(services)
    outcome = await _back_up(datastore)
    if outcome.outcome != "archived" or not is_left_archived(services):
        raise NotWhole(f"the next job: {outcome}, and the guest is {_guest(services).state}")
    _check_memory(services)
    await start_by_user(services)
    if (services.rig.backing / hypervisor.image).exists():
        raise NotWhole("the guest's memory is still there")


def _was_stopped(hypervisor: FakeHypervisor) -> bool:
    """Whether the last thing that was asked of the guest was to stop: nobody else stops it, but for a power loss."""
    asked = [what for what in hypervisor.asked if what.startswith(("shut down", "save", "start"))]
    return bool(asked) and not asked[-1].startswith("start")
