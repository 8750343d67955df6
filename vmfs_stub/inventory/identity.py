"""Who a file or directory of the backing directory is: a UUID in an xattr that a rename keeps and a copy loses.

The record names the inode that it was made for (number, and generation as the kernel's file handle shows it).  A
copy carries the same record on another inode, and is given an id of its own.  Works on O_PATH descriptors only: an
ordinary open would break the lease that an archive in progress holds.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from vmfs_stub.core.errors import PrimaryIOError, Unsupported
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import VM_XATTR
from vmfs_stub.core.sites import PLAIN, FileCalls

_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_SZ = 128
_ID = re.compile(r"[0-9a-f]{32}")


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_SZ),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def new_vm_id() -> VmId:
    """A fresh random id."""
    return VmId(uuid.uuid4().hex)


def generation(path_fd: int) -> str:
    """What tells this inode from an earlier one of the same number; "" where the filesystem cannot say.

    ``path_fd`` may be O_PATH.  The value is the file handle in hexadecimal (name_to_handle_at(2)); it is compared,
    never taken apart.
    """
    handle = _FileHandle(handle_bytes=_MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(path_fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), _AT_EMPTY_PATH) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW, errno.EPERM):
            return ""
        raise PrimaryIOError(f"cannot read the file handle of a backing file: {os.strerror(code)}")
    return f"{handle.handle_type:x}:{bytes(handle.f_handle[: handle.handle_bytes]).hex()}"


@dataclass(frozen=True, slots=True)
class Group:
    """The VM that several files at the top are together: ``name`` and UUID (32 hex digits) of their domain."""

    name: str
    domain: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose a file or directory is; all files of a group have the id of the group."""

    vm_id: VmId
    group: Group | None = None


def read_identity(path_fd: int, *, files: FileCalls = PLAIN) -> Identity | None:
    """What is recorded for this very inode; None when there is nothing, it is damaged, or it came with a copy."""
    try:
        raw = files.call("inventory.identity", os.getxattr, f"/proc/self/fd/{path_fd}", VM_XATTR)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return None
        if exc.errno == errno.EOPNOTSUPP:
            raise Unsupported(_NO_XATTRS) from exc
        raise PrimaryIOError(f"cannot read its identity, the attribute {VM_XATTR}: {exc.strerror}") from exc
    try:
        record = json.loads(raw)
        vm, ino, made_for = record["vm"], record["ino"], record["generation"]
        group, domain = record.get("group"), record.get("domain")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(vm, str) or _ID.fullmatch(vm) is None:
        return None
    if ino != os.fstat(path_fd).st_ino or made_for != generation(path_fd):
        return None
    is_group = isinstance(group, str) and group and isinstance(domain, str) and _ID.fullmatch(domain) is not None
    return Identity(VmId(vm), Group(group, domain) if is_group else None)


def read_vm_id(path_fd: int, *, files: FileCalls = PLAIN) -> VmId | None:
    """The id recorded for this very inode; None as for `read_identity`."""
    identity = read_identity(path_fd, files=files)
    return None if identity is None else identity.vm_id


def write_vm_id(path_fd: int, vm_id: VmId, *, group: Group | None = None, files: FileCalls = PLAIN) -> None:
    """Record ``vm_id`` for this inode, as one of a ``group``; raises Unsupported and PrimaryIOError."""
    record = {"vm": vm_id, "ino": os.fstat(path_fd).st_ino, "generation": generation(path_fd)}
    if group is not None:
        record.update(group=group.name, domain=group.domain)
    try:
        raw = json.dumps(record).encode("ascii")
        files.call("inventory.identify", os.setxattr, f"/proc/self/fd/{path_fd}", VM_XATTR, raw)
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EPERM):
            raise Unsupported(_NO_XATTRS) from exc
        raise PrimaryIOError(f"cannot write its identity, the attribute {VM_XATTR}: {exc.strerror}") from exc


def ensure_identity(path_fd: int, make_id: Callable[[], VmId] = new_vm_id, *, files: FileCalls = PLAIN) -> Identity:
    """The identity of this inode, made and recorded when it has none of its own.

    Callers serialise this for one inode; only the daemon calls it.
    """
    known = read_identity(path_fd, files=files)
    if known is not None:
        return known
    vm_id = make_id()
    write_vm_id(path_fd, vm_id, files=files)
    return Identity(vm_id)


_NO_XATTRS = (
    f"cannot set {VM_XATTR}: trusted.* attributes need root (CAP_SYS_ADMIN) and a filesystem that has them, "
    "such as ext4, XFS or Btrfs; run `vmfs-stub doctor`"
)
