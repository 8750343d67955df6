"""Which domain of the hypervisor is which VM of the datastore: by where its disks lie, below the mountpoint.

By path alone: nothing is looked at, since the mount is this very process's.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.errors import InUse, Refused
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import Domain, reasons_against
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.hypervisor import Hypervisor


@dataclass(frozen=True, slots=True)
class Links:
    """Domains by VM, and VMs by domain; either may have several of the other."""

    _domains: Mapping[VmId, tuple[Domain, ...]]
    _vms: Mapping[str, tuple[VmId, ...]]

    def of(self, vm_id: VmId) -> tuple[Domain, ...]:
        """The domains with a file of that VM."""
        return self._domains.get(vm_id, ())

    def vms_of(self, uuid: str) -> tuple[VmId, ...]:
        """The VMs that a domain has files of."""
        return self._vms.get(uuid, ())


def link(vms: Sequence[Vm], domains: Sequence[Domain], *, mountpoint: Path) -> Links:
    """Link each domain to the VMs in whose top directory, or file, one of its own files lies."""
    by_entry = {vm.path: vm.id for vm in vms}
    of_vm: defaultdict[VmId, list[Domain]] = defaultdict(list)
    of_domain: dict[str, tuple[VmId, ...]] = {}
    for domain in domains:
        paths = [Path(os.path.normpath(path)) for path in domain.paths]
        entries = [path.relative_to(mountpoint).parts[:1] for path in paths if path.is_relative_to(mountpoint)]
        found = {by_entry[entry]: None for parts in entries for entry in parts if entry in by_entry}
        of_domain[domain.uuid] = tuple(found)
        for vm_id in found:
            of_vm[vm_id].append(domain)
    return Links({vm_id: tuple(each) for vm_id, each in of_vm.items()}, of_domain)


async def refuse_archives(
    vms: Sequence[Vm], hypervisor: Hypervisor, *, mountpoint: Path, require_stop_on_error: bool
) -> None:
    """Refuse to archive VMs whose domains must not be, whoever asks for it.

    Raises Refused with the reasons; InUse for one that runs; HypervisorAway: it is not known.
    """
    links = link(vms, await hypervisor.domains(), mountpoint=mountpoint)
    for vm in vms:
        for domain in links.of(vm.id):
            reasons = reasons_against(domain, below=mountpoint, require_stop_on_error=require_stop_on_error)
            if domain.is_protected:
                reasons = (f"domain {domain.name}: its metadata says that it is protected", *reasons)
            if reasons:
                raise Refused(f"VM {vm.name} cannot be archived: {'; '.join(reasons)}")
            if not domain.state.is_off and domain.state is not GuestState.UNKNOWN:
                raise InUse(f"VM {vm.name} is in use: domain {domain.name} is {domain.state.value}; shut it down first")
