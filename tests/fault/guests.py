"""A backup job that policy lets shut a guest down, and what must hold of the guest whatever became of the job.

At every moment the guest runs, or its VM is archived, or a note says that a job has stopped it: the next daemon, with
a hypervisor that answers, makes one of the first two of the third.  After a power loss a guest is off that no job had
stopped.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from tests.backup_jobs import Policy
from tests.datastore_harness import Rig, Services
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import PATHS, ROOT_PEER, NotWhole, done, with_datastore
from vmfs_stub.control.messages import JobReport, VmOutcome
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


async def with_guest(rig: Rig) -> None:
    """Plain files, and a guest that runs on them."""
    disks = [rig.mountpoint / path for path in PATHS]
    rig.hypervisor = FakeHypervisor(domain("vm", *disks, state=GuestState.RUNNING))


def guest_of(rig: Rig) -> FakeHypervisor:
    """What runs the guest."""
    assert isinstance(rig.hypervisor, FakeHypervisor)
    return rig.hypervisor


def lose_guests(rig: Rig) -> None:
    """The host has lost power, and the hypervisor starts none by itself."""
    _set_state(guest_of(rig), GuestState.OFF)


def start_by_user(services: Services) -> None:
    """Somebody starts the guest of a VM that is archived, and so reads what comes back."""
    hypervisor = guest_of(services.rig)
    if _guest(services).state.is_off and _is_archived(services.rig):
        hypervisor.asked.append("start, by a user")
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
    policy = Policy({"vm": WhenRunning.SHUTDOWN})
    await with_datastore(services, CONFIG, _stop_and_archive, decide=policy.decide)


async def _stop_and_archive(datastore: Datastore, services: Services) -> None:
    await _settle(datastore)
    try:
        outcome = await _back_up(datastore)
    finally:
        if not services.files.dead:
            _check_seen_to(services)
    if outcome.outcome != "archived" and not services.files.spoiled:
        raise NotWhole(f"not archived: {outcome}")


def _check_seen_to(services: Services) -> None:
    if _guest(services).state.is_off and not (_is_archived(services.rig) or services.private.stopped.all()):
        raise NotWhole("the guest is off, its VM is not archived, and nothing says that a job has stopped it")


async def _settle(datastore: Datastore) -> None:
    """What the daemon does now and again."""

    async def vms() -> Sequence[Vm]:
        return (await datastore.listing.scan()).vms

    await datastore.work.guests.settle(vms)


async def _back_up(datastore: Datastore) -> VmOutcome:
    """One job; raises what it failed with, and OSError when the VM could not even be found."""
    info = await done(datastore, await datastore.start_backup([], archive=True, peer=ROOT_PEER))
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
    policy = Policy({"vm": WhenRunning.SHUTDOWN})
    await with_datastore(services, CONFIG, _check_guest, decide=policy.decide)


async def _check_guest(datastore: Datastore, services: Services) -> None:
    hypervisor, notes = guest_of(services.rig), services.private.stopped
    await _settle(datastore)
    if notes.all():
        # It had been asked a moment ago, and is on its way: now it has arrived.
        _set_state(hypervisor, GuestState.OFF)
        await _settle(datastore)
    if notes.all():
        raise NotWhole(f"a note is left: {notes.all()}")
    if _guest(services).state.is_off and not _is_archived(services.rig) and _was_stopped(hypervisor):
        raise NotWhole("a job has stopped the guest, which is off, and its VM is not archived")
    _set_state(hypervisor, GuestState.RUNNING)
    outcome = await _back_up(datastore)
    if (outcome.outcome, _is_archived(services.rig), _guest(services).state) != ("archived", True, GuestState.OFF):
        raise NotWhole(f"the next job: {outcome}, and the guest is {_guest(services).state}")


def _was_stopped(hypervisor: FakeHypervisor) -> bool:
    """Whether the last thing that was asked of the guest was to stop: nobody else stops it, but for a power loss."""
    asked = [what for what in hypervisor.asked if what.startswith(("shut down", "start"))]
    return bool(asked) and asked[-1].startswith("shut down")
