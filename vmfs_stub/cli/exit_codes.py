"""What the exit code of each command means; scripts depend on these numbers.

    0    done
    1    failed, in a way that none of the others describes
    2    usage or configuration: nothing was tried
    3    no such VM, restore point or job, or a name that several VMs have
    4    refused: in use, held, protected, locked, claimed by another host, needed by a placeholder, exists already, or
         not supported here
    5    secondary storage: not there, another one, denied, full, or an object is missing
    6    damaged data was found; it was not used
    7    no daemon answers
    8    unhealthy: `status` or `doctor` found a problem
    9    the backing filesystem, or the directory that `restore` writes to, has no room
    10   a recall did not finish in time
    11   written by a newer version, or not by vmfs-stub
    12   the backing filesystem, or the directory that `restore` writes to, failed
    13   the daemon's data mover ended in the middle of the job: run it again
    14   the store is encrypted, and no key was given, or not one of its own
    15   the hypervisor does not answer, or refused what was asked of it
    130  interrupted

An error has the code of its nearest ancestor in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from vmfs_stub.core import errors


class ExitCode(IntEnum):
    """The codes, by name."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    STORE = 5
    INTEGRITY = 6
    UNREACHABLE = 7
    UNHEALTHY = 8
    NO_SPACE = 9
    RECALL = 10
    UNKNOWN_FORMAT = 11
    PRIMARY = 12
    MOVER = 13
    KEY = 14
    HYPERVISOR = 15
    INTERRUPTED = 130


EXIT_CODE_BY_TYPE: Mapping[type[errors.VmfsStubError], ExitCode] = MappingProxyType(
    {
        errors.VmfsStubError: ExitCode.FAILED,
        errors.ConfigError: ExitCode.USAGE,
        errors.NotFound: ExitCode.NOT_FOUND,
        errors.Refused: ExitCode.REFUSED,
        errors.StoreError: ExitCode.STORE,
        errors.StoreKeyError: ExitCode.KEY,
        errors.IntegrityError: ExitCode.INTEGRITY,
        errors.UnknownFormat: ExitCode.UNKNOWN_FORMAT,
        errors.RecallError: ExitCode.RECALL,
        errors.PrimaryError: ExitCode.PRIMARY,
        errors.NoSpace: ExitCode.NO_SPACE,
        errors.HypervisorAway: ExitCode.HYPERVISOR,
        errors.MoverLost: ExitCode.MOVER,
        errors.DaemonUnreachable: ExitCode.UNREACHABLE,
    }
)


def exit_code_of(error: errors.VmfsStubError) -> ExitCode:
    """The code with which a command that failed so ends."""
    return next(EXIT_CODE_BY_TYPE[kind] for kind in type(error).__mro__ if kind in EXIT_CODE_BY_TYPE)
