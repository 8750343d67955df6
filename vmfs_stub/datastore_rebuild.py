"""What a new catalog does not know of VMs, taken from the store's manifests.

Purpose: a catalog that was lost, or is of an older version, must not make VMs look as if they had never been backed
up.  It happens beside everything else, and is tried until the store has answered.  Jobs and usage are nowhere else:
they are lost, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.core.errors import HistoryLost, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.datastore_listing import Listing
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

RETRY_INTERVAL_S: Final = 30.0
NOTED_S: Final = 86400.0
"""How long `status` notes that history was lost, after all that could be found again is."""
_SUBJECT: Final = "catalog"


class Rebuild:
    """The rebuilding of one catalog; ``was_lost`` where it had been there before."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        listing: Listing,
        threads: Threads,
        store: Store,
        findings: Findings,
        was_lost: bool,
        on_done: Callable[[], None],
    ) -> None:
        self._catalog = catalog
        self._listing = listing
        self._threads = threads
        self._store = store
        self._findings = findings
        self._was_lost = was_lost
        self._on_done = on_done
        self._done: set[VmId] = set()

    async def run(self) -> None:
        """Rebuild the catalog if that is due, as often as it takes; returns when nothing more is to be said of it."""
        if self._was_lost:
            self._tell("its facts about VMs are being taken from the store", is_over=False)
        while not await self._try():  # noqa: ASYNC110 - nothing tells when the store is back
            await trio.sleep(RETRY_INTERVAL_S)
        self._on_done()
        if self._was_lost:
            self._tell("what is known of VMs was taken from the store", is_over=True)
            await trio.sleep(NOTED_S)
            self._findings.settle(_SUBJECT, HistoryLost)

    async def _try(self) -> bool:
        try:
            if not await self._threads.files(lambda: self._catalog.is_rebuild_due):
                return True
            for vm in (await self._listing.scan()).vms:
                if vm.id not in self._done:
                    await self._take(vm.id)
                    self._done.add(vm.id)
            await self._threads.files(self._catalog.rebuilt)
        except VmfsStubError as exc:
            log.warning("the catalog is not complete yet: %s; it is tried again", exc)
            return False
        log.info("the catalog knows the last restore points of %d VMs", len(self._done))
        return True

    async def _take(self, vm_id: VmId) -> None:
        points = await self._threads.background(self._store.points, vm_id)
        if points:
            await self._threads.files(self._catalog.record_point, vm_id, max(point.created_s for point in points))

    def _tell(self, what: str, *, is_over: bool) -> None:
        lost = HistoryLost(f"it was lost and begun anew: {what}; the history of jobs and usage before is lost")
        if not is_over:
            log.warning("the catalog was lost: %s", lost)
        self._findings.add(_SUBJECT, lost, stays=False, severity="note" if is_over else "warning")
