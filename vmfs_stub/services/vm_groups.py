"""Makes one VM of the files at the top that are disks or NVRAM of one domain, and of the bases that only it uses.

An external snapshot puts an overlay beside the disk: both are one VM, which only together is of any use.  That is
written on each file (`inventory/identity.py`), so that it is known when libvirt is away, and until libvirt says
otherwise.  The group has the id of the file that was there first, whose restore points go on, unless a file that stays
outside has the same; those that another file had by itself stay in the store under its former id.  Nothing is changed
of a domain of which a file is a placeholder or in a job: its claim, pins and restore points name the id.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.chains import Chains
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.identity import Group, new_vm_id, read_identity, write_vm_id
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Marking:
    """What is to be written on a file; ``vm_id`` is None for one that gets an id of its own."""

    file: VmFile
    vm_id: VmId | None
    group: Group | None


@dataclass(frozen=True, slots=True)
class Regrouping:
    """What is to be marked for one domain; ``vms`` are those that it changes."""

    domain: str
    markings: Sequence[Marking]
    vms: Sequence[Vm]


class VmGroups:
    """Groups the files of one datastore."""

    def __init__(self, *, files: FileCalls, threads: Threads, disks: Disks, backing: Path) -> None:
        self._files = files
        self._threads = threads
        self._disks = disks
        self._backing = backing

    async def regroup(self, vms: Sequence[Vm], domains: Sequence[Domain], chains: Chains) -> bool:
        """Mark files as ``domains`` say that they belong together; whether anything changed, and a scan sees it.

        What cannot be changed now is logged, and left as it is.
        """
        changed = False
        for wanted in wanted_regroupings(vms, domains, chains):
            name, inos = printable(wanted.domain), {file.ino for vm in wanted.vms for file in vm.files}
            if any(self._disks.placeholders.get(ino) is not None or self._disks.is_reserved(ino) for ino in inos):
                log.info("the files of %s stay the VMs that they are while one is archived or in a job", name)
                continue
            try:
                changed |= await self._threads.files(self._mark, wanted.markings)
            except (OSError, VmfsStubError) as exc:
                log.warning("the files of %s could not all be marked as one VM: %s", name, exc)
                changed = True
        return changed

    def _mark(self, markings: Sequence[Marking]) -> bool:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        backing = self._files.call("group.backing", os.open, self._backing, flags)
        try:
            changed = [self._mark_one(backing, marking) for marking in markings]  # all of them, whatever the first says
            return True in changed
        finally:
            os.close(backing)

    def _mark_one(self, backing: int, marking: Marking) -> bool:
        path_fd = self._files.call("group.look", open_beneath, backing, marking.file.path)
        try:
            known = read_identity(path_fd, files=self._files)
            is_meant = known is not None and os.fstat(path_fd).st_ino == marking.file.ino
            if not is_meant or (known is not None and (known.vm_id, known.group) == (marking.vm_id, marking.group)):
                return False
            write_vm_id(path_fd, marking.vm_id or new_vm_id(), group=marking.group, files=self._files)
            return True
        finally:
            os.close(path_fd)


def wanted_regroupings(vms: Sequence[Vm], domains: Sequence[Domain], chains: Chains) -> list[Regrouping]:
    """What has to be marked so that each domain's own files at the top are one VM, and nothing else.

    Pure, but for new ids.  Where it cannot be told what an image is based on, all that has to do with its domain stays
    as it is.
    """
    at_top = {file.path: (vm, file) for vm in vms for file in vm.files if file.path in vm.tops and not vm.is_directory}
    wanted: list[Regrouping] = []
    right: set[str] = set()
    sure: set[str] = set()
    for domain, own, reached in _own_places(domains, chains):
        unsure = {place for place in reached if place in chains.problems}
        grouped = [vm for vm in vms if vm.group is not None and vm.group.domain == domain.uuid]
        if unsure or any(chains.place(file) in chains.problems for vm in grouped for file in vm.files):
            continue
        sure.add(domain.uuid)
        members = [at_top[place] for place in own if place in at_top]
        is_grouped = any(vm in grouped for vm, _ in members)
        if len({file.ino for _, file in members}) < 2 and not is_grouped:
            continue
        right.update(file.path for _, file in members)
        group = Group(domain.name, domain.uuid)
        counts = Counter(vm.id for vm, _ in members if vm in grouped)
        vm_id = counts.most_common(1)[0][0] if counts else _free_id(members, chains)
        if any(vm.id != vm_id or vm.group != group for vm, _ in members):
            # Those that have the id first: a crash in between leaves no file outside the group with the group's id.
            markings = [
                Marking(file, vm_id, group) for vm, file in sorted(members, key=lambda member: member[0].id != vm_id)
            ]
            wanted.append(Regrouping(domain.name, markings, [vm for vm, _ in members]))
    for path, (vm, file) in at_top.items():
        # Of a domain that is not known now nobody says that the file is not its any more.
        if vm.group is not None and vm.group.domain in sure and path not in right:
            wanted.append(Regrouping(vm.group.name, [Marking(file, None, None)], [vm]))
    return wanted


def _free_id(members: Sequence[tuple[Vm, VmFile]], chains: Chains) -> VmId:
    """The id for a new group: of the file that was there first, unless files that stay outside have the same."""
    places = {file.path for _, file in members}
    vms = [_first_file(members, chains), *(vm for vm, _ in members)]
    return next((vm.id for vm in vms if places.issuperset(vm.tops)), None) or new_vm_id()


def _own_places(domains: Sequence[Domain], chains: Chains) -> list[tuple[Domain, list[str], Collection[str]]]:
    """Of each domain the places that nobody else uses, its disks, each followed by what it is based on; and all."""
    reached = [(domain, _reached(domain, chains)) for domain in domains]
    users = Counter(place for _, places in reached for place in places)
    return [
        (
            domain,
            [
                place
                for place, is_own in places.items()
                if is_own and users[place] == 1 and set(chains.overlays.get(place, ())) <= places.keys()
            ],
            places.keys(),
        )
        for domain, places in reached
    ]


def _reached(domain: Domain, chains: Chains) -> dict[str, bool]:
    """The places of a domain's disks, and of all that they are based on; whether by way of one that it may write."""
    disks = [
        (use.disk.is_read_only, use.disk.device != "disk", use.disk.target, place)
        for place, several in chains.uses.items()
        for use in several
        if use.domain.uuid == domain.uuid
    ]
    found: dict[str, bool] = {}
    todo = [(place, not is_read_only) for is_read_only, _, _, place in sorted(disks)]
    while todo:
        place, is_own = todo.pop(0)
        if place not in found:
            found[place] = is_own
            todo[:0] = [(base, is_own) for base in sorted(chains.bases.get(place, ()))]
    return found


def _first_file(members: Sequence[tuple[Vm, VmFile]], chains: Chains) -> Vm:
    """The VM of the file that was there first: the last base of the first disk."""
    by_place = {chains.place(file): vm for vm, file in members}
    place = next(iter(by_place))
    seen = {place}
    while bases := [base for base in sorted(chains.bases.get(place, ())) if base in by_place.keys() - seen]:
        place = bases[0]
        seen.add(place)
    return by_place[place]
