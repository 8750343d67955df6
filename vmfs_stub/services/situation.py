"""What is so of all VMs at one moment, and what of that stands against archiving one, whatever its usage.

That is what operators have protected, what the VMs' domains say, and what the chains of their images.  Whoever decides
on archives looks once, and goes by what was seen then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from vmfs_stub.core.errors import InUse, Protected, Refused
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.vm import Scan, Vm, VmFile
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.domains import LinkDomains, Links
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.image_chains import NVRAM_TARGET, ImageChains
from vmfs_stub.services.threads import Threads


@dataclass(frozen=True, slots=True)
class Situation:
    """All VMs of a datastore, whose the domains of this host are, and what the VMs' images are based on."""

    scan: Scan
    links: Links
    chains: Chains
    require_stop_on_error: bool

    def refuse(self, vm: Vm) -> None:
        """Raise Protected, InUse or Refused when anything stands against archiving it now."""
        self._refuse_protected(vm)
        for domain in self.links.of(vm.id):
            if domain.is_protected:
                raise Protected(
                    f"VM {vm.name}: the metadata of domain {domain.name} says that it is protected; take <protected/> "
                    "out of that to allow it"
                )
            if not domain.state.is_off:
                raise InUse(f"VM {vm.name} is in use: domain {domain.name} is {domain.state.value}; shut it down first")
        for file in vm.files:
            if self.chains.place(file) in self.chains.open_:
                raise InUse(f"VM {vm.name} is in use: {disk_label(file.path)} is open; shut it down first")
        if reasons := self.against(vm):
            raise Refused(f"VM {vm.name} is not archived: {'; '.join(reasons)}")

    def _refuse_protected(self, vm: Vm) -> None:
        """For what is said on the VM's own files; raises why it cannot be told, too."""
        for unread in self.scan.unread:
            if unread.path in vm.tops:
                raise unread.error
        if any(known.is_protected for known in self.scan.vms if known.id == vm.id):
            raise Protected(f"VM {vm.name} is protected from being archived; `vmfs-stub unprotect` allows it again")

    def against(self, vm: Vm) -> tuple[str, ...]:
        """All that domains and chains have against archiving it, their states aside, as an operator can read it."""
        return (*self._by_domains(vm), *self.chains.never(vm))

    def _by_domains(self, vm: Vm) -> Iterator[str]:
        domains = self.links.of(vm.id)
        yield from (f"domain {domain.name}: {problem}" for domain in domains for problem in domain.problems)
        for file in vm.files:
            users = {use.domain.uuid: use.domain.name for use in self._uses(file) if not use.disk.is_read_only}
            if len(users) > 1:
                names = ", ".join(sorted(users.values()))
                yield f"{printable(file.path)} is a disk of several domains: {names}"
        if self.require_stop_on_error:
            yield from self._without_stop(vm)

    def _without_stop(self, vm: Vm) -> Iterator[str]:
        """Its guests that would see a recall that fails as an error of a disk, whatever name the disk has for them.

        NVRAM is read before a guest runs.
        """
        uses = [use for file in vm.files for use in self._uses(file) if use.disk.target != NVRAM_TARGET]
        for domain in self.links.of(vm.id):
            own = (use.disk for use in uses if use.domain.uuid == domain.uuid)
            if targets := sorted(disk.target for disk in own if disk.lacks_stop):
                yield (
                    f"domain {domain.name}: {', '.join(targets)} without error_policy='stop' rerror_policy='stop': a "
                    "recall that fails would be an error of the guest's disk; `vmfs-stub doctor` shows the change, "
                    "[libvirt] require_stop_on_error waives it"
                )

    def _uses(self, file: VmFile) -> tuple[DiskUse, ...]:
        return tuple(self.chains.uses.get(self.chains.place(file), ()))


class Lookout:
    """Looks at a datastore and at the domains of its host; ``require_stop_on_error`` may be replaced."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        threads: Threads,
        chains: ImageChains,
        link: LinkDomains,
        scan: Callable[[], Awaitable[Scan]],
        require_stop_on_error: bool,
    ) -> None:
        self._hypervisor = hypervisor
        self._threads = threads
        self._chains = chains
        self._link = link
        self._scan = scan
        self.require_stop_on_error = require_stop_on_error

    async def look(self) -> Situation:
        """What is so now.  Raises HypervisorAway, PrimaryIOError: it cannot be told."""
        domains = await self._hypervisor.domains()
        scan = await self._scan()
        chains = await self._chains.look(scan.vms, domains)
        links = await self._threads.files(self._link, scan.vms, domains)
        return Situation(scan, links, chains, self.require_stop_on_error)
