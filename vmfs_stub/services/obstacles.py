"""Why VMs must not be archived, whatever their usage: what their domains, and the chains of their images, say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from vmfs_stub.core.errors import InUse, Protected, Refused
from vmfs_stub.inventory.chains import Chains, why_never_by_domains
from vmfs_stub.inventory.domain import Domain, DomainDisk
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.image_chains import NVRAM_TARGET, ImageChains


@dataclass(frozen=True, slots=True)
class Obstacles:
    """What was seen of all VMs at one moment."""

    chains: Chains
    require_stop_on_error: bool

    def domains_of(self, vm: Vm) -> tuple[Domain, ...]:
        """The domains that have a disk of this VM."""
        return self.chains.domains_of(vm)

    def against(self, vm: Vm) -> tuple[str, ...]:
        """All reasons why it must not be archived, each as an operator can read it."""
        return (*self.by_domains(vm), *self.chains.never(vm))

    def by_domains(self, vm: Vm) -> tuple[str, ...]:
        """Those of its domains: they do not pass when other VMs are archived first."""
        found = why_never_by_domains(vm, self.chains)
        return (*found, *self._without_stop(vm)) if self.require_stop_on_error else found

    def refuse(self, vm: Vm) -> None:
        """Raise Protected, InUse or Refused when anything stands against archiving it now."""
        self.refuse_by_domains(vm)
        _refuse(vm, self.chains.never(vm))

    def refuse_by_domains(self, vm: Vm) -> None:
        """The same for what its domains say, their states included."""
        for domain in self.domains_of(vm):
            if domain.is_protected:
                raise Protected(
                    f"VM {vm.name}: the metadata of domain {domain.name} says that it is protected; take <protected/> "
                    "out of that to allow it"
                )
            if not domain.state.is_off:
                raise InUse(f"VM {vm.name} is in use: domain {domain.name} is {domain.state.value}; shut it down first")
        _refuse(vm, self.by_domains(vm))

    def _without_stop(self, vm: Vm) -> Iterator[str]:
        """Its guests that would see a recall that fails as an error of a disk, whatever name the disk has for them."""
        for domain in self.domains_of(vm):
            targets = sorted(disk.target for disk in self._disks(vm, domain) if disk.lacks_stop)
            if targets:
                yield (
                    f"domain {domain.name}: {', '.join(targets)} without error_policy='stop' rerror_policy='stop': a "
                    "recall that fails would be an error of the guest's disk; `vmfs-stub doctor` shows the change, "
                    "[libvirt] require_stop_on_error waives it"
                )

    def _disks(self, vm: Vm, domain: Domain) -> Iterator[DomainDisk]:
        """Those of the domain that are files of this VM; NVRAM is read before a guest runs."""
        for file in vm.files:
            for use in self.chains.uses.get(self.chains.place(file), ()):
                if use.domain.uuid == domain.uuid and use.disk.target != NVRAM_TARGET:
                    yield use.disk


class ObstacleSight:
    """Looks at all VMs of a datastore; ``require_stop_on_error`` may be replaced."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        chains: ImageChains,
        scan: Callable[[], Awaitable[Scan]],
        require_stop_on_error: bool,
    ) -> None:
        self._hypervisor = hypervisor
        self._chains = chains
        self._scan = scan
        self.require_stop_on_error = require_stop_on_error

    async def look(self) -> Obstacles:
        """What stands against archives now.  Raises HypervisorAway, PrimaryIOError: it cannot be told."""
        domains = await self._hypervisor.domains()
        chains = await self._chains.look((await self._scan()).vms, domains)
        return Obstacles(chains, self.require_stop_on_error)


def protected(vm: Vm) -> Protected:
    """Why a VM is not archived that its operator has protected."""
    return Protected(f"VM {vm.name} is protected from being archived; `vmfs-stub unprotect` allows it again")


def _refuse(vm: Vm, reasons: Sequence[str]) -> None:
    if reasons:
        raise Refused(f"VM {vm.name} is not archived: {'; '.join(reasons)}")
