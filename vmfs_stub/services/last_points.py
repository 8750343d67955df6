"""The restore points that files were last copied to: what a new one takes over from them, and how it replaces them.

Whatever is wrong with a last point, the backup goes on without it: then everything is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import StoreDenied, StoreUnavailable, VmfsStubError
from vmfs_stub.core.ids import PackId, PointId
from vmfs_stub.core.origin import Origin
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.origin import open_table
from vmfs_stub.services.sources import Source
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


class LastPoints:
    """For files that are reserved, so that nobody changes them meanwhile, or that are kept as they were."""

    def __init__(self, *, threads: Threads, store: Store) -> None:
        self._threads = threads
        self._store = store

    async def changed(self, sources: Sequence[Source]) -> list[Changed | None]:
        """What may have changed of each since its last point; None where all of it has to be read.

        Raises StoreUnavailable, StoreDenied.
        """
        # An archive gives up the only other copy of what it takes over: it wants to be certain.
        return await self._all_changed([(source.disk, source.placeholder_id is not None) for source in sources])

    async def changed_in_use(self, disks: Sequence[Disk]) -> list[Changed | None]:
        """The same of disks that guests may be changing: perhaps more than had changed when this was called."""
        return await self._all_changed([(disk, False) for disk in disks])

    async def _all_changed(self, disks: Sequence[tuple[Disk, bool]]) -> list[Changed | None]:
        quarantined = await self._threads.background(quarantined_packs, self._store.objects) if disks else frozenset()
        return [await self._changed(disk, quarantined, exact=exact) for disk, exact in disks]

    async def _changed(self, disk: Disk, quarantined: frozenset[PackId], *, exact: bool) -> Changed | None:
        try:
            changed = await self._threads.files(disk.changes.since_last_point, exact=exact)
            if changed is not None:
                table = await self._threads.background(open_table, self._store, changed.origin)
                if await self._threads.background(table.refers_to, quarantined):
                    # Read as a whole, what is resident is stored afresh: dedup does not hand those packs out either.
                    log.info("%s: is read as a whole, since its last restore point is damaged in the store", disk.label)
                    return None
        except (StoreUnavailable, StoreDenied):
            raise
        except (VmfsStubError, OSError) as exc:
            log.info("%s: is read as a whole, since its last restore point cannot be used: %s", disk.label, exc)
            return None
        return changed

    async def forget(self, sources: Sequence[Source]) -> None:
        """These points are of no use: the next backups read everything."""
        for source in sources:
            await self.forget_disk(source.disk)

    async def forget_disk(self, disk: Disk) -> None:
        """The last point of this disk is of no use."""
        try:
            await disk.changes.forget_in_turn()
        except OSError as exc:
            log.warning("%s: what is known of it cannot be removed: %s", disk.label, exc.strerror)

    async def replace(self, vm: Vm, sources: Sequence[Source], point_id: PointId, *, first_file: int) -> None:
        """A restore point that holds the files, from number ``first_file`` on, is committed."""
        for number, source in enumerate(sources, start=first_file):
            disk = source.disk
            if source.reservation.is_intact:
                size = source.st.st_size
                origin = Origin(self._store.id, vm.id, point_id, number, size, self._store.chunk_size)
                # What was recalled for the copy has changed the times of a placeholder, and nothing that it says.
                st = source.st if disk.placeholder is None else disk.fstat()
                await self._threads.files(disk.changes.rebase, origin, st)
