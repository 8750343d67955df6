"""Going on with what a crash or the last end left: ended placeholders, releasing space, graduation, hydration."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.recovery import Recovered

log = logging.getLogger(__name__)


async def resume(recovered: Recovered, backing: Path, services: DiskServices) -> None:
    """Finish what can be finished; what fails is logged, and found again at the next start."""
    for ended in recovered.ended:
        await services.ender.end(ended)
    try:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        backing_fd = services.files.call("resume.open", os.open, backing, flags)
    except OSError as exc:
        log.warning("%s cannot be opened (%s): what the last run left unfinished waits", backing, exc.strerror)
        return
    try:
        for path in dict.fromkeys([*recovered.punch, *recovered.graduate, *recovered.hydrate]):
            try:
                await _resume_disk(path, backing_fd, recovered, services)
            except (VmfsStubError, OSError) as exc:
                log.warning(
                    "%s: what the last run left unfinished could not be finished; the next start tries again: %s",
                    disk_label(path),
                    exc,
                )
    finally:
        os.close(backing_fd)


async def _resume_disk(path: str, backing_fd: int, recovered: Recovered, services: DiskServices) -> None:
    path_fd = services.files.call("resume.open", open_beneath, backing_fd, path)
    try:
        # Opening and closing graduates what is wholly resident.
        disk = await services.disks.keep(path_fd)
        try:
            if path in recovered.punch and disk.placeholder is not None:
                await disk.placeholder.punch_absent()
        finally:
            await services.disks.let_go(disk)
        if path in recovered.hydrate:
            await services.hydration.resume(path_fd)
    finally:
        os.close(path_fd)
