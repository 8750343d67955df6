"""Why VMs must not be archived, whatever their usage: what their domains, and the chains of their images, say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.inventory.chains import Chains, why_never_by_domains
from vmfs_stub.inventory.domain import Domain, reason_without_stop
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.image_chains import ImageChains


@dataclass(frozen=True, slots=True)
class Obstacles:
    """What was seen of all VMs at one moment; ``below`` is the mountpoint."""

    chains: Chains
    below: Path
    require_stop_on_error: bool

    def domains_of(self, vm: Vm) -> tuple[Domain, ...]:
        """The domains that have a disk of this VM."""
        return self.chains.domains_of(vm)

    def against(self, vm: Vm) -> tuple[str, ...]:
        """All reasons why it must not be archived, each as an operator can read it."""
        return (*self.by_domains(vm), *self.chains.never(vm))

    def by_domains(self, vm: Vm) -> tuple[str, ...]:
        """Those of its domains: they do not pass when other VMs are archived first."""
        found = list(why_never_by_domains(vm, self.chains))
        if self.require_stop_on_error:
            reasons = (reason_without_stop(domain, below=self.below) for domain in self.domains_of(vm))
            found += [reason for reason in reasons if reason is not None]
        return tuple(found)


class ObstacleSight:
    """Looks at all VMs of a datastore; ``require_stop_on_error`` may be replaced."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        chains: ImageChains,
        scan: Callable[[], Awaitable[Scan]],
        mountpoint: Path,
        require_stop_on_error: bool,
    ) -> None:
        self._hypervisor = hypervisor
        self._chains = chains
        self._scan = scan
        self._mountpoint = mountpoint
        self.require_stop_on_error = require_stop_on_error

    async def look(self) -> Obstacles:
        """What stands against archives now.  Raises HypervisorAway, PrimaryIOError: it cannot be told."""
        domains = await self._hypervisor.domains()
        chains = await self._chains.look((await self._scan()).vms, domains)
        return Obstacles(chains, self._mountpoint, self.require_stop_on_error)
