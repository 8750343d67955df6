"""The end of a placeholder that nothing needs any more: its pin goes, then its maps, and findings about its recalls.

The pin goes first and the map last, because the map is what remembers that this is still to be done: with a store
that is down it stays, and is tried again.  So it does while a pin may still be put, after it was removed here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState, discard_maps
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.services.mover import Mover
from vmfs_stub.services.recall_failures import RecallFailures
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 30.0
"""How often the store is asked again to remove pins that it did not remove before."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A placeholder that has ended, and the restore point it pinned.

    ``was_made``: False when it never came to be, so that whoever was to put its pin may be lost, and still at it.
    """

    placeholder_id: PlaceholderId
    vm_id: VmId
    point_id: PointId
    was_made: bool = True

    @classmethod
    def of(cls, record: PlaceholderRecord) -> Ended:
        """The end of the placeholder that has, or had, this record."""
        return cls(record.placeholder_id, record.vm_id, record.point_id)


class PlaceholderEnder:
    """Removes pins and maps; what fails is tried again until it works or the daemon ends (then at its next start)."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        store: Store,
        mover: Mover,
        private: PrivateState,
        failures: RecallFailures,
    ) -> None:
        self._files = files
        self._threads = threads
        self._store = store
        self._mover = mover
        self._private = private
        self._failures = failures
        self._waiting: list[Ended] = []

    async def end(self, *ended: Ended) -> None:
        """Remove pins and maps, or remember to; the ends of the files or of their records are durable already."""
        for each in ended:
            self._failures.end(each.placeholder_id)
        for number, each in enumerate(ended):
            try:
                await self._end(each)
            except (VmfsStubError, OSError) as exc:
                log.warning("the pin of placeholder %s stays for now: %s", each.placeholder_id, exc)
                self._waiting.append(each)
            except trio.Cancelled:
                self._waiting += ended[number:]
                raise

    async def _end(self, ended: Ended) -> None:
        if not ended.was_made:
            await self._mover.wait_earlier_gone()
        await self._threads.store(self._store.remove_pin, ended.vm_id, ended.point_id, ended.placeholder_id)
        await self._threads.files(discard_maps, self._files, self._private, ended.placeholder_id)

    async def run(self) -> None:
        """Try again what failed, for ever."""
        while True:
            await trio.sleep(RETRY_INTERVAL_S)
            waiting, self._waiting = self._waiting, []
            await self.end(*waiting)
