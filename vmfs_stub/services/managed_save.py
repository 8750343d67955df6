"""Where the memory of a guest goes that the hypervisor saves, and whether that is a part of its VM.

A saved guest can only go on where its memory is, so that the memory image has to be archived with the disks: it has to
lie on the mount, and to be one of the VM's files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmfs_stub.core.names import printable
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm


def lies_in_vm(vm: Vm, path: PurePosixPath) -> bool:
    """Whether a file at ``path``, from the backing directory, is the VM's because it lies in its directory."""
    return vm.is_directory and path.is_relative_to(vm.path)


@dataclass(frozen=True, slots=True)
class ManagedSave:
    """``save_dir`` is where the hypervisor puts memory images, with symbolic links followed.

    ``is_of_vm`` says whether a path, from the backing directory, would be one of the VM's files.
    """

    save_dir: Path
    mountpoint: Path
    is_of_vm: Callable[[Vm, PurePosixPath], bool] = lies_in_vm

    def image(self, domain: Domain) -> PurePosixPath | None:
        """The domain's memory image, from the backing directory; None when it is not on the mount."""
        path = self.save_dir / f"{domain.name}.save"
        return PurePosixPath(path.relative_to(self.mountpoint)) if path.is_relative_to(self.mountpoint) else None

    def problem(self, vm: Vm, domain: Domain) -> str:
        """Why the guest's memory cannot be archived with its disks, and what to do; empty when it can."""
        image = self.image(domain)
        if image is None:
            return (
                f"the hypervisor's save directory {self.save_dir} is not on the mount {self.mountpoint}: make it a "
                "symbolic link to a directory there, or let the rule shut guests down"
            )
        if not self.is_of_vm(vm, image):
            return f"its memory image would be {printable(str(image))}, which is no file of VM {vm.name}"
        return ""

    def has_image(self, vm: Vm, domain: Domain) -> bool:
        """Whether the image is among the VM's files, as they were just found."""
        return str(self.image(domain)) in {file.path for file in vm.files}
