"""A simulated hypervisor: domains as plain values, with a script of what their guests do when they are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.usage import GuestState, Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain, DomainDisk


def domain(name: str, *disks: Path, uuid: str = "", state: GuestState = GuestState.OFF) -> Domain:
    """A domain with plain disks."""
    shown = [
        DomainDisk(f"vd{chr(ord('a') + number)}", "disk", "file", path, "raw", stops_on_error=True)
        for number, path in enumerate(disks)
    ]
    return Domain(
        uuid=uuid or name.encode().hex().ljust(32, "0")[:32],
        name=name,
        state=state,
        state_since_s=None,
        is_persistent=True,
        autostarts=False,
        disks=tuple(shown),
        nvram=None,
        xml=f"<domain><name>{name}</name></domain>",
        metadata={},
    )


class FakeHypervisor:
    """Implements services.hypervisor.Hypervisor.

    Guests in ``stubborn`` do not power off when they are asked; those in ``agents`` have an agent that answers, but
    with those in ``hung`` not when it is to thaw; ``frozen`` are those that are, also while their memory is saved.
    ``away`` makes every call fail; ``asked`` is what was asked for, in order.
    """

    def __init__(self, *domains: Domain) -> None:
        self.known = {each.uuid: each for each in domains}
        self.used: dict[str, Reading] = {}
        self.stubborn: set[str] = set()
        self.agents: set[str] = set()
        self.hung: set[str] = set()
        self.frozen: set[str] = set()
        self.away = False
        self.is_used = True
        self.asked: list[str] = []
        self.changes = 0
        self._changed = trio.Event()

    async def wait_changed(self, seen: int) -> None:
        while self.changes == seen:
            await self._changed.wait()

    def change(self) -> None:
        """Tell that something happened."""
        self.changes += 1
        self._changed.set()
        self._changed = trio.Event()

    @property
    def is_away(self) -> bool:
        return self.away

    async def _asked(self, what: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.away:
            raise HypervisorAway("libvirt does not answer: is libvirtd running?")
        self.asked.append(what)

    def put(self, uuid: str, **changes: object) -> None:
        """Change what is known of a domain."""
        self.known[uuid] = replace(self.known[uuid], **changes)  # type: ignore[arg-type]
        if self.known[uuid].state is GuestState.OFF:
            self.frozen.discard(uuid)
        self.change()

    async def domains(self) -> Sequence[Domain]:
        await self._asked("domains")
        return list(self.known.values())

    async def readings(self) -> Mapping[str, Reading]:
        await self._asked("readings")
        return dict(self.used)

    async def shut_down(self, uuid: str, *, limit_s: float) -> bool:
        await self._asked(f"shut down {self.known[uuid].name}")
        if uuid in self.stubborn:
            await trio.sleep(limit_s)
            return False
        self.put(uuid, state=GuestState.OFF)
        return True

    async def save(self, uuid: str, *, limit_s: float) -> None:
        await self._asked(f"save {self.known[uuid].name}")
        self.put(uuid, state=GuestState.SAVED)

    async def start(self, uuid: str) -> None:
        await self._asked(f"start {self.known[uuid].name}")
        self.put(uuid, state=GuestState.RUNNING)

    async def freeze(self, uuid: str) -> bool:
        await self._asked(f"freeze {self.known[uuid].name}")
        self.frozen |= self.agents & {uuid}
        return uuid in self.agents

    async def thaw(self, uuid: str) -> None:
        await self._asked(f"thaw {self.known[uuid].name}")
        if uuid in self.hung or self.known[uuid].state is not GuestState.RUNNING:
            raise HypervisorAway("the agent does not answer")
        self.frozen.discard(uuid)

    async def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        await self._asked(f"note of {self.known[uuid].name}")
        self.put(uuid, note=note)
