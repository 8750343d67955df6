"""The adapter, without a daemon, against a real libvirtd with real guests."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import trio
from live_datastore import MIB, image

from scripts.lab.datastore import copy_sparse, ended
from scripts.lab.guest import DONE, MARKER, Guest
from scripts.lab.private_libvirt import LabDisk, PrivateLibvirt, private_libvirt
from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.libvirt import LibvirtConnection
from vmfs_stub.services import libvirt_hypervisor
from vmfs_stub.services.libvirt_hypervisor import LibvirtHypervisor, LibvirtSettings, look_at_domains, open_libvirt

DEADLINE_S = 60.0


def settings(libvirt: PrivateLibvirt) -> LibvirtSettings:
    return LibvirtSettings(uri=libvirt.uri, timeout_s=5)


@asynccontextmanager
async def connected(libvirt: PrivateLibvirt) -> AsyncIterator[LibvirtHypervisor]:
    async with open_libvirt(settings(libvirt)) as hypervisor:
        yield hypervisor


async def call(function: Callable[..., object], *args: object) -> None:
    """Of the laboratory, which blocks."""
    await trio.to_thread.run_sync(function, *args)


async def until(hypervisor: LibvirtHypervisor, condition: Callable[[list[Domain]], bool]) -> list[Domain]:
    """Wait for a list of domains that is so, by nothing but what the hypervisor tells."""
    with trio.fail_after(DEADLINE_S):
        while True:
            changes = hypervisor.changes
            with_now = list(await hypervisor.domains())
            if condition(with_now):
                return with_now
            await hypervisor.wait_changed(changes)


def small(libvirt: PrivateLibvirt, name: str, **more: str) -> Path:
    path = libvirt.shared / f"{name}.raw"
    path.write_bytes(image(MIB, seed=1))
    libvirt.define(libvirt.domain_xml(name, [LabDisk(path)], **more))  # type: ignore[arg-type]
    return path


def real(libvirt: PrivateLibvirt, guest: Guest, name: str, *parameters: str, fast: bool = True) -> None:
    path = libvirt.shared / f"{name}.qcow2"
    copy_sparse(guest.qcow2, path)
    xml = libvirt.domain_xml(name, [LabDisk(path, "qcow2")], guest=guest, parameters=parameters, fast=fast)
    libvirt.define(xml)


async def test_the_list_of_domains_follows_what_happens(libvirt: PrivateLibvirt) -> None:
    async with connected(libvirt) as hypervisor:
        assert list(await hypervisor.domains()) == []
        await call(small, libvirt, "vm")
        (found,) = await until(hypervisor, lambda domains: len(domains) == 1)
        assert (found.name, found.state, found.state_since_s) == ("vm", GuestState.OFF, None)
        assert found.paths == (libvirt.shared / "vm.raw",)
        assert found.is_persistent
        await call(libvirt.virsh, "start", "vm")
        (found,) = await until(hypervisor, lambda domains: domains[0].state is GuestState.RUNNING)
        started_s = found.state_since_s
        assert started_s is not None
        await call(libvirt.virsh, "suspend", "vm")
        (found,) = await until(hypervisor, lambda domains: domains[0].state is GuestState.PAUSED)
        assert found.state_since_s is not None
        assert found.state_since_s >= started_s
        await call(libvirt.virsh, "resume", "vm")
        await until(hypervisor, lambda domains: domains[0].state is GuestState.RUNNING)
        await call(libvirt.virsh, "managedsave", "vm")
        await until(hypervisor, lambda domains: domains[0].state is GuestState.SAVED)
        await call(libvirt.virsh, "managedsave-remove", "vm")
        await call(libvirt.virsh, "autostart", "vm")
        await call(libvirt.virsh, "domrename", "vm", "other")
        (found,) = await until(hypervisor, lambda domains: domains[0].name == "other")
        assert (found.state, found.autostarts) == (GuestState.OFF, True)
        words = ("metadata", "other", "https://vmfs-stub/domain/1", "--key", "v", "--config", "--set")
        await call(libvirt.virsh, *words, "<domain><protected/><group>x</group></domain>")
        (found,) = await until(hypervisor, lambda domains: bool(domains[0].metadata))
        assert found.metadata == {"protected": "yes", "group": "x"}
        await call(libvirt.virsh, "undefine", "other")
        await until(hypervisor, lambda domains: domains == [])


async def test_a_transient_domain_is_no_candidate(libvirt: PrivateLibvirt) -> None:
    async with connected(libvirt) as hypervisor:
        await call(small, libvirt, "vm")
        await call(libvirt.virsh, "start", "vm")
        await call(libvirt.virsh, "undefine", "vm")
        (found,) = await until(hypervisor, lambda domains: bool(domains) and not domains[0].is_persistent)
        assert found.problems == ("it is transient: libvirt forgets it when it stops",)
        await call(libvirt.virsh, "destroy", "vm")
        await until(hypervisor, lambda domains: domains == [])


async def test_a_block_job_and_a_shared_disk_are_problems(libvirt: PrivateLibvirt) -> None:
    async with connected(libvirt) as hypervisor:
        path = await trio.to_thread.run_sync(small, libvirt, "vm")
        await call(libvirt.virsh, "start", "vm")
        copy = path.with_suffix(".copy")
        words = ("blockcopy", "vm", "vda", "--dest", copy, "--transient-job", "--wait", "--verbose")
        await call(libvirt.virsh, *words)
        (found,) = await until(hypervisor, lambda domains: bool(domains[0].problems))
        assert found.problems == ("disk vda has a block job running",)
        await call(libvirt.virsh, "blockjob", "vm", "vda", "--abort")
        await until(hypervisor, lambda domains: not domains[0].problems)


async def test_what_a_guest_uses_is_counted_by_one_question(libvirt: PrivateLibvirt, guest: Guest) -> None:
    async with connected(libvirt) as hypervisor:
        await call(real, libvirt, guest, "web", "vmfs.stay")
        await call(small, libvirt, "off")
        await call(libvirt.virsh, "start", "web")
        await call(libvirt.wait_console, "web", DONE)
        by_name = {each.name: each.uuid for each in await hypervisor.domains()}
        first = await hypervisor.readings()
        used, unused = first[by_name["web"]], first[by_name["off"]]
        assert (used.state, unused.state) == (GuestState.RUNNING, GuestState.OFF)
        assert used.counters.cpu_s is not None
        assert used.counters.cpu_s > 1
        assert used.counters.read_bytes is not None
        assert used.counters.read_bytes > MIB
        assert used.counters.requests is not None
        assert used.counters.requests > 50
        assert used.counters.network_bytes == 0
        assert unused.counters == replace(unused.counters, cpu_s=None, read_bytes=None, requests=None)
        await call(libvirt.restart)
        with trio.fail_after(DEADLINE_S):
            while hypervisor.is_away:  # noqa: ASYNC110
                await trio.sleep(0.05)
        again = (await hypervisor.readings())[by_name["web"]]
        assert again.counters.cpu_s is not None
        assert again.counters.cpu_s >= used.counters.cpu_s  # the same guest goes on counting


@contextmanager
def leased(path: Path) -> Iterator[Callable[[], bool]]:
    """A write lease as an archive holds it; what is yielded tells whether it still stands."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield lambda: fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    finally:
        os.close(fd)


