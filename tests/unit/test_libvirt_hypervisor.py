"""The connection to libvirt as services see it: a libvirtd that hangs, dies, comes back, and tells of what happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from fake_hypervisor import domain

from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.usage import Counters, GuestState, Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.libvirt import DomainEvent, LibvirtConnection, Told
from vmfs_stub.inventory.libvirt_binding import has_binding, sockets_of, the_binding
from vmfs_stub.services import libvirt_hypervisor
from vmfs_stub.services.libvirt_hypervisor import (
    AGENT_CALLS_MAX,
    CALLS_MAX,
    LibvirtHypervisor,
    LibvirtSettings,
    open_libvirt,
)

SETTINGS = LibvirtSettings(uri="qemu:///system?socket=/nowhere/sock", timeout_s=0.2)
QUICK = (0.01, 0.02)
BINDING = the_binding()


class FakeLibvirt:
    """libvirtd and the connections to it; while ``hangs``, no call returns, while ``is_down``, none succeeds."""

    def __init__(self, *domains: Domain) -> None:
        self.known = {each.uuid: each for each in domains}
        self.is_down = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.told: list[Told] = []
        self.asked: list[str] = []
        self.connections = 0
        self.hanging = 0
        self.hanging_max = 0
        self.powers_off = True
        self.refuses = False
        self.refuses_thaws = 0
        self.has_agent = True
        self.thaws_go_on = threading.Event()
        self.thaws_go_on.set()

    def connect(self, told: Told) -> FakeConnection:
        self.connections += 1
        self.call("connect")
        self.told.append(told)
        return FakeConnection(self)

    def call(self, what: str) -> None:
        self.asked.append(what)
        self.hanging += 1
        self.hanging_max = max(self.hanging_max, self.hanging)
        self.goes_on.wait()
        self.hanging -= 1
        if self.refuses:
            raise HypervisorAway("the domain is busy")
        if self.is_down:
            raise HypervisorAway("cannot connect: no such file")

    def put(self, uuid: str, state: GuestState) -> None:
        """Change a state, and tell."""
        self.known[uuid] = replace(self.known[uuid], state=state)
        self.told[-1](DomainEvent(uuid, is_state=True, at_s=1000.0 + len(self.asked)))

    def die(self) -> None:
        """The connection is lost, and libvirt says so."""
        self.is_down = True
        self.told[-1](DomainEvent(None, is_state=True, at_s=time.time()))


class FakeConnection:
    """Implements services.libvirt_hypervisor.Connection."""

    def __init__(self, libvirt: FakeLibvirt) -> None:
        self.libvirt = libvirt

    def close(self) -> None:
        self.libvirt.asked.append("close")

    def forget(self, uuid: str | None) -> None:
        self.libvirt.asked.append(f"forget {uuid}")

    def is_alive(self) -> bool:
        return not self.libvirt.is_down

    def domains(self) -> list[Domain]:
        self.libvirt.call("domains")
        return list(self.libvirt.known.values())

    def readings(self) -> Mapping[str, Reading]:
        self.libvirt.call("readings")
        return {uuid: Reading(1.0, each.state, Counters()) for uuid, each in self.libvirt.known.items()}

    def state(self, uuid: str) -> GuestState:
        self.libvirt.call("state")
        return self.libvirt.known[uuid].state

    def ask_to_power_off(self, uuid: str) -> None:
        self.libvirt.call("power off")
        if self.libvirt.powers_off:
            threading.Timer(0.05, self.libvirt.put, (uuid, GuestState.OFF)).start()

    def save(self, uuid: str) -> None:
        self.libvirt.call("save")

    def stop_saving(self, uuid: str) -> None:
        self.libvirt.asked.append("stop saving")

    def start(self, uuid: str) -> None:
        self.libvirt.call("start")

    def has_agent(self, uuid: str) -> bool:
        self.libvirt.call("agent?")
        return self.libvirt.has_agent

    def freeze(self, uuid: str) -> None:
        self.libvirt.call("freeze")

    def thaw(self, uuid: str) -> None:
        if self.libvirt.refuses_thaws:
            self.libvirt.refuses_thaws -= 1
            raise HypervisorAway("cannot acquire state change lock")
        self.libvirt.asked.append("thaw")
        self.libvirt.thaws_go_on.wait()

    def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        self.libvirt.call("note")


VM = domain("web", Path("/mnt/images/web/disk.raw"))
Check = Callable[[LibvirtHypervisor, FakeLibvirt], Awaitable[None]]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - of threads
            await trio.sleep(0.005)


async def with_libvirt(check: Check, libvirt: FakeLibvirt, settings: LibvirtSettings = SETTINGS) -> None:
    clock = iter(range(1, 100_000))
    try:
        async with open_libvirt(
            settings, connect=libvirt.connect, clock=lambda: float(next(clock)), backoff_s=QUICK
        ) as hypervisor:
            await check(hypervisor, libvirt)
    finally:
        libvirt.goes_on.set()


async def test_domains_and_readings_come_with_the_time_that_an_event_told() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        (found,) = await hypervisor.domains()
        assert (found.state, found.state_since_s) == (GuestState.OFF, None)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hypervisor.wait_changed, hypervisor.changes)
                await trio.testing.wait_all_tasks_blocked()
                libvirt.put(VM.uuid, GuestState.RUNNING)
        (found,) = await hypervisor.domains()
        assert found.state is GuestState.RUNNING
        assert found.state_since_s is not None
        assert found.state_since_s >= 1000
        assert (await hypervisor.readings())[VM.uuid].state_since_s == found.state_since_s
        assert f"forget {VM.uuid}" in libvirt.asked

    await with_libvirt(check, FakeLibvirt(VM))


async def test_a_change_that_no_event_told_began_at_the_latest_when_it_was_seen() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert (await hypervisor.readings())[VM.uuid].state_since_s is None
        libvirt.known[VM.uuid] = replace(VM, state=GuestState.RUNNING)
        since_s = (await hypervisor.readings())[VM.uuid].state_since_s
        assert since_s is not None
        assert since_s < 1000
        assert (await hypervisor.readings())[VM.uuid].state_since_s == since_s

    await with_libvirt(check, FakeLibvirt(VM))


async def test_what_happened_while_libvirt_was_away_is_not_known() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.put(VM.uuid, GuestState.RUNNING)
        await until(lambda: f"forget {VM.uuid}" in libvirt.asked)
        assert (await hypervisor.domains())[0].state_since_s is not None
        libvirt.die()
        await until(lambda: hypervisor.is_away)
        assert hypervisor.away_since_s is not None
        with pytest.raises(HypervisorAway, match=r"does not answer since .*"):
            await hypervisor.domains()
        await until(lambda: libvirt.connections > 3)
        libvirt.is_down = False
        await until(lambda: not hypervisor.is_away)
        assert (hypervisor.away_since_s, hypervisor.away_reason) == (None, "")
        assert (await hypervisor.domains())[0].state_since_s is None

    await with_libvirt(check, FakeLibvirt(VM))


async def test_an_event_of_a_lost_connection_does_not_count() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.die()
        await until(lambda: hypervisor.is_away)
        libvirt.is_down = False
        await until(lambda: not hypervisor.is_away)
        libvirt.told[0](DomainEvent(None, is_state=True, at_s=1.0))
        await trio.sleep(0.05)
        assert not hypervisor.is_away

    await with_libvirt(check, FakeLibvirt(VM))


async def test_a_hanging_libvirt_holds_up_nobody_and_takes_a_bounded_number_of_threads() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.goes_on.clear()
        failed = 0

        async def ask() -> None:
            nonlocal failed
            with pytest.raises(HypervisorAway):
                await hypervisor.readings()
            failed += 1

        begun_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(ask)
        for _ in range(50):
            await ask()
        assert failed == 100
        assert trio.current_time() - begun_s < 5
        assert hypervisor.is_away
        assert libvirt.hanging_max <= CALLS_MAX + 1  # and one that connects
        libvirt.goes_on.set()
        await until(lambda: not hypervisor.is_away)
        assert len(await hypervisor.domains()) == 1

    await with_libvirt(check, FakeLibvirt(VM))


async def test_the_first_question_waits_for_the_connection_but_not_for_ever() -> None:
    libvirt = FakeLibvirt(VM)
    libvirt.goes_on.clear()

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        with trio.fail_after(5), pytest.raises(HypervisorAway, match="no answer to a connection within"):
            await hypervisor.domains()
        libvirt.goes_on.set()
        await until(lambda: not hypervisor.is_away)

    await with_libvirt(check, libvirt)


async def test_where_libvirt_is_optional_a_host_without_its_socket_has_no_domains() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert await hypervisor.domains() == ()
        assert await hypervisor.readings() == {}
        assert not hypervisor.is_away
        assert libvirt.connections == 0

    await with_libvirt(check, FakeLibvirt(VM), replace(SETTINGS, is_optional=True))


async def test_where_libvirt_is_optional_it_is_used_once_its_socket_appears(tmp_path: Path) -> None:
    assert has_binding()
    settings = replace(SETTINGS, is_optional=True, uri=f"qemu:///system?socket={tmp_path / 'sock'}")

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert await hypervisor.domains() == ()
        (tmp_path / "sock").touch()
        await until(lambda: libvirt.connections > 0)
        assert len(await hypervisor.domains()) == 1
        (tmp_path / "sock").unlink()
        libvirt.die()
        await until(lambda: hypervisor.is_away)
        with pytest.raises(HypervisorAway):
            await hypervisor.domains()

    await with_libvirt(check, FakeLibvirt(VM), settings)


@pytest.mark.parametrize("lacks", ["socket", "binding"])
async def test_a_libvirt_that_comes_later_is_noticed_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """However long a lost one would be waited for: libvirtd may just be started after this one."""
    monkeypatch.setattr(libvirt_hypervisor, "APPEARS_WITHIN_S", 0.01)
    installed = lacks != "binding"
    monkeypatch.setattr(libvirt_hypervisor, "has_binding", lambda: installed)
    socket, libvirt = tmp_path / "sock", FakeLibvirt(VM)
    if lacks != "socket":
        socket.touch()
    settings = replace(SETTINGS, is_optional=True, uri=f"qemu:///system?socket={socket}")
    async with open_libvirt(settings, connect=libvirt.connect, backoff_s=(60, 60)) as hypervisor:
        assert await hypervisor.domains() == ()
        assert (hypervisor.is_used, hypervisor.is_away) == (False, False)
        seen = hypervisor.changes
        installed = True
        socket.touch()
        with trio.fail_after(10):
            await hypervisor.wait_changed(seen)
        assert (hypervisor.is_used, hypervisor.is_away) == (True, False)
        assert len(await hypervisor.domains()) == 1


async def test_where_libvirt_is_optional_one_that_an_earlier_daemon_met_is_away(tmp_path: Path) -> None:
    """Its guests may run, whatever has become of its socket."""
    socket, libvirt = tmp_path / "sock", FakeLibvirt(VM)
    libvirt.is_down = True
    settings = replace(SETTINGS, is_optional=True, met_before=True, uri=f"qemu:///system?socket={socket}")

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        for ask in (hypervisor.domains, hypervisor.readings):
            with pytest.raises(HypervisorAway, match=r"no such file; it was there before: .* set \[libvirt\] enabled"):
                await ask()
        assert (hypervisor.is_used, hypervisor.is_away) == (True, True)
        socket.touch()
        libvirt.is_down = False
        await until(lambda: not hypervisor.is_away)
        assert len(await hypervisor.domains()) == 1

    await with_libvirt(check, libvirt, settings)


async def test_a_guest_that_powers_off_is_waited_for() -> None:
    running = replace(VM, state=GuestState.RUNNING)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert await hypervisor.shut_down(VM.uuid, limit_s=10)
        assert libvirt.asked.count("power off") == 1
        assert await hypervisor.shut_down(VM.uuid, limit_s=10)
        assert libvirt.asked.count("power off") == 1

    await with_libvirt(check, FakeLibvirt(running))


async def test_a_guest_that_does_not_power_off_is_left_alone() -> None:
    libvirt = FakeLibvirt(replace(VM, state=GuestState.RUNNING))
    libvirt.powers_off = False

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert not await hypervisor.shut_down(VM.uuid, limit_s=0.1)
        assert libvirt.known[VM.uuid].state is GuestState.RUNNING

    await with_libvirt(check, libvirt)


async def test_a_save_that_takes_too_long_is_stopped_and_libvirt_is_not_away_for_that() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.goes_on.clear()
        with pytest.raises(HypervisorAway, match="did not answer within"):
            await hypervisor.save(VM.uuid, limit_s=0.1)
        assert libvirt.asked[-1] == "stop saving"
        with trio.move_on_after(0.05):
            await hypervisor.save(VM.uuid, limit_s=60)
        assert libvirt.asked[-2:] == ["save", "stop saving"]
        libvirt.goes_on.set()
        await hypervisor.save(VM.uuid, limit_s=5)
        assert libvirt.asked[-1] == "save"
        libvirt.refuses = True
        with pytest.raises(HypervisorAway, match="busy"):
            await hypervisor.save(VM.uuid, limit_s=5)
        assert libvirt.asked[-1] == "save"  # that job of somebody else goes on
        assert not hypervisor.is_away

    await with_libvirt(check, FakeLibvirt(VM))


def test_where_the_socket_of_a_uri_is() -> None:
    assert [str(path) for path in sockets_of("qemu:///system")] == [
        "/run/libvirt/libvirt-sock",
        "/run/libvirt/virtqemud-sock",
    ]
    assert sockets_of("qemu:///system?socket=/a/b") == (Path("/a/b"),)
    assert sockets_of("qemu+ssh://host/system") == ()
    assert sockets_of("qemu:///session") == ()


async def test_a_guest_is_thawed_although_all_freezes_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose thaw waited behind freezes that hung, which went on later, was frozen for ever."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_LIMIT_S", 0.1)
    hangs = threading.Event()

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        monkeypatch.setattr(FakeConnection, "freeze", lambda self, uuid: hangs.wait())
        async with trio.open_nursery() as nursery:
            for _ in range(AGENT_CALLS_MAX):
                nursery.start_soon(_freeze_in_vain, hypervisor)
        await hypervisor.thaw(VM.uuid)
        assert libvirt.asked[-1] == "thaw"
        # Guests are started, too.
        await hypervisor.start(VM.uuid)
        hangs.set()

    await with_libvirt(check, FakeLibvirt(VM))


async def _freeze_in_vain(hypervisor: LibvirtHypervisor) -> None:
    with pytest.raises(HypervisorAway):
        await hypervisor.freeze(VM.uuid)


async def test_an_agent_that_hangs_before_it_is_asked_to_freeze_never_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it answers it must not freeze for somebody who has long gone on."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_ANSWERS_S", 0.1)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.goes_on.clear()
        assert not await hypervisor.freeze(VM.uuid)
        libvirt.goes_on.set()
        await until(lambda: libvirt.hanging == 0)
        await hypervisor.domains()
        assert "freeze" not in libvirt.asked
        libvirt.has_agent = False
        assert not await hypervisor.freeze(VM.uuid)
        libvirt.refuses = True
        assert not await hypervisor.freeze(VM.uuid)
        assert "freeze" not in libvirt.asked

    await with_libvirt(check, FakeLibvirt(VM))


async def test_an_agent_that_hangs_holds_one_thread_however_often_its_guest_is_backed_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a few nights no other guest would be brought to rest any more."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_ANSWERS_S", 0.1)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.goes_on.clear()
        for _ in range(AGENT_CALLS_MAX):
            assert not await hypervisor.freeze(VM.uuid)
        assert libvirt.asked.count("agent?") == 1
        libvirt.goes_on.set()
        await until(lambda: libvirt.hanging == 0)
        assert await hypervisor.freeze(VM.uuid)
        await hypervisor.thaw(VM.uuid)

    await with_libvirt(check, FakeLibvirt(VM))


async def test_who_gives_up_on_an_agent_that_hangs_is_told_that_nothing_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a job that is cancelled then leaves a guest that is said to be frozen for as long as its agent hangs."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_ANSWERS_S", 0.2)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.goes_on.clear()
        is_frozen = None
        with trio.move_on_after(0.05):
            is_frozen = await hypervisor.freeze(VM.uuid)
        assert is_frozen is False
        libvirt.goes_on.set()
        await until(lambda: libvirt.hanging == 0)
        with trio.move_on_after(0):
            await hypervisor.freeze(VM.uuid)
        assert "freeze" not in libvirt.asked

    await with_libvirt(check, FakeLibvirt(VM))


async def test_a_thaw_that_hangs_is_not_asked_for_a_second_time_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold a thread, until there are none for other guests."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_LIMIT_S", 0.1)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        await hypervisor.domains()
        libvirt.thaws_go_on.clear()
        for _ in range(AGENT_CALLS_MAX + 1):
            with pytest.raises(HypervisorAway):
                await hypervisor.thaw(VM.uuid)
        assert libvirt.asked.count("thaw") == 1
        with pytest.raises(HypervisorAway, match="did not answer within"):
            await hypervisor.thaw("f" * 32)  # another guest, whose thaw is asked for
        assert libvirt.asked.count("thaw") == 2
        libvirt.thaws_go_on.set()
        await until(lambda: not hypervisor._thawing)
        await hypervisor.thaw(VM.uuid)

    await with_libvirt(check, FakeLibvirt(VM))


async def test_no_guest_is_frozen_that_could_not_be_thawed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that hang in a thaw keep the threads; with none left, a guest whose agent is well would stay frozen."""
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_LIMIT_S", 0.1)

    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        libvirt.thaws_go_on.clear()
        for number in range(AGENT_CALLS_MAX - 1):
            assert await hypervisor.freeze(f"{number:032x}")
            with pytest.raises(HypervisorAway):
                await hypervisor.thaw(f"{number:032x}")
        assert not await hypervisor.freeze(VM.uuid)
        assert libvirt.asked.count("freeze") == AGENT_CALLS_MAX - 1
        libvirt.thaws_go_on.set()
        await until(lambda: not hypervisor._thawing)
        assert await hypervisor.freeze(VM.uuid)
        await hypervisor.thaw(VM.uuid)

    await with_libvirt(check, FakeLibvirt(VM))


