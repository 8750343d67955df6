"""What `doctor` looks at of libvirt: whether it answers, and whether its domains are such that they can be archived."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vmfs_stub.cli.host_checks import HostFinding
from vmfs_stub.core.errors import HypervisorAway, PrimaryIOError, VmfsStubError
from vmfs_stub.core.names import printable
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.libvirt_hypervisor import LibvirtSettings, is_there, look_at_domains
from vmfs_stub.services.managed_save import ManagedSave

if TYPE_CHECKING:
    from vmfs_stub.config import Config, LibvirtConfig
    from vmfs_stub.inventory.domain import Domain


def is_used(settings: LibvirtConfig) -> bool:
    """Whether libvirt is asked on this host: where it is enabled, or left to be found and there."""
    return settings.enabled is True or (settings.enabled == "auto" and is_there(settings.uri))


def check_libvirt(config: Config) -> Iterator[HostFinding]:
    """libvirt, where this host has it, and whether its domains are such that they can be archived."""
    wanted = config.libvirt
    if not is_used(wanted):
        yield _not_used() if wanted.enabled is False else _not_found(config)
        return
    mountpoint = config.datastore.mountpoint
    try:
        domains = look_at_domains(LibvirtSettings(wanted.uri, wanted.timeout_s))
    except HypervisorAway as exc:
        yield HostFinding("problem", "libvirt", str(exc), "start libvirtd, or correct [libvirt]")
        return
    paths = DatastorePaths(files=PLAIN, backing=config.datastore.backing, mountpoint=mountpoint)
    is_here = partial(_leads_here, paths, mountpoint)
    linked = [domain for domain in domains if any(map(is_here, domain.paths))]
    text = f"{wanted.uri} answers; {len(linked)} of {len(domains)} domains have disks on the mount"
    yield HostFinding("ok", "libvirt", text)
    for domain in linked:
        yield from _domain(domain, config, is_here)
    yield _managed_save(config)


def _not_used(why: str = "[libvirt] enabled is false") -> HostFinding:
    return HostFinding("note", "libvirt", f"not used: {why}", "none, if no VM here is run by it")


def _not_found(config: Config) -> HostFinding:
    """Nothing is there; a daemon that runs knows whether something was."""
    from vmfs_stub.cli.context import client_of

    with suppress(VmfsStubError):
        known = client_of(config).status().libvirt
        if known is not None and not known.connected:
            message = f"the daemon does not reach {known.uri}: {known.last_error}"
            return HostFinding("problem", "libvirt", message, "start libvirtd, or correct [libvirt]")
    return _not_used("no socket, or vmfs-stub[libvirt] is missing")


def _leads_here(paths: DatastorePaths, mountpoint: Path, path: Path) -> bool:
    """Whether a path of a domain leads to the mount, also through links; asks nothing of the mount."""
    try:
        return not paths.locate(str(path)).startswith("/")
    except (OSError, ValueError):
        return path.is_relative_to(mountpoint)


def _domain(domain: Domain, config: Config, is_here: Callable[[Path], bool]) -> Iterator[HostFinding]:
    for problem in domain.problems:
        message = f"domain {domain.name} cannot be archived: {problem}"
        yield HostFinding("note", "libvirt", message, "none, if it need not be")
    disks = [disk for disk in domain.disks if disk.lacks_stop and disk.path is not None and is_here(disk.path)]
    if disks:
        named = ", ".join(disk.target for disk in disks)
        waived = "" if config.libvirt.require_stop_on_error else " (archived all the same, as [libvirt] says)"
        yield HostFinding(
            "note" if waived else "warning",
            "libvirt",
            f"domain {domain.name}: {named} would show the guest an error when a recall fails{waived}",
            f"virsh edit {shlex.quote(domain.name)}, and in the <disk> of {named}: "
            "<driver … error_policy='stop' rerror_policy='stop'/>; it counts from the guest's next start",
        )


def _managed_save(config: Config) -> HostFinding:
    """Whether the memory of guests can be archived with their disks, as jobs will find it."""
    save_dir, mountpoint = config.libvirt.save_dir, config.datastore.mountpoint
    try:
        managed_save = ManagedSave.at(save_dir, backing=config.datastore.backing, mountpoint=mountpoint)
    except PrimaryIOError as exc:
        return HostFinding("note", "managed save", f"where {save_dir} leads cannot be told: {exc}", "be root")
    if managed_save.memory_dir is not None:
        return HostFinding("ok", "managed save", f"{save_dir} lies on the mount")
    if managed_save.is_on_mount:
        return HostFinding(
            "note",
            "managed save",
            f"{save_dir} leads to {printable(managed_save.place) or 'the top'} on the mount, which is not for memory "
            "alone: at most guests whose VM that is are saved in order to be archived",
            f"none; or have it lead to a directory at the top of {mountpoint} that has nothing else",
        )
    return HostFinding(
        "note",
        "managed save",
        f"{save_dir} does not lie on the mount: guests that run are not saved in order to be archived",
        f"none; or, to have that: with no guest saved, stop libvirtd, move {save_dir} to a directory in {mountpoint}, "
        "leave a symbolic link to it at the old path, `vmfs-stub unmount` and mount again, so that the daemon knows of "
        "it, and have libvirtd start after the mount, as it does not without",
    )
