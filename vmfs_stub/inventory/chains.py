"""The graph of images: which is based on which, and what follows for a VM that is to be archived.

Pure.  An image is named by its *place*: the path below the backing directory, or an absolute one outside.  Invariants:
* an image counts as based on another one when either its head or a domain says so: a base too many stays resident for
  nothing, one too few would make a guest wait;
* a base stays while anything that is based on it, at any distance, is resident or runs.  When all of that is archived
  the base may be, too: whoever opens an overlay then recalls what it reads of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.domain import Domain, DomainDisk
from vmfs_stub.inventory.vm import Vm, VmFile


@dataclass(frozen=True, slots=True)
class DiskUse:
    """A domain, and that disk of it which an image is; its NVRAM counts as one."""

    domain: Domain
    disk: DomainDisk


@dataclass(frozen=True, slots=True)
class Chains:
    """The images of a datastore at one moment, by place.

    ``bases`` are those that an image is directly based on; ``uses`` are the domains whose disk it is; ``resident`` are
    those that are no placeholders, ``open_`` those that somebody has open.  ``problems`` say why it cannot be told, or
    should not be relied on, what an image is based on.  ``places`` gives the place of an inode.
    """

    bases: Mapping[str, Collection[str]]
    uses: Mapping[str, Sequence[DiskUse]] = field(default_factory=dict)
    resident: Collection[str] = frozenset()
    open_: Collection[str] = frozenset()
    problems: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[int, str] = field(default_factory=dict)
    overlays: Mapping[str, Sequence[str]] = field(init=False)
    in_circles: Collection[str] = field(init=False)

    def __post_init__(self) -> None:
        overlays: dict[str, list[str]] = {}
        for overlay, bases in sorted(self.bases.items()):
            for base in sorted(bases):
                overlays.setdefault(base, []).append(overlay)
        object.__setattr__(self, "overlays", overlays)
        object.__setattr__(self, "in_circles", _in_circles(self.bases, overlays))

    def place(self, file: VmFile) -> str:
        """The place of a VM's file; that of its first name, if it has several."""
        return self.places.get(file.ino, file.path)

    def never(self, vm: Vm) -> tuple[str, ...]:
        """Why a VM must not be archived as things are, as far as its images' chains say; empty when it may be."""
        own = {self.place(file) for file in vm.files}
        return tuple(reason for file in vm.files for reason in self._reasons(file, own))

    def _reasons(self, file: VmFile, own: Collection[str]) -> Iterator[str]:
        place, shown = self.place(file), printable(file.path)
        if place in self.problems:
            yield f"{shown}: {self.problems[place]}"
        if place in self.in_circles:
            yield f"{shown}: the chain of its bases runs in a circle"
        for overlay in self._above(place):
            why = "" if overlay in own else self._needs_base(overlay)
            if why:
                yield f"{shown} is the base of {printable(overlay)}, which {why}"
                return

    def _above(self, place: str) -> Iterator[str]:
        """All that is based on an image, the nearest first."""
        seen, todo = {place}, [place]
        for each in todo:
            for overlay in self.overlays.get(each, ()):
                if overlay not in seen:
                    seen.add(overlay)
                    todo.append(overlay)
                    yield overlay

    def _needs_base(self, overlay: str) -> str:
        """Why an overlay needs its bases to be resident; "" when it does not."""
        for use in self.uses.get(overlay, ()):
            if not use.domain.state.is_off:
                return f"is a disk of domain {use.domain.name}, which is not off"
        if overlay.startswith("/"):
            return "lies outside this datastore"
        if overlay in self.open_:
            return "is open"
        return "is resident" if overlay in self.resident else ""

    def are_linked(self, vms: Sequence[Vm]) -> bool:
        """Whether any of these VMs has an image that one of another is based on."""
        return any(waits - {vm_id} for vm_id, waits in self._waits(vms).items())

    def _waits(self, vms: Sequence[Vm]) -> dict[VmId, set[VmId]]:
        """Of each VM those, among these, with images that are based on its own."""
        owners = {self.place(file): vm.id for vm in vms for file in vm.files}
        return {
            vm.id: {owners[each] for file in vm.files for each in self._above(self.place(file)) if each in owners}
            for vm in vms
        }

    def in_order(self, vms: Sequence[Vm]) -> list[Vm]:
        """The same VMs, those with overlays before those with the bases; else as they come."""
        waits = self._waits(vms)
        ordered: list[Vm] = []
        todo, done = list(vms), set[VmId]()
        while todo:
            # Of two VMs that each have a base of the other neither can go first: they stay in their order.
            ready = [vm for vm in todo if waits[vm.id] <= done | {vm.id}] or todo[:1]
            ordered += ready
            done.update(vm.id for vm in ready)
            todo = [vm for vm in todo if vm.id not in done]
        return ordered


def _in_circles(bases: Mapping[str, Collection[str]], overlays: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Images that are their own base, or are based on such: what is left when all that end are taken away."""
    left = {overlay: set(each) for overlay, each in bases.items()}
    ended = [base for base in overlays if not left.get(base)]
    for base in ended:
        for overlay in overlays.get(base, ()):
            left[overlay].discard(base)
            if not left[overlay]:
                ended.append(overlay)
    return frozenset(overlay for overlay, each in left.items() if each)