async def test_a_thaw_that_is_refused_is_told() -> None:
    async def check(hypervisor: LibvirtHypervisor, libvirt: FakeLibvirt) -> None:
        assert await hypervisor.freeze(VM.uuid)
        libvirt.refuses_thaws = 1
        with pytest.raises(HypervisorAway, match="state change lock"):
            await hypervisor.thaw(VM.uuid)
        assert not hypervisor.is_away
        await hypervisor.thaw(VM.uuid)

    await with_libvirt(check, FakeLibvirt(VM))


# What the binding says of agents


class FakeAgent:
    """A domain's handle, and its own connection: questions of the agent answer, or fail with libvirt's ``errors``."""

    def __init__(self, **errors: int | SaidError) -> None:
        self.errors = errors
        self.asked: list[str] = []

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's
        return True

    def lookupByUUID(self, uuid: bytes) -> FakeAgent:  # noqa: N802
        return self

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.errors:
            error = self.errors[what]
            raise error if isinstance(error, SaidError) else SaidError(error)

    def getTime(self) -> None:  # noqa: N802
        self._ask("time")

    def fsFreeze(self) -> None:  # noqa: N802
        self._ask("freeze")

    def fsThaw(self) -> None:  # noqa: N802
        self._ask("thaw")


class SaidError(BINDING.libvirtError):  # type: ignore[misc]
    def __init__(self, code: int, message: str = "planted") -> None:
        super().__init__(message)
        self.err = (code, 0, message, 0, None, None, None, 0, 0)


