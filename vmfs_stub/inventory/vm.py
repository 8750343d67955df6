"""What a VM is to the rest of the program, whoever found it.

A VM's identity is its id; its name may change and may be shared.  Paths are relative to the backing directory and
may hold surrogate escapes (names are bytes); ``name`` is always printable.  Must not know how VMs are found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from vmfs_stub.core.errors import AmbiguousName, VmNotFound
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable


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
    """One VM; ``path`` is its top directory or its only file, relative to the backing directory."""

    id: VmId
    name: str
    path: str
    is_directory: bool
    files: tuple[VmFile, ...]

    @property
    def entry(self) -> str:
        """How to name this VM, and no other, on the command line."""
        return f"{printable(self.path)}/" if self.is_directory else printable(self.path)


class Inventory(Protocol):
    """Finds VMs; blocking, thread-safe."""

    def scan(self) -> list[Vm]:
        """All VMs, by name; raises PrimaryIOError."""
        ...


def find_vm(vms: Iterable[Vm], name: str) -> Vm:
    """The VM of that name, id, or entry in the backing directory.

    Raises VmNotFound, and AmbiguousName with the candidates when several VMs answer to ``name``.
    """
    vms = list(vms)
    found = [vm for vm in vms if vm.id == name] or [vm for vm in vms if name in (vm.name, vm.entry)]
    if not found:
        raise VmNotFound(f"no VM is called {name!r}; `vmfs-stub ls` lists them")
    if len(found) > 1:
        candidates = ", ".join(f"{vm.entry} (id {vm.id})" for vm in found)
        raise AmbiguousName(f"{name!r} is the name of {len(found)} VMs; name one of: {candidates}")
    return found[0]
