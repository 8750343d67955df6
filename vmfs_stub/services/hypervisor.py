"""What runs VMs, as the services see it: libvirt, nothing at all, or in tests a simulated one.

`Hypervisor` is what everybody who decides needs; its methods wait for the hypervisor under a limit of time, and raise
HypervisorAway while it does not answer.  `NoHypervisor` is for hosts without libvirt: no domains, and never away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import trio

from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.core.usage import Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain


class Hypervisor(Protocol):
    """Domains, by their UUIDs (32 hex digits)."""

    @property
    def is_away(self) -> bool:
        """Whether the hypervisor is one that should answer and does not.  Does not block."""
        ...

    @property
    def is_used(self) -> bool:
        """Whether there is one, be it away or not: else that there are no domains says nothing of any."""
        ...

    async def domains(self) -> Sequence[Domain]:
        """All domains as they are now.  Raises HypervisorAway."""
        ...

    async def readings(self) -> Mapping[str, Reading]:
        """What each domain has used, with one question for all of them.  Raises HypervisorAway.

        Must not make the hypervisor open the images of domains that are off: that would break an archive's lease.
        """
        ...

    async def shut_down(self, uuid: str, *, limit_s: float) -> bool:
        """Ask a guest to power off (ACPI), and wait; whether it did within ``limit_s``.  Never takes its power."""
        ...

    async def save(self, uuid: str, *, limit_s: float) -> None:
        """Put the guest's memory into the hypervisor's save directory and end it (managed save)."""
        ...

    async def start(self, uuid: str) -> None:
        """Start a domain that a job had stopped."""
        ...

    async def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        """Write, or remove, what the domain's metadata says of its archive."""
        ...


class Quiescing(Protocol):
    """A hypervisor that can ask guests to bring their filesystems to rest; not every one can, nor every guest."""

    async def freeze(self, uuid: str) -> bool:
        """Have the guest's agent freeze all its filesystems; false when no agent answers, and nothing is frozen.

        Raises HypervisorAway: they may be frozen, now or in a while.
        """
        ...

    async def thaw(self, uuid: str) -> None:
        """Undo `freeze`, or what of it may have been done.  Raises HypervisorAway unless the agent says that it is."""
        ...


class WatchedHypervisor(Hypervisor, Quiescing, Protocol):
    """One that can also bring guests to rest, and tells that something has changed."""

    @property
    def changes(self) -> int:
        """How often something happened to a domain, or the hypervisor came or went."""
        ...

    async def wait_changed(self, seen: int) -> None:
        """Wait until `changes` is another than ``seen``."""
        ...


async def domains_by_uuid(hypervisor: Hypervisor) -> Mapping[str, Domain]:
    """All domains.  Raises HypervisorAway, also on a host where there is no hypervisor (any more)."""
    found = {domain.uuid: domain for domain in await hypervisor.domains()}
    if not hypervisor.is_used:
        raise HypervisorAway("there is no hypervisor that could tell")
    return found


class NoHypervisor:
    """A host without libvirt."""

    is_away = False
    is_used = False
    changes = 0

    async def wait_changed(self, seen: int) -> None:
        """Nothing ever happens."""
        await trio.sleep_forever()

    async def domains(self) -> Sequence[Domain]:
        """None."""
        return ()

    async def readings(self) -> Mapping[str, Reading]:
        """None."""
        return {}

    async def shut_down(self, uuid: str, *, limit_s: float) -> bool:
        """Never called: there are no domains."""
        raise AssertionError(uuid)

    async def freeze(self, uuid: str) -> bool:
        """There are no agents."""
        return False

    async def thaw(self, uuid: str) -> None:
        """Nothing was frozen."""

    async def save(self, uuid: str, *, limit_s: float) -> None:
        """Never called."""
        raise AssertionError(uuid)

    async def start(self, uuid: str) -> None:
        """Never called."""
        raise AssertionError(uuid)

    async def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        """Never called."""
        raise AssertionError(uuid)