async def test_no_question_opens_the_disk_of_a_domain_that_is_off(libvirt: PrivateLibvirt) -> None:
    async with connected(libvirt) as hypervisor:
        path = await trio.to_thread.run_sync(small, libvirt, "vm")
        with leased(path) as stands:
            for _ in range(3):
                (found,) = await hypervisor.domains()
                await hypervisor.readings()
                await hypervisor.set_note(found.uuid, None)
                await trio.to_thread.run_sync(look_at_domains, settings(libvirt))
            assert stands()
            # That libvirtd would do so if it was asked for more is what the care is for, and proves this test.
            with trio.move_on_after(2):
                await trio.to_thread.run_sync(libvirt.virsh, "domstats", "--block", "vm", abandon_on_cancel=True)
            assert not stands()


async def test_memory_goes_on_after_a_save_and_a_start(libvirt: PrivateLibvirt, guest: Guest) -> None:
    async with connected(libvirt) as hypervisor:
        await call(real, libvirt, guest, "web", "vmfs.stay")
        (found,) = await until(hypervisor, lambda domains: len(domains) == 1)
        await hypervisor.start(found.uuid)
        await hypervisor.start(found.uuid)  # which runs
        await call(libvirt.wait_console, "web", DONE)
        size = libvirt.console("web").stat().st_size
        await hypervisor.save(found.uuid, limit_s=DEADLINE_S)
        await until(hypervisor, lambda domains: domains[0].state is GuestState.SAVED)
        await hypervisor.start(found.uuid)
        await until(hypervisor, lambda domains: domains[0].state is GuestState.RUNNING)
        await trio.sleep(3)
        assert MARKER.encode() not in libvirt.console("web").read_bytes()[size:]  # it did not boot again
        with pytest.raises(HypervisorAway):
            await hypervisor.save("00" * 16, limit_s=5)
        assert not hypervisor.is_away


