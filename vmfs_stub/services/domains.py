"""Which domain is which VM: by where the domain's images lie.

A domain names its images by paths on this host, which lead below the mountpoint, perhaps through symlinks; a VM is
known by its files in the backing directory.  Links are followed name by name, and below the mountpoint in the backing
directory instead: who asked the mount for it would wait for an answer of its own.  No image is opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm

_LINKS_MAX: Final = 40
"""As many symlinks as the kernel follows in one path."""

ReadLink = Callable[[str], str | None]
"""Where the symlink of that path leads; None for what is none, or is not there."""


@dataclass(frozen=True, slots=True)
class Links:
    """Which domains have files of which VMs."""

    domains: Mapping[VmId, tuple[Domain, ...]] = field(default_factory=dict)
    vms: Mapping[str, tuple[VmId, ...]] = field(default_factory=dict)

    def of(self, vm_id: VmId) -> tuple[Domain, ...]:
        """The domains that have a file of this VM, also as what another image is based on."""
        return self.domains.get(vm_id, ())

    def vm_of(self, uuid: str) -> tuple[VmId, ...]:
        """The VMs whose files this domain has, the one of its first disk first."""
        return self.vms.get(uuid, ())


class Domains:
    """Links domains to VMs of ``backing``; blocking."""

    def __init__(self, *, backing: Path, files: FileCalls = PLAIN) -> None:
        self._backing = str(backing)
        self._files = files

    def link(self, vms: Sequence[Vm], domains: Iterable[Domain], *, mountpoint: Path) -> Links:
        """Whose files each domain's disks, NVRAM and backing images are, where they lie below ``mountpoint``.

        What cannot be looked at is no link.
        """
        known: dict[str, str | None] = {}
        top = _resolved(mountpoint, partial(self._read_link, known))
        owner_of = _Owners(vms)
        place_of = _Places(top, self._backing, partial(self._read_link, known))
        by_vm: dict[VmId, dict[str, Domain]] = {}
        by_domain: dict[str, tuple[VmId, ...]] = {}
        for domain in domains:
            places = [place_of(path) for path in paths_of(domain)]
            found = dict.fromkeys(owner for place in places if place and (owner := owner_of(place)) is not None)
            by_domain[domain.uuid] = tuple(found)
            for vm_id in found:
                by_vm.setdefault(vm_id, {})[domain.uuid] = domain
        return Links({vm_id: tuple(each.values()) for vm_id, each in by_vm.items()}, by_domain)

    def _read_link(self, known: dict[str, str | None], path: str) -> str | None:
        if path not in known:
            try:
                known[path] = self._files.call("domains.readlink", os.readlink, path)
            except OSError:  # most are no links (EINVAL); what cannot be looked at is where it says
                known[path] = None
        return known[path]


def paths_of(domain: Domain) -> list[Path]:
    """Every file that a domain needs: its own, then those that its disks are based on."""
    return [*domain.paths, *(path for disk in domain.disks for path in disk.backing)]


class _Places:
    """Finds paths below the mountpoint, as paths relative to the backing directory."""

    def __init__(self, mountpoint: str, backing: str, read_link: ReadLink) -> None:
        self._mountpoint = mountpoint
        self._below = f"{mountpoint}/"
        self._backing = backing
        self._read_link = read_link

    def __call__(self, path: Path) -> str | None:
        """None for what does not lie there."""
        if not path.is_absolute():
            return None
        try:
            found = _resolved(path, self._link_at)
        except OSError:
            return None
        return found.removeprefix(self._below) if found.startswith(self._below) else None

    def _link_at(self, path: str) -> str | None:
        if path == self._mountpoint:
            return None
        if path.startswith(self._below):
            path = f"{self._backing}/{path.removeprefix(self._below)}"
        return self._read_link(path)


def _resolved(path: Path, link_at: ReadLink) -> str:
    """``path``, absolute, without symlinks and dots.  Raises OSError ELOOP."""
    parts, found, links = list(reversed(str(path).split("/"))), "", 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if part == "..":
            found = found.rpartition("/")[0]
            continue
        target = link_at(f"{found}/{part}")
        if target is None:
            found = f"{found}/{part}"
            continue
        links += 1
        if links > _LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        parts += reversed(target.split("/"))
        if target.startswith("/"):
            found = ""
    return found or "/"


class _Owners:
    """Whose a path in the backing directory is: of the VM that has the file, or the directory around it."""

    def __init__(self, vms: Sequence[Vm]) -> None:
        self._files = {file.path: vm.id for vm in vms for file in vm.files}
        self._tops = {vm.path: vm.id for vm in vms if vm.is_directory}

    def __call__(self, place: str) -> VmId | None:
        return self._files.get(place) or self._tops.get(place.partition("/")[0])
