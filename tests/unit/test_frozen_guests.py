"""Guests that are frozen for a backup go on, whatever becomes of the thaw, the hypervisor or the daemon."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.datastore_harness import CHUNK, Rig, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.core.names import PRIVATE_DIR, THAWS_DIR
from vmfs_stub.core.usage import GuestState
from vmfs_stub.services import frozen_guests
from vmfs_stub.services.findings import Finding
from vmfs_stub.services.frozen_guests import FREEZE_COMES_S, LOGGED_MAX, PAUSES_S, FrozenGuests

VM = domain("my web", Path("/srv/vms/vm/disk.img"), state=GuestState.RUNNING)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as rig:
        rig.inline = True
        rig.make_disk("vm/disk.img", b"x" * CHUNK)
        yield rig


class Agent(FakeHypervisor):
    """One guest, whose agent answers; a freeze ``hangs``, and may come ``late``: when it says so itself."""

    def __init__(self, notes: Path) -> None:
        super().__init__(VM)
        self.agents.add(VM.uuid)
        self.notes = notes
        self.hangs = False
        self.thaws_hang = False

    async def freeze(self, uuid: str) -> bool:
        assert list(self.notes.iterdir()), "frozen before it is noted"
        if self.hangs:
            self.asked.append("freeze, in vain")
            await trio.sleep_forever()
        return await super().freeze(uuid)

    async def thaw(self, uuid: str) -> None:
        if self.thaws_hang:
            self.asked.append("thaw, in vain")
            await trio.sleep_forever()
        await super().thaw(uuid)

    @property
    def done(self) -> list[str]:
        """What the guest was asked for since this was last asked."""
        done = [each.removesuffix(" my web") for each in self.asked if each != "domains"]
        self.asked.clear()
        return done


@dataclass
class Life:
    """One life of a daemon; ``now_s`` is its clock."""

    services: Services
    hypervisor: Agent
    now_s: float = 1e9
    guests: FrozenGuests = field(init=False)

    def __post_init__(self) -> None:
        self.guests = FrozenGuests(
            hypervisor=self.hypervisor,
            threads=self.services.threads,
            notes=self.services.private.thaws,
            findings=self.services.findings,
            clock=lambda: self.now_s,
        )

    async def freeze(self) -> bool:
        """For a moment; returns whether it was frozen."""
        async with self.guests.at_rest(self.services.rig.vm("vm"), VM) as is_frozen:
            assert VM.uuid in self.hypervisor.frozen or not is_frozen
            return is_frozen

    @property
    def notes(self) -> list[Path]:
        return list(self.hypervisor.notes.iterdir())

    @property
    def finding(self) -> Finding | None:
        found = self.services.findings.all()
        assert len(found) <= 1
        return found[0] if found else None


@asynccontextmanager
async def life(rig: Rig, hypervisor: Agent | None = None) -> AsyncIterator[Life]:
    async with rig.running() as services:
        yield Life(services, hypervisor or Agent(rig.backing / PRIVATE_DIR / THAWS_DIR))


async def left_frozen(rig: Rig) -> Agent:
    """What a daemon leaves that dies between freeze and thaw."""
    async with life(rig) as first:
        async with first.guests.at_rest(rig.vm("vm"), VM) as is_frozen:
            assert is_frozen
            first.hypervisor.away = True  # nothing that it asks is heard any more
        assert len(first.notes) == 1
        first.hypervisor.away = False
        first.hypervisor.asked.clear()
        return first.hypervisor


async def test_a_guest_is_noted_frozen_thawed_and_forgotten(rig: Rig) -> None:
    async with life(rig) as one:
        for _ in range(2):
            assert await one.freeze()
            assert (one.hypervisor.done, one.notes, one.hypervisor.frozen) == (["freeze", "thaw"], [], set())
        await one.guests.settle()
        assert one.hypervisor.done == []


async def test_a_guest_whose_agent_does_not_answer_is_not_thawed_either(rig: Rig) -> None:
    async with life(rig) as one:
        one.hypervisor.agents.clear()
        assert not await one.freeze()
        assert (one.hypervisor.done, one.notes, one.finding) == (["freeze"], [], None)


@pytest.mark.parametrize("site", ["guests.note", "guests.note_sync"])
async def test_a_guest_that_cannot_be_noted_is_not_frozen(rig: Rig, site: str) -> None:
    async with life(rig) as one:
        one.services.files.fail(site, 1, OSError(errno.EIO, os.strerror(errno.EIO)))
        assert not await one.freeze()
        assert (one.hypervisor.done, one.notes, one.finding) == ([], [], None)
        assert await one.freeze()


async def test_a_note_that_cannot_be_removed_goes_later(rig: Rig, autojump_clock: object) -> None:
    async with life(rig) as one:
        one.services.files.fail("guests.clear", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
        assert await one.freeze()
        assert (one.hypervisor.done, len(one.notes), one.finding) == (["freeze", "thaw"], 1, None)
        assert not await one.freeze()
        await trio.sleep(PAUSES_S[0])
        await one.guests.settle()
        assert (one.hypervisor.done, one.notes) == ([], [])
        assert await one.freeze()


# The daemon


async def test_the_next_daemon_thaws_what_one_that_died_has_left(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    hypervisor = await left_frozen(rig)
    async with life(rig, hypervisor) as second:
        second.now_s += FREEZE_COMES_S
        await second.guests.settle()
        assert (hypervisor.done, second.notes, hypervisor.frozen) == (["thaw"], [], set())
        assert "domain my web: its filesystems were thawed late" in caplog.text


async def test_the_next_daemon_does_so_at_once_and_by_itself(rig: Rig) -> None:
    hypervisor = await left_frozen(rig)
    async with life(rig, hypervisor) as second, trio.open_nursery() as nursery:
        nursery.start_soon(second.guests.run)
        with trio.fail_after(2):
            while hypervisor.frozen:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_freeze_that_comes_after_its_thaw_is_undone_too(rig: Rig, autojump_clock: object) -> None:
    async with life(rig) as one:
        one.hypervisor.hangs = True
        assert not await one.freeze()
        assert (one.hypervisor.done, len(one.notes), one.finding) == (["freeze, in vain", "thaw"], 1, None)
        one.hypervisor.hangs = False
        one.hypervisor.frozen.add(VM.uuid)
        assert not await one.freeze(), "it would be thawed at any time"
        await trio.sleep(PAUSES_S[0])
        await one.guests.settle()
        assert (one.hypervisor.done, len(one.notes), one.hypervisor.frozen) == (["thaw"], 1, set())
        one.now_s += FREEZE_COMES_S
        await trio.sleep(PAUSES_S[0] * 2)
        await one.guests.settle()
        assert (one.hypervisor.done, one.notes) == (["thaw"], [])
        assert await one.freeze()


# The agent


async def test_an_agent_that_hangs_is_asked_until_it_answers_and_the_operator_is_told(
    rig: Rig, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with life(rig) as one, trio.open_nursery() as nursery:
        one.hypervisor.hung.add(VM.uuid)
        assert await one.freeze()
        assert one.finding is not None
        assert (one.finding.subject, one.finding.severity) == ("domain my web", "problem")
        assert "the agent does not answer" in str(one.finding.error)
        assert "`virsh domfsthaw 'my web'`" in str(one.finding.error)
        assert one.hypervisor.done == ["freeze", "thaw"]
        nursery.start_soon(one.guests.run)
        await trio.sleep(3600)
        tries = one.hypervisor.done
        assert set(tries) == {"thaw"}
        assert 3600 / PAUSES_S[1] * 0.9 < len(tries) < 3600 / PAUSES_S[1] + 5, "less and less often, but without end"
        assert one.hypervisor.frozen, "as it was told"
        assert caplog.text.count("virsh domfsthaw") == LOGGED_MAX
        one.hypervisor.hung.clear()
        await trio.sleep(PAUSES_S[1] + PAUSES_S[0])
        assert (one.hypervisor.done, one.notes, one.finding) == (["thaw"], [], None)
        assert "thawed late" in caplog.text
        assert await one.freeze()
        nursery.cancel_scope.cancel()


async def test_a_thaw_that_hangs_holds_no_backup_up(rig: Rig, autojump_clock: object) -> None:
    async with life(rig) as one:
        one.hypervisor.thaws_hang = True
        began_s = trio.current_time()
        with trio.move_on_after(1) as scope:
            async with one.guests.at_rest(rig.vm("vm"), VM) as is_frozen:
                assert is_frozen
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() - began_s < 1 + frozen_guests.THAW_S_MAX + 0.1
        assert one.finding is not None
        one.hypervisor.thaws_hang = False
        await one.guests.settle()
        assert (one.hypervisor.frozen, one.notes, one.finding) == (set(), [], None)


# The guest, and what runs it


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_guest_that_is_off_is_not_frozen(rig: Rig, is_gone: bool, caplog: pytest.LogCaptureFixture) -> None:
    hypervisor = await left_frozen(rig)
    hypervisor.put(VM.uuid, state=GuestState.OFF)
    if is_gone:
        hypervisor.known.clear()
    async with life(rig, hypervisor) as second:
        await second.guests.settle()
        assert (hypervisor.done, second.notes, second.finding) == ([], [], None)
        assert "if it was migrated: `virsh domfsthaw" in caplog.text


@pytest.mark.parametrize("state", [GuestState.SAVED, GuestState.PAUSED])
async def test_a_guest_that_does_not_run_comes_back_frozen_and_is_thawed_then(
    rig: Rig, state: GuestState, autojump_clock: object
) -> None:
    hypervisor = await left_frozen(rig)
    hypervisor.put(VM.uuid, state=state)
    async with life(rig, hypervisor) as second:
        second.now_s += FREEZE_COMES_S
        for _ in range(3):
            await second.guests.settle()
            assert (len(second.notes), hypervisor.frozen) == (1, {VM.uuid})
            assert second.finding is not None
            assert second.finding.severity == ("warning" if state is GuestState.SAVED else "problem")
        hypervisor.put(VM.uuid, state=GuestState.RUNNING)
        await trio.sleep(PAUSES_S[0])
        await second.guests.settle()
        assert (second.notes, hypervisor.frozen, second.finding) == ([], set(), None)


@pytest.mark.parametrize("is_used", [False, True])
async def test_while_no_hypervisor_tells_the_note_stays(rig: Rig, is_used: bool) -> None:
    hypervisor = await left_frozen(rig)
    known = dict(hypervisor.known)
    hypervisor.away = hypervisor.is_used = is_used
    if not is_used:
        hypervisor.known.clear()
    async with life(rig, hypervisor) as second:
        second.now_s += FREEZE_COMES_S
        for _ in range(3):
            await second.guests.settle()
        assert (len(second.notes), hypervisor.frozen) == (1, {VM.uuid})
        assert second.finding is not None
        assert second.finding.subject == f"domain {VM.uuid}"
        hypervisor.away, hypervisor.is_used = False, True
        hypervisor.known.update(known)
        await second.guests.settle()
        assert (second.notes, hypervisor.frozen, second.finding) == ([], set(), None)