async def test_a_guest_powers_off_when_it_is_asked_and_one_that_does_not_is_left_alone(
    libvirt: PrivateLibvirt, guest: Guest
) -> None:
    async with connected(libvirt) as hypervisor:
        await trio.to_thread.run_sync(partial(real, libvirt, guest, "polite", "vmfs.stay", fast=False))
        await call(small, libvirt, "deaf")
        uuids = {each.name: each.uuid for each in await hypervisor.domains()}
        for uuid in uuids.values():
            await hypervisor.start(uuid)
        await call(libvirt.wait_console, "polite", DONE)
        assert await hypervisor.shut_down(uuids["polite"], limit_s=120)
        assert not await hypervisor.shut_down(uuids["deaf"], limit_s=3)
        states = {each.name: each.state for each in await hypervisor.domains()}
        assert states == {"polite": GuestState.OFF, "deaf": GuestState.RUNNING}


def test_nothing_is_printed_by_the_binding(libvirt: PrivateLibvirt, capfd: pytest.CaptureFixture[str]) -> None:
    connection = LibvirtConnection.to(libvirt.uri, lambda event: None)
    with pytest.raises(HypervisorAway, match=r"cannot start a domain: .*no domain with matching uuid"):
        connection.start("00" * 16)
    with pytest.raises(HypervisorAway):
        LibvirtConnection.to(f"{libvirt.uri}x", lambda event: None)
    connection.close()
    connection.close()
    assert capfd.readouterr() == ("", "")


def test_two_of_them_know_nothing_of_each_other(base: Path) -> None:
    with (
        private_libvirt(base / "one", shared=base) as one,
        private_libvirt(base / "two", shared=base) as two,
    ):
        for libvirt in (one, two):
            libvirt.define(libvirt.domain_xml("vm", []))
            libvirt.virsh("start", "vm")
        assert len({*one.guests(), *two.guests()}) == 2
        two.kill()
        assert one.state("vm") == "running"
        (left,) = two.guests()
        one.virsh("destroy", "vm")
    assert ended(left, deadline_s=0)


async def test_migration_out_and_in_is_noticed(libvirt: PrivateLibvirt, guest: Guest) -> None:
    """Between two hosts, as far as libvirt can tell; the disk is on storage that both have."""
    with private_libvirt(libvirt.shared / "other", shared=libvirt.shared) as other:
        async with connected(libvirt) as here, connected(other) as there:
            await call(real, libvirt, guest, "web", "vmfs.stay")
            await call(libvirt.virsh, "start", "web")
            await call(libvirt.wait_console, "web", DONE)
            other.console("web").touch()
            target = other.uri.replace("qemu:", "qemu+unix:", 1)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            how = ("--live", "--unsafe", "--persistent", "--migrateuri", f"tcp://127.0.0.1:{port}")
            await call(libvirt.virsh, "migrate", "web", target, *how)
            (left,) = await until(here, lambda domains: domains[0].state is GuestState.OFF)
            assert left.problems == ("it was migrated to another host, where its newest state is",)
            (came,) = await until(there, lambda domains: bool(domains) and domains[0].state is GuestState.RUNNING)
            assert (came.uuid, came.is_persistent, came.problems) == (left.uuid, True, ())
            assert came.state_since_s is not None


