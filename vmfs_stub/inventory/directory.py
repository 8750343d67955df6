"""The inventory: what lies at the top of the backing directory is a VM.

Each directory is a VM of that name with all regular files in it; each regular file is a VM named by its stem.  Files
that were marked as the disks of one domain (`services/vm_groups.py`) are one VM of the domain's name: what says so is
on the files, and needs no libvirt.
Symbolic links are not followed, other filesystems are not entered, and only O_PATH and directory descriptors are
opened, so that a scan neither wakes a placeholder nor breaks an archive's lease.  Must not know what a placeholder
is or whether a VM is running.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vmfs_stub.core.errors import PrimaryError, PrimaryIOError, Unsupported, VmfsStubError, VmNotFound
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import PRIVATE_DIR, printable
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.identity import ensure_identity, read_vm_id, write_vm_id
from vmfs_stub.inventory.protection import is_protected, set_protected
from vmfs_stub.inventory.vm import Scan, UnreadVm, Vm, VmFile

NO_VMS = frozenset({PRIVATE_DIR, "lost+found"})
"""Names at the top that are no VMs."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DEPTH_MAX = 64
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What this process or host is short of is no fault of the VM at hand."""

log = logging.getLogger(__name__)


class DirectoryInventory:
    """VMs of one backing directory; blocking, thread-safe.

    A scan gives every VM an identity, so only the daemon that serves the directory may make one.  ``memory_dir`` is no
    VM: in that directory at the top the hypervisor puts the memory of saved guests, each a file of its VM.
    """

    def __init__(self, backing: Path, *, files: FileCalls = PLAIN, memory_dir: str | None = None) -> None:
        self._backing = backing
        self._files = files
        self._memory_dir = memory_dir
        self._lock = threading.Lock()

    def scan(self) -> Scan:
        """All VMs, ordered by name; what vanishes meanwhile is left out.

        A VM that cannot be read is told of, and hides no other: its user may have seen to that.  Raises PrimaryIOError.
        """
        with self._lock, self._opened() as (top_fd, device):
            names = self._names(top_fd)
            own = [name for name in names if name not in NO_VMS and name != self._memory_dir]
            found = [self._tolerant_vm(top_fd, name, device) for name in own]
            memory = self._memory_images(top_fd, device) if self._memory_dir in names else {}
        read = [vm for vm in found if isinstance(vm, Vm)]
        together = [_with_memory(vm, memory.get(vm.id, ())) for vm in _together(read)]
        vms = sorted(together, key=lambda vm: (vm.name, vm.path))
        return Scan(tuple(vms), tuple(vm for vm in found if isinstance(vm, UnreadVm)))

    def find(self, name: str) -> Vm:
        """The VM of that name, id or entry; raises VmNotFound, AmbiguousName, PrimaryIOError."""
        return self.scan().find(name)

    def ids(self) -> frozenset[VmId]:
        """The ids of all VMs that have one; gives none, so that others than the daemon may ask, too.

        Whoever misses a VM in it takes it for deleted, so all must be certain.  Raises PrimaryIOError, Unsupported when
        no daemon has ever served this directory, something in it cannot be read or is covered by a mount, or no VM at
        all has an id.
        """
        with self._opened() as (top_fd, device):
            names = self._names(top_fd)
            if PRIVATE_DIR not in names:
                raise PrimaryIOError(
                    f"no daemon has served the backing directory {self._backing}: is what belongs there mounted?"
                )
            found = {name: self._id(top_fd, name, device) for name in names if name not in NO_VMS}
        ids = frozenset(vm_id for each in found.values() for vm_id in each if vm_id is not None)
        # As everybody without CAP_SYS_ADMIN sees it; the directory of memory has no id, unless it was a VM once.
        if not ids and any(each for name, each in found.items() if name != self._memory_dir):
            raise PrimaryIOError(
                f"which VMs are in {self._backing} cannot be told: no identity can be read; run this as root"
            )
        return ids

    def has_only(self, name: str, suffix: str) -> bool:
        """Whether a directory at the top has no entries but such that end in ``suffix``, or is not there.

        One that cannot be read has others.  Raises PrimaryIOError.
        """
        with self._opened() as (top_fd, _):
            try:
                fd = self._files.call("inventory.open", os.open, name, _DIRECTORY, dir_fd=top_fd)
            except OSError as exc:
                return exc.errno == errno.ENOENT
            try:
                return all(each.endswith(suffix) for each in self._names(fd))
            finally:
                os.close(fd)

    def give_memory(self, vm: Vm, image: str) -> None:
        """Make a memory image, by its name in ``memory_dir``, a file of this VM.  Raises PrimaryIOError, Unsupported.

        One that is not there, or is the VM's, is left as it is.
        """
        if self._memory_dir is None:
            return
        with self._lock, self._opened() as (top_fd, _), ExitStack() as stack:
            try:
                folder_fd = self._files.call("inventory.open", os.open, self._memory_dir, _DIRECTORY, dir_fd=top_fd)
                stack.callback(os.close, folder_fd)
                path_fd = self._files.call("inventory.open", os.open, image, _HANDLE, dir_fd=folder_fd)
                stack.callback(os.close, path_fd)
            except FileNotFoundError:
                return
            is_file = stat.S_ISREG(os.fstat(path_fd).st_mode)
            if is_file and read_vm_id(path_fd, files=self._files) != vm.id:
                write_vm_id(path_fd, vm.id, files=self._files)

    def _memory_images(self, top_fd: int, device: int) -> dict[VmId, list[VmFile]]:
        """Memory images by the VMs that they were given to; what cannot be read is left out, and told in the log."""
        found: dict[VmId, list[VmFile]] = {}
        assert self._memory_dir is not None
        with ExitStack() as stack:
            try:
                folder_fd = self._files.call("inventory.open", os.open, self._memory_dir, _DIRECTORY, dir_fd=top_fd)
                stack.callback(os.close, folder_fd)
                names = sorted(self._names(folder_fd))
            except OSError as exc:
                if exc.errno in _OURS:
                    raise
                log.warning("the memory of saved guests cannot be listed: %s", exc.strerror)
                return found
            for name in names:
                try:
                    vm_id, file = self._memory_image(folder_fd, name, device)
                except FileNotFoundError:
                    continue  # its guest goes on
                except (OSError, PrimaryError, Unsupported) as exc:
                    if isinstance(exc, OSError) and exc.errno in _OURS:
                        raise
                    log.warning("the memory image %s cannot be read: %s", printable(name), exc)
                    continue
                if vm_id is not None:
                    found.setdefault(vm_id, []).append(file)
        return found

    def _memory_image(self, folder_fd: int, name: str, device: int) -> tuple[VmId | None, VmFile]:
        """Whose memory an entry in ``memory_dir`` is: of nobody, where it is no file, or was not given to a VM."""
        path_fd = self._files.call("inventory.open", os.open, name, _HANDLE, dir_fd=folder_fd)
        try:
            st = os.fstat(path_fd)
            is_image = stat.S_ISREG(st.st_mode) and st.st_dev == device
            vm_id = read_vm_id(path_fd, files=self._files) if is_image else None
            return vm_id, VmFile(f"{self._memory_dir}/{name}", name, st.st_size, st.st_ino)
        finally:
            os.close(path_fd)

    def protect(self, vm: Vm, protected: bool) -> None:
        """Protect a VM that was found, or no longer; the caller syncs.  Raises VmNotFound, PrimaryIOError."""
        with self._lock, self._found(vm) as path_fds:
            for path_fd in path_fds:
                set_protected(path_fd, protected, files=self._files)

    @contextmanager
    def _found(self, vm: Vm) -> Iterator[list[int]]:
        """The VM's entries at the top (O_PATH), if they are still those that were found."""
        with self._opened() as (top_fd, _), ExitStack() as stack:
            path_fds = []
            for top in vm.tops:
                try:
                    path_fd = self._files.call("inventory.open", os.open, top, _HANDLE, dir_fd=top_fd)
                except FileNotFoundError as exc:
                    raise _moved(vm) from exc
                stack.callback(os.close, path_fd)
                if read_vm_id(path_fd, files=self._files) != vm.id:
                    raise _moved(vm)
                path_fds.append(path_fd)
            yield path_fds

    def _id(self, top_fd: int, name: str, device: int) -> list[VmId | None]:
        """The id of the VM of that name, if it is one; None when it has no id yet."""
        path_fd = self._files.call("inventory.open", os.open, name, _HANDLE, dir_fd=top_fd)
        try:
            st = os.fstat(path_fd)
            if st.st_dev != device:
                raise PrimaryIOError(
                    f"{printable(name)} in {self._backing} hides what is below it: it is mounted there"
                )
            is_vm = stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode)
            return [read_vm_id(path_fd, files=self._files)] if is_vm else []
        finally:
            os.close(path_fd)

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """Descriptor and device of the backing directory; raises PrimaryIOError for an OSError within, too."""
        try:
            top_fd = self._files.call("inventory.open", os.open, self._backing, _DIRECTORY)
        except OSError as exc:
            raise PrimaryIOError(f"cannot open the backing directory {self._backing}: {exc.strerror}") from exc
        try:
            yield top_fd, os.fstat(top_fd).st_dev
        except OSError as exc:
            raise PrimaryIOError(f"cannot read the backing directory {self._backing}: {exc}") from exc
        finally:
            os.close(top_fd)

    def _tolerant_vm(self, top_fd: int, name: str, device: int) -> Vm | UnreadVm | None:
        shown = printable(name)
        try:
            return self._vm(top_fd, name, device)
        except (PrimaryError, Unsupported) as exc:
            error: VmfsStubError = type(exc)(f"VM {shown} cannot be read: {exc}")
            error.__cause__ = exc
        except OSError as exc:
            if exc.errno in _OURS:
                raise
            error = PrimaryIOError(f"VM {shown} cannot be read: {exc.strerror}; check the backing filesystem")
            error.__cause__ = exc
        return UnreadVm(printable(PurePosixPath(name).stem), name, error)

    def _vm(self, top_fd: int, name: str, device: int) -> Vm | None:
        try:
            path_fd = self._files.call("inventory.open", os.open, name, _HANDLE, dir_fd=top_fd)
        except FileNotFoundError:
            return None
        try:
            st = os.fstat(path_fd)
            if st.st_dev != device:
                log.warning("%s is another filesystem, mounted in the backing directory: not a VM", printable(name))
                return None
            if stat.S_ISDIR(st.st_mode):
                files = sorted(self._walk(path_fd, name, "", device, _DEPTH_MAX), key=lambda file: file.relative)
                vm_id = ensure_identity(path_fd, files=self._files).vm_id
                protected = is_protected(path_fd, files=self._files)
                return Vm(vm_id, printable(name), name, True, tuple(files), is_protected=protected)
            if stat.S_ISREG(st.st_mode):
                identity, file = ensure_identity(path_fd, files=self._files), VmFile(name, name, st.st_size, st.st_ino)
                stem = printable(PurePosixPath(name).stem)
                protected = is_protected(path_fd, files=self._files)
                return Vm(identity.vm_id, stem, name, False, (file,), identity.group, is_protected=protected)
            return None
        finally:
            os.close(path_fd)

    def _names(self, fd: int) -> list[str]:
        return self._files.call("inventory.list", _list_names, fd)

    def _walk(self, parent_fd: int, path: str, relative: str, device: int, depth: int) -> Iterator[VmFile]:
        """Regular files below the directory ``parent_fd`` (O_PATH); ``path`` is its own, from the backing directory."""
        if depth == 0:
            raise PrimaryIOError(f"directories in it are nested deeper than {_DEPTH_MAX}; remove or move them")
        try:
            fd = self._files.call("inventory.open", os.open, ".", _DIRECTORY, dir_fd=parent_fd)
        except FileNotFoundError:
            return
        try:
            for name in self._names(fd):
                yield from self._entry(fd, name, f"{path}/{name}", f"{relative}{name}", device, depth)
        finally:
            os.close(fd)

    def _entry(self, fd: int, name: str, path: str, relative: str, device: int, depth: int) -> Iterator[VmFile]:
        try:
            child_fd = self._files.call("inventory.open", os.open, name, _HANDLE, dir_fd=fd)
        except FileNotFoundError:
            return
        try:
            st = os.fstat(child_fd)
            if st.st_dev != device:
                log.warning("%s is on another filesystem: not part of the VM", printable(path))
            elif stat.S_ISDIR(st.st_mode):
                yield from self._walk(child_fd, path, f"{relative}/", device, depth - 1)
            elif stat.S_ISREG(st.st_mode):
                yield VmFile(path, relative, st.st_size, st.st_ino)
        finally:
            os.close(child_fd)


