"""The daemon, or the host, ends at every step of a job that stops a guest: it runs again, or its VM is archived.

A guest that a daemon left stopped is started by the next one; one whose VM became a placeholder stays off.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest

from tests.backup_jobs import MOUNT, JobRig
from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, survives_kill, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.site_faults import said_of
from tests.fault.spoilings import Spoiling, numbers
from tests.seeded_ids import ids_from
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore_backups import Backups
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.guest_notes import GuestNote
from vmfs_stub.services import stopped_guests
from vmfs_stub.services.backup_job import Placeholders
from vmfs_stub.services.stopped_guests import StoppedGuests
from vmfs_stub.services.stored_files import OtherEntries

NAMES = ("a/one.img", "a/two.img")
CONTENTS = {name: random.Random(name).randbytes(2 * CHUNK + 99) for name in NAMES}
LIMIT_S = 3600.0


class MortalHypervisor(FakeHypervisor):
    """Hears nothing of a daemon that is dead; the ``number``-th thing that it is asked for kills it, after it is done
    when ``late``.
    """

    files: RigFiles
    number = 0
    late = False

    async def _asked(self, what: str) -> None:
        self.files.check_alive()
        if self._counts(late=False):
            self._kill()
        await super()._asked(what)

    def _counts(self, *, late: bool) -> bool:
        return self.number > 0 and self.late is late and len(self.asked) + 1 - late == self.number

    def _kill(self) -> None:
        self.number = 0
        self.files.kill()
        raise Killed

    def put(self, uuid: str, **changes: object) -> None:
        super().put(uuid, **changes)
        if self._counts(late=True):
            self._kill()


@dataclass(frozen=True)
class Kill:
    """Where the daemon is killed: at a call, or when the hypervisor is asked; ``power``: with the host."""

    spoiling: Spoiling | None = None
    asked: int = 0
    late: bool = False
    power: bool = False


async def play(kill: Kill) -> RigFiles:
    """A job that is killed, and what the next daemons make of it; returns what the first one called."""
    with ids_from("stopped guests"), temporary_rig(head=BLOCK) as rig:
        rig.inline = True
        for name, content in CONTENTS.items():
            rig.make_disk(name, content)
        hypervisor = MortalHypervisor(domain("a", *(MOUNT / name for name in NAMES), state=GuestState.RUNNING))
        hypervisor.number, hypervisor.late = kill.asked, kill.late
        files = hypervisor.files = RigFiles(rig.medium)
        if kill.spoiling is not None:
            kill.spoiling.plan(files)
        with survives_kill():
            async with rig.running(files=files) as services:
                await run_job(JobRig(services, hypervisor, limit_s=LIMIT_S))
        (uuid,) = hypervisor.known
        if kill.power:
            rig.lose_power(random.Random(repr(kill)))
            FakeHypervisor.put(hypervisor, uuid, state=GuestState.OFF)
        hypervisor.number = 0
        was_stopped = any(asked.startswith("shut down") for asked in hypervisor.asked)
        await check_next_life(rig, hypervisor, uuid, was_stopped=was_stopped, has_power=not kill.power)
        return files


async def run_job(job: JobRig) -> str:
    job.policy.archives = {"a": WhenRunning.SHUTDOWN}
    (result,) = await job.jobs().run(job.vms(), placeholders=Placeholders.BY_POLICY, tolerant=True)
    return result.outcome


async def check_next_life(
    rig: Rig, hypervisor: MortalHypervisor, uuid: str, *, was_stopped: bool, has_power: bool
) -> None:
    hypervisor.files = RigFiles(rig.medium)
    async with rig.running(files=hypervisor.files) as services:
        job = JobRig(services, hypervisor, limit_s=LIMIT_S)
        await job.guests.settle(job.all_vms)
        state = hypervisor.known[uuid].state
        is_archived = all(rig.is_placeholder(name) for name in NAMES)
        if state is GuestState.OFF and not is_archived:
            assert not has_power, "a guest that ran is off, and its VM is not archived"
            assert not was_stopped, "after the power came back, a guest that a job had stopped is off"
        if state is GuestState.OFF:
            assert services.private.stopped.all() == []
        else:
            # It may have been asked only now, and be on its way: it is looked at until that is certain.
            hypervisor.put(uuid, state=GuestState.OFF)
            was_noted = bool(services.private.stopped.all())
            await job.guests.settle(job.all_vms)
            expected = GuestState.RUNNING if was_noted and not is_archived else GuestState.OFF
            assert hypervisor.known[uuid].state is expected
        assert services.private.stopped.all() == []
        hypervisor.put(uuid, state=GuestState.RUNNING)
        assert await run_job(job) == "archived"
        assert hypervisor.known[uuid].state is GuestState.OFF
        for name, content in CONTENTS.items():
            await services.bring_back(name)
            assert (rig.backing / name).read_bytes() == content


def kills(files: RigFiles) -> Iterator[Kill]:
    chosen = random.Random(11)
    for site, count in sorted(files.counts.items()):
        for number in numbers(count, []):
            yield Kill(Spoiling(site, number, "kill"), power=chosen.random() < 0.5)


async def test_whatever_kills_the_job_the_guest_runs_or_is_archived() -> None:
    reached = await play(Kill())
    assert {"guests.note", "guests.note_sync", "guests.clear", "guests.clear_sync"} <= set(reached.counts)
    failed = []
    for kill in kills(reached):
        try:
            await play(kill)
        except (Exception, BaseExceptionGroup) as exc:
            failed.append(f"{kill}: {exc!r}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("late", [False, True])
async def test_a_daemon_that_dies_while_it_asks_the_hypervisor(late: bool) -> None:
    for number in range(1, 6):
        for power in (False, True):
            await play(Kill(asked=number, late=late, power=power))


async def test_the_note_is_what_brings_the_guest_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unnoted(self: StoppedGuests, *arguments: object) -> None:
        pass

    monkeypatch.setattr(StoppedGuests, "_note", unnoted)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        await play(Kill(Spoiling("archive.seek", 1, "kill")))


# What the sweep over all sites (test_sites.py) finds when it is planted


swept = partial(said_of, "stop_and_archive")


async def test_a_guest_that_nothing_says_was_stopped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unnoted(self: StoppedGuests, *arguments: object) -> None:
        pass

    for planted in (False, True):
        if planted:
            monkeypatch.setattr(StoppedGuests, "_note", unnoted)
        for site, kind in (("hypervisor.shut_down.answered", "away"), ("archive.seek", "away")):
            assert ("the guest is off, its VM is not archived" in await swept(site, kind)) is planted
        assert ("a job has stopped the guest, which is off" in await swept("archive.seek", "kill")) is planted


async def test_a_note_that_goes_before_its_guest_runs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = StoppedGuests._settle

    async def hasty(self: StoppedGuests, note: GuestNote, vm: Vm | None, *, is_off: bool, was_archived: bool) -> None:
        self._notes.remove(note)
        await settle(self, note, vm, is_off=is_off, was_archived=was_archived)

    assert await swept("archive.seek", "away") == ""
    monkeypatch.setattr(StoppedGuests, "_settle", hasty)
    assert "the guest is off, its VM is not archived" in await swept("archive.seek", "away")


async def test_a_vm_that_is_taken_for_archived_and_is_not_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoppedGuests, "_was_archived", lambda self, vm, note: True)
    for name in ("stop_and_archive", "save_and_archive"):
        for kind in ("kill", "power", "away"):
            assert "off, and its VM is not archived" in await said_of(name, "archive.seek", kind)


async def test_memory_that_is_not_archived_with_its_disks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoppedGuests, "has_memory", lambda *arguments: True)
    found_again = Backups._found_again

    async def without_memory(self: Backups, vm: Vm) -> Vm:
        found = await found_again(self, vm)
        return replace(found, files=tuple(file for file in found.files if not file.path.endswith(".save")))

    assert await said_of("save_and_archive", "archive.seek", "kill") == ""
    monkeypatch.setattr(Backups, "_found_again", without_memory)
    # Its directory would tell.
    monkeypatch.setattr(OtherEntries, "has_files", lambda *arguments: True)
    assert "memory" in await said_of("save_and_archive", "archive.seek", "kill")


async def test_a_guest_that_nobody_starts_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unsettled(self: StoppedGuests, *arguments: object) -> None:
        pass

    monkeypatch.setattr(StoppedGuests, "settle", unsettled)
    for kind in ("kill", "away"):
        assert "a note is left" in await swept("archive.seek", kind)


async def test_a_job_that_fails_and_leaves_its_guest_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopped_guests, "Stopped", partial(stopped_guests.Stopped, was_archived=True))
    assert "the guest is off, its VM is not archived" in await swept("archive.record", "error")
