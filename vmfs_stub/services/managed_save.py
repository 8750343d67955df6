"""Where the memory of a guest goes that the hypervisor saves, and whether that is a part of its VM.

A saved guest can only go on where its memory is, so that the memory image has to be archived with the disks: it has to
lie on the mount, in its VM's directory, or in one of its own at the top whose images the inventory counts as their VMs'
(`DirectoryInventory.memory_dir`).  One at the top that has anything but memory images is a VM, which is backed up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from vmfs_stub.core.names import printable
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.datastore_paths import DatastorePaths

IMAGE_SUFFIX: Final = ".save"
"""How libvirt ends the names of memory images, after the domain's."""


@dataclass(frozen=True, slots=True)
class ManagedSave:
    """``save_dir`` is where the hypervisor puts memory images, ``mountpoint`` that of the datastore.

    ``place`` is where ``save_dir`` leads: relative to the backing directory, or absolute when that is elsewhere; empty
    when that is the mount itself, where each memory image would be a VM of its own.
    ``is_vm`` is whether it is a directory at the top that has other files, too.
    """

    save_dir: Path
    mountpoint: Path
    place: str
    is_vm: bool = False

    @classmethod
    def at(cls, save_dir: Path, *, backing: Path, mountpoint: Path, files: FileCalls = PLAIN) -> ManagedSave:
        """Of the directory that is there now; asks nothing of the mount.  Blocks.  Raises PrimaryIOError."""
        try:
            place = DatastorePaths(files=files, backing=backing, mountpoint=mountpoint).locate(str(save_dir))
        except OSError:
            place = str(save_dir)
        is_at_top = bool(place) and "/" not in place
        inventory = DirectoryInventory(backing, files=files)
        return cls(save_dir, mountpoint, place, is_vm=is_at_top and not inventory.has_only(place, IMAGE_SUFFIX))

    @property
    def is_on_mount(self) -> bool:
        """Whether memory images lie in this datastore at all."""
        return not self.place.startswith("/")

    @property
    def memory_dir(self) -> str | None:
        """The directory at the top of the backing directory that has memory images alone; None: there is none."""
        return self.place if self.place and "/" not in self.place and not self.is_vm else None

    def image(self, domain: Domain) -> PurePosixPath | None:
        """The domain's memory image, from the backing directory; None when it is not on the mount."""
        return PurePosixPath(self.place) / f"{domain.name}{IMAGE_SUFFIX}" if self.is_on_mount else None

    def problem(self, vm: Vm, domain: Domain) -> str:
        """Why the guest's memory cannot be archived with its disks, and what to do; empty when it can."""
        image = self.image(domain)
        if image is None:
            return (
                f"the hypervisor's save directory {self.save_dir} is not on the mount {self.mountpoint}, or was not "
                "when the daemon started: make it a symbolic link to a directory there, or have guests shut down"
            )
        if self.memory_dir is None and not (vm.is_directory and image.is_relative_to(vm.path)):
            return (
                f"its memory image would be {printable(str(image))}, which is no file of VM {vm.name}: have the "
                f"save directory lead to one at the top of {self.mountpoint}"
            )
        return ""

    def has_image(self, vm: Vm, domain: Domain) -> bool:
        """Whether the image is among the VM's files, as they were just found."""
        image = self.image(domain)
        return image is not None and str(image) in {file.path for file in vm.files}

    def missing(self, vm: Vm, domain: Domain) -> str:
        """What to say of a restore point of ``vm`` that lacks the memory of its saved guest; empty when it does not."""
        if domain.state is not GuestState.SAVED or self.has_image(vm, domain):
            return ""
        return (
            f"the restore point is without the memory of domain {domain.name}, which was saved to {self.save_dir}: "
            "where that is not, the guest starts as after a power failure"
        )