def _moved(vm: Vm) -> VmNotFound:
    return VmNotFound(f"VM {vm.name} was renamed or replaced meanwhile; `vmfs-stub ls` shows how it is now")


def _with_memory(vm: Vm, images: Sequence[VmFile]) -> Vm:
    """The VM with the memory of its guest; beside a file of its own that has the same name that is left out."""
    taken = {file.relative for file in vm.files}
    return replace(vm, files=(*vm.files, *(file for file in images if file.relative not in taken))) if images else vm


def _together(vms: Sequence[Vm]) -> Iterator[Vm]:
    """The same VMs, with those that are files of one group as one; names of one file count once."""
    groups: dict[VmId, list[Vm]] = {}
    for vm in vms:
        if vm.group is None:
            yield vm
        else:
            groups.setdefault(vm.id, []).append(vm)
    for vm_id, members in groups.items():
        files = tuple(sorted((vm.files[0] for vm in members), key=lambda file: file.path))
        # Half renamed: whatever name is taken, it is the same one until the rest follows.
        group = min((vm.group for vm in members if vm.group is not None), key=lambda group: group.name)
        protected = any(vm.is_protected for vm in members)
        yield Vm(vm_id, printable(group.name), files[0].path, False, files, group, is_protected=protected)


def _list_names(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries]