# Agents

AGENT = r"""
mount -t proc proc /proc; mount -t devtmpfs dev /dev; modprobe virtio_console; say() { echo AGENT-$1 >/dev/console; };
port=$(ls /dev/vport*p1 | head -1); exec 3<>$port; say UP; slow=0;
while :; do if IFS= read -r line <&3; then case $line in
*sync*) id=${line##*:}; printf '{\42return\42: %s}\n' ${id%%\}*} >&3;;
*get-time*) printf '{\42return\42: 1700000000000000000}\n' >&3;;
*fsfreeze-freeze*) say FROZEN; slow=8; printf '{\42return\42: 1}\n' >&3;;
*fsfreeze-thaw*) sleep $slow; slow=0; say THAWED; printf '{\42return\42: 1}\n' >&3;;
esac; else sleep 1; fi; done"""
"""What a guest runs instead of its system: as much of an agent as libvirt asks for, whose first thaw takes long."""
CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


def with_agent(libvirt: PrivateLibvirt, guest: Guest, name: str) -> None:
    path = libvirt.shared / f"{name}.qcow2"
    copy_sparse(guest.qcow2, path)
    line = ("init=/bin/bash", "--", "-c", escape('"' + AGENT.replace("\n", " ") + '"'))
    disks = [LabDisk(path, "qcow2")]
    libvirt.define(libvirt.domain_xml(name, disks, guest=guest, parameters=line, fast=False, devices=CHANNEL))


async def test_an_agent_that_thaws_slowly_is_waited_for_and_guests_without_one_are_not_frozen(
    libvirt: PrivateLibvirt, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_hypervisor, "AGENT_LIMIT_S", 2.0)
    async with connected(libvirt) as hypervisor:
        await call(small, libvirt, "plain")
        await call(partial(small, devices=CHANNEL), libvirt, "silent")
        await call(with_agent, libvirt, guest, "web")
        uuids = {each.name: each.uuid for each in await hypervisor.domains()}
        for name in uuids:
            assert not await hypervisor.freeze(uuids[name]), "it is off"
            await call(libvirt.virsh, "start", name)
        for name in ("plain", "silent"):
            assert not await hypervisor.freeze(uuids[name])
            with pytest.raises(HypervisorAway, match="guest agent is not con"):
                await hypervisor.thaw(uuids[name])
        web = uuids["web"]
        await call(libvirt.wait_console, "web", "AGENT-UP")
        with trio.fail_after(DEADLINE_S):
            while not await hypervisor.freeze(web):  # noqa: ASYNC110
                await trio.sleep(0.2)
        with pytest.raises(HypervisorAway, match="did not answer within 2 s"):
            await hypervisor.thaw(web)
        with pytest.raises(HypervisorAway, match="has not answered an earlier thaw"):
            await hypervisor.thaw(web)
        with trio.fail_after(DEADLINE_S):
            while not await thawed(hypervisor, web):  # noqa: ASYNC110
                await trio.sleep(0.2)
        said = [line for line in libvirt.console("web").read_text().split() if line.startswith("AGENT-")]
        assert said == ["AGENT-UP", "AGENT-FROZEN", "AGENT-THAWED", "AGENT-THAWED"]
        await call(libvirt.virsh, "suspend", "web")
        assert not await hypervisor.freeze(web), "it is paused"
        assert not await thawed(hypervisor, web)
        await call(libvirt.virsh, "resume", "web")
        assert await thawed(hypervisor, web)


async def thawed(hypervisor: LibvirtHypervisor, uuid: str) -> bool:
    try:
        await hypervisor.thaw(uuid)
    except HypervisorAway:
        return False
    return True
