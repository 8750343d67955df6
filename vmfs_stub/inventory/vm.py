"""What a VM is to the rest of the program, whoever found it.

A VM's identity is its id; its name may change and may be shared.  Paths are relative to the backing directory and
may hold surrogate escapes (names are bytes); ``name`` is always printable.  Must not know how VMs are found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmfs_stub.core.errors import AmbiguousName, VmfsStubError, VmNotFound
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.identity import Group


@dataclass(frozen=True, slots=True)
class VmFile:
    """One regular file of a VM.

    ``path`` is relative to the backing directory, ``relative`` to the VM's top directory (for a VM that is one file
    it is the file's name); ``size`` is in bytes; ``ino`` is what the file was when it was found.
    """

    path: str
    relative: str
    size: int
    ino: int


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM; ``path`` is its top directory or its first file, relative to the backing directory.

    A VM that is no directory is one file at the top, or several that a domain has together (`identity.Group`).
    ``is_protected``: an operator has said that it is never to be archived.
    """

    id: VmId
    name: str
    path: str
    is_directory: bool
    files: tuple[VmFile, ...]
    group: Group | None = None
    is_protected: bool = False

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files)

    @property
    def tops(self) -> tuple[str, ...]:
        """Its entries at the top of the backing directory; the memory of its guest, which comes and goes, is none."""
        return (self.path,) if self.is_directory else tuple(file.path for file in self.files if "/" not in file.path)

    @property
    def is_called(self) -> frozenset[str]:
        """All that it answers to."""
        return frozenset({self.name, self.entry, *(() if self.is_directory else map(printable, self.tops))})

    @property
    def entry(self) -> str:
        """How to name this VM, and no other, on the command line."""
        return f"{printable(self.path)}/" if self.is_directory else printable(self.path)


@dataclass(frozen=True, slots=True)
class UnreadVm:
    """Something that should be a VM and cannot be read; ``error`` says why, and names it."""

    name: str
    path: str
    error: VmfsStubError

    @property
    def is_called(self) -> frozenset[str]:
        """All that it answers to."""
        shown = printable(self.path)
        return frozenset({self.name, shown, f"{shown}/"})


@dataclass(frozen=True, slots=True)
class Scan:
    """What an inventory found: ``vms`` by name, and what it could not read, which hides no other VM."""

    vms: tuple[Vm, ...]
    unread: tuple[UnreadVm, ...] = ()

    def find(self, name: str) -> Vm:
        """The VM of that name, id, or entry in the backing directory.

        Raises VmNotFound, AmbiguousName with the candidates when several VMs answer to ``name``, and why it cannot be
        read when it is one of those.
        """
        found = self._find(name)
        if isinstance(found, UnreadVm):
            raise found.error
        return found

    def named(self, names: Iterable[str]) -> Scan:
        """The VMs of these names, each once and in their order, with those that cannot be read; else as `find`."""
        found = {each.path: each for each in map(self._find, names)}.values()
        vms = [each for each in found if isinstance(each, Vm)]
        return Scan(tuple(vms), tuple(each for each in found if isinstance(each, UnreadVm)))

    def _find(self, name: str) -> Vm | UnreadVm:
        found = [vm for vm in self.vms if vm.id == name]
        unread = []
        if not found:
            found = [vm for vm in self.vms if name in vm.is_called]
            unread = [vm for vm in self.unread if name in vm.is_called]
        if len(found) + len(unread) > 1:
            candidates = [f"{vm.entry} (id {vm.id})" for vm in found] + [printable(vm.path) for vm in unread]
            raise AmbiguousName(f"{name!r} is the name of {len(candidates)} VMs; name one of: {', '.join(candidates)}")
        if not (found or unread):
            raise VmNotFound(f"no VM is called {name!r}; `vmfs-stub ls` lists them")
        return found[0] if found else unread[0]
