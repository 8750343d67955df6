"""One table from the failures of vmfs-stub to the errno that a program sees through the mount.

Absent or damaged data is always EIO: never ENOENT, which a program takes for "there is none".
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from vmfs_stub.core import errors

ERRNO_BY_TYPE: Final[Mapping[type[errors.VmfsStubError], int]] = MappingProxyType(
    {
        errors.ConfigError: errno.EINVAL,
        errors.VmNotFound: errno.ENOENT,
        errors.AmbiguousName: errno.EINVAL,
        errors.PointNotFound: errno.EIO,
        errors.InUse: errno.EBUSY,
        errors.Abandoned: errno.EBUSY,
        errors.RecallsHeld: errno.EBUSY,
        errors.Protected: errno.EBUSY,
        errors.PointPinned: errno.EBUSY,
        errors.ClaimedElsewhere: errno.EIO,
        errors.DatastoreLocked: errno.EBUSY,
        errors.OtherDatastore: errno.EBUSY,
        errors.AlreadyExists: errno.EEXIST,
        errors.Unsupported: errno.EOPNOTSUPP,
        errors.StoreError: errno.EIO,
        errors.StoreKeyError: errno.EIO,
        errors.IntegrityError: errno.EIO,
        errors.UnknownFormat: errno.EIO,
        errors.RecallError: errno.EIO,
        errors.PrimaryError: errno.EIO,
        errors.NoSpace: errno.ENOSPC,
        errors.HypervisorAway: errno.EIO,
        errors.MoverLost: errno.EIO,
        errors.DaemonUnreachable: errno.EIO,
    }
)
"""A leaf without an entry has that of its nearest ancestor; a test asserts that every leaf has one."""

_DATA_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL})
"""What a read, write or sync may fail with besides EIO: a file call's ENOENT or EBADF would mislead the guest."""


def errno_of(failure: BaseException) -> int | None:
    """The errno for ``failure``, or None when it is not a failure that the design knows: a programming error."""
    if isinstance(failure, errors.PrimaryIOError) and isinstance(failure.__cause__, OSError):
        return data_errno(failure.__cause__.errno or errno.EIO)
    if isinstance(failure, errors.VmfsStubError):
        return next((ERRNO_BY_TYPE[kind] for kind in type(failure).__mro__ if kind in ERRNO_BY_TYPE), None)
    if isinstance(failure, OSError):
        return failure.errno or errno.EIO
    if isinstance(failure, BaseExceptionGroup):
        found = {errno_of(each) for each in failure.exceptions}
        return found.pop() if len(found) == 1 else None
    return None


def data_errno(code: int) -> int:
    """What a failed data operation reports for a file call's errno."""
    return code if code in _DATA_ERRNOS else errno.EIO
