"""The sections ``[libvirt]`` and ``[usage]``: what runs VMs on this host, and how it is found out how they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vmfs_stub.config.values import AbsolutePath, Section


class LibvirtConfig(Section):
    """The hypervisor; ``enabled`` of "auto": used once its binding is installed and its socket is there.

    ``save_dir`` is where it puts the memory of guests that it saves.
    """

    enabled: bool | Literal["auto"] = "auto"
    uri: str = Field(default="qemu:///system", min_length=1, max_length=4096)
    timeout_s: float = Field(default=10, gt=0, le=600)
    require_stop_on_error: bool = True
    save_dir: AbsolutePath = Path("/var/lib/libvirt/qemu/save")


class UsageConfig(Section):
    """How it is found out how VMs are used; ``hypervisors`` are shell patterns of the names of executables.

    Only what these open and read counts as use of a disk.
    """

    interval_s: float = Field(default=300, ge=1, le=3600)
    hypervisors: tuple[str, ...] = (
        "qemu-system-*",
        "qemu-kvm",
        "qemu-storage-daemon",
        "kvm",
        "cloud-hypervisor",
        "firecracker",
        "crosvm",
        "VBoxHeadless",
        "VirtualBoxVM",
    )
