"""A guest is started while its VM is archived: at a random step of a job, by a seed.

Whatever the step, the start wins: it is not refused and not kept waiting by the job, what the guest reads and writes is
right, the guest runs afterwards, and once it is off again the next job archives the VM, whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from tests.backup_jobs import MOUNT, JobRig
from tests.datastore_harness import BLOCK, CHUNK, Rig, RigFiles, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.medium import Medium
from tests.seeded_ids import ids_from
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.services.backup_job import Placeholders
from vmfs_stub.services.backup_turn import VmResult

START_S_MAX = 20.0
"""How long a start may take in the end; nothing here waits for more than a slow machine."""
STEPS_MAX = 260
"""A job makes so many calls, or a few more."""
NAMES = ("a/one.img", "a/two.img")


class NotRight(AssertionError):
    """Something that a start must find, or leave, is not so."""


class CountingFiles(RigFiles):
    """Calls ``at_step`` when so many calls were made."""

    def __init__(self, medium: Medium, step: int, at_step: Callable[[], None]) -> None:
        super().__init__(medium)
        self.left = step
        self._at_step = at_step

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self._at_step()
        return super().call(site, function, *args, **kwargs)


@dataclass
class Race:
    """What a seed decides, and how it came out."""

    seed: int
    step: int
    runs_first: bool
    writes: bool
    result: VmResult | None = None
    started_at: str = "never"


def race_of(seed: int) -> Race:
    """What happens with this seed."""
    chosen = random.Random(seed)
    return Race(seed, chosen.randrange(1, STEPS_MAX), chosen.random() < 0.4, chosen.random() < 0.7)


async def play(seed: int) -> Race:
    """Run one race; raises NotRight."""
    race = race_of(seed)
    chosen = random.Random(f"contents {seed}")
    with ids_from(f"race {seed}"), temporary_rig(head=BLOCK) as rig:
        rig.inline = True
        contents = {name: chosen.randbytes(3 * CHUNK + 777) for name in NAMES}
        for name, content in contents.items():
            rig.make_disk(name, content)
        await _race(rig, race, contents, chosen)
    return race


def play_alone(seed: int) -> Race:
    """The same for who has no event loop."""
    return trio.run(play, seed)


async def _race(rig: Rig, race: Race, contents: dict[str, bytes], chosen: random.Random) -> None:
    arrives = trio.Event()
    state = GuestState.RUNNING if race.runs_first else GuestState.OFF
    hypervisor = FakeHypervisor(domain("a", *(MOUNT / name for name in NAMES), state=state))
    files = CountingFiles(rig.medium, -1, arrives.set)
    async with rig.running(files=files) as services:
        job = JobRig(services, hypervisor)
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        off = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_start, services, hypervisor, race, contents, arrives, off, chosen)
            files.left = race.step
            (race.result,) = await job.jobs().run(job.vms(), placeholders=Placeholders.BY_POLICY, tolerant=True)
            if not arrives.is_set():
                arrives.set()  # after the job
            await off.wait()
        await _next_job(rig, job, race, contents)


async def _start(
    services: Services,
    hypervisor: FakeHypervisor,
    race: Race,
    contents: dict[str, bytes],
    arrives: trio.Event,
    off: trio.Event,
    chosen: random.Random,
) -> None:
    """What `virsh start` does, the guest's use of its disks, and its end."""
    await arrives.wait()
    (uuid,) = hypervisor.known
    if hypervisor.known[uuid].state is GuestState.OFF:
        race.started_at = f"step {race.step}"
        hypervisor.put(uuid, state=GuestState.RUNNING)
        with trio.fail_after(START_S_MAX):
            for name in NAMES:
                await _use(services, name, contents, writes=race.writes, chosen=chosen)
        if hypervisor.known[uuid].state is not GuestState.RUNNING:
            raise NotRight("somebody stopped a guest that was started during the job")
    off.set()


async def _use(
    services: Services, name: str, contents: dict[str, bytes], *, writes: bool, chosen: random.Random
) -> None:
    disk = await services.open(name)
    try:
        content = bytearray(contents[name])
        if writes:
            at = chosen.randrange(0, len(content) - 600)
            content[at : at + 600] = chosen.randbytes(600)
            await disk.write(at, bytes(content[at : at + 600]))
            await disk.sync(data_only=False)
            contents[name] = bytes(content)
        found = b"".join([bytes(await disk.read(at, CHUNK)) for at in range(0, len(content), CHUNK)])
        if found != content:
            raise NotRight(f"{name}: the guest read wrong bytes")
        await trio.lowlevel.checkpoint()
    finally:
        await services.disks.release(disk)


async def _next_job(rig: Rig, job: JobRig, race: Race, contents: dict[str, bytes]) -> None:
    """No guest was left off; once it is off the next job archives the VM, and what comes back is right."""
    hypervisor = job.hypervisor
    (uuid,) = hypervisor.known
    is_archived = all(rig.is_placeholder(name) for name in NAMES)
    if hypervisor.known[uuid].state is GuestState.OFF and not is_archived and "shut down a" in hypervisor.asked:
        raise NotRight("a guest that the job stopped is off, and its VM is not archived")
    if not race.runs_first and "shut down a" in hypervisor.asked:
        raise NotRight("the job stopped a guest that was off when policy was asked")
    if job.services.private.stopped.all():
        raise NotRight("a note is left of a guest that the job has seen to")
    hypervisor.put(uuid, state=GuestState.OFF)
    for _ in range(200):  # what a recall began in the background has the disk for a moment
        (result,) = await job.jobs().run(job.vms(), placeholders=Placeholders.BY_POLICY, tolerant=True)
        if result.outcome == "archived":
            break
        await trio.sleep(0.01)
    else:
        raise NotRight(f"the next job: {result.outcome} {result.message}")
    for name, content in contents.items():
        await job.services.bring_back(name)
        if (rig.backing / name).read_bytes() != content:
            raise NotRight(f"{name} is not what it was")