def connection_of(agent: FakeAgent) -> LibvirtConnection:
    return LibvirtConnection(agent)


NO_AGENT = (BINDING.VIR_ERR_AGENT_UNRESPONSIVE, BINDING.VIR_ERR_AGENT_UNSYNCED, BINDING.VIR_ERR_ARGUMENT_UNSUPPORTED)
NO_AGENTS = (*NO_AGENT, BINDING.VIR_ERR_OPERATION_INVALID, BINDING.VIR_ERR_NO_SUPPORT)


@pytest.mark.parametrize("code", NO_AGENTS)
def test_a_guest_without_an_agent_that_answers(code: int) -> None:
    assert not connection_of(FakeAgent(time=code)).has_agent(VM.uuid)


def test_an_agent_that_may_not_tell_the_time_answers() -> None:
    assert connection_of(FakeAgent(time=BINDING.VIR_ERR_INTERNAL_ERROR)).has_agent(VM.uuid)
    assert connection_of(agent := FakeAgent()).has_agent(VM.uuid)
    assert agent.asked == ["time"]


def test_a_guest_that_somebody_else_has_frozen_is_not_frozen_and_thus_not_thawed_either() -> None:
    refusal = SaidError(BINDING.VIR_ERR_INTERNAL_ERROR, "the command has been disabled: the agent is in frozen state")
    assert not connection_of(FakeAgent(time=refusal)).has_agent(VM.uuid)


@pytest.mark.parametrize("code", NO_AGENT)
def test_an_agent_that_is_silent_after_it_was_to_freeze_may_have_frozen(code: int) -> None:
    with pytest.raises(HypervisorAway):
        connection_of(FakeAgent(freeze=code)).freeze(VM.uuid)


@pytest.mark.parametrize("code", NO_AGENTS)
def test_a_guest_is_thawed_when_its_agent_says_so_and_not_before(code: int) -> None:
    agent = FakeAgent(thaw=code)
    with pytest.raises(HypervisorAway, match="cannot thaw the filesystems of a guest: planted"):
        connection_of(agent).thaw(VM.uuid)
    agent.errors.clear()
    connection_of(agent).thaw(VM.uuid)
    assert agent.asked == ["thaw", "thaw"]
