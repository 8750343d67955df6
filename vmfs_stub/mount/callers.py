"""Who made a request: the process behind it, for the catalog and for set-id rules.

Reads procfs only, which never sleeps on a disk, so it may run on the event loop.  The caller waits in its request
meanwhile, so its pid cannot be another process's.
"""

from __future__ import annotations

from pathlib import Path

from vmfs_stub.mount.attributes import Requester
from vmfs_stub.services.disk import Caller


def identify(*, pid: int, uid: int) -> Caller:
    """Look up the process ``pid`` (0: a kernel thread, or a process of another pid namespace)."""
    return Caller(pid=pid, uid=uid, executable=_executable(pid), cgroup=_cgroup(pid))


def is_in_group(gid: int, requester: Requester) -> bool:
    """Whether who asked is in a group; False when its process cannot be looked up any more."""
    return gid == requester.gid or gid in groups_of(requester.pid)


def groups_of(pid: int) -> frozenset[int]:
    """Supplementary group ids of a process; empty when it cannot be looked up."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("Groups:"):
                return frozenset(int(gid) for gid in line.split()[1:])
    except (OSError, ValueError):
        pass
    return frozenset()


def _executable(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return None


def _cgroup(pid: int) -> str | None:
    """The path in the unified hierarchy, else that of systemd's named one, else the first."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = [line.split(":", 2) for line in lines]
    groups.sort(key=lambda parts: (parts[0] != "0", "systemd" not in parts[1]))
    return groups[0][2] if groups else None
