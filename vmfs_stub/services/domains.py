"""Which domain is which VM: by where the domain's own files lie.

A domain names its files by paths on this host, which lead below the mountpoint, perhaps through symlinks; a VM is known
by its files in the backing directory.  No image is opened.  What an image of the domain is based on is no link: bases
are the business of `image_chains`.

A domain is linked to the VM in whose directory its disk will be, too, and to each VM that has a name of its file.  What
cannot be looked at is no link: where that must not be, `ImageChains.look` has told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vmfs_stub.core.ids import VmId
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.datastore_paths import DatastorePaths


@dataclass(frozen=True, slots=True)
class Links:
    """Which domains have files of which VMs; either may have several of the other."""

    domains: Mapping[VmId, tuple[Domain, ...]] = field(default_factory=dict)
    vms: Mapping[str, tuple[VmId, ...]] = field(default_factory=dict)

    def of(self, vm_id: VmId) -> tuple[Domain, ...]:
        """The domains that have a file of this VM, by name."""
        return self.domains.get(vm_id, ())

    def vms_of(self, uuid: str) -> tuple[VmId, ...]:
        """The VMs whose files this domain has, the one of its first disk first."""
        return self.vms.get(uuid, ())


LinkDomains = Callable[[Sequence[Vm], Sequence[Domain]], Links]
"""Blocking: it looks where symlinks lead."""


def link(vms: Sequence[Vm], domains: Iterable[Domain], *, paths: DatastorePaths) -> Links:
    """Whose files each domain's disks and NVRAM are.  What cannot be looked at is no link."""
    owners_of = _Owners(vms)
    by_vm: dict[VmId, dict[str, Domain]] = {}
    by_domain: dict[str, tuple[VmId, ...]] = {}
    for domain in sorted(domains, key=lambda domain: domain.name):
        found: dict[VmId, None] = {}
        for path in domain.paths:
            with suppress(OSError, ValueError):
                found.update(dict.fromkeys(owners_of(paths.locate(str(path)))))
        for vm_id in found:
            by_vm.setdefault(vm_id, {})[domain.uuid] = domain
        by_domain[domain.uuid] = tuple(found)
    return Links({vm_id: tuple(each.values()) for vm_id, each in by_vm.items()}, by_domain)


class _Owners:
    """Whose a path in the backing directory is: of the VMs that have the file, or of the directory around it."""

    def __init__(self, vms: Sequence[Vm]) -> None:
        of_ino: dict[int, list[VmId]] = {}
        for vm in vms:
            for file in vm.files:
                of_ino.setdefault(file.ino, []).append(vm.id)
        self._files = {file.path: [vm.id, *of_ino[file.ino]] for vm in vms for file in vm.files}
        self._tops = {vm.path: [vm.id] for vm in vms if vm.is_directory}

    def __call__(self, place: str) -> list[VmId]:
        return self._files.get(place) or self._tops.get(place.partition("/")[0], [])
