"""Which recalls failed and have not succeeded since: a finding while that is so, and one line in the log.

Damage is over when the damaged chunk itself has arrived; anything else (a store that was away, a full filesystem, a VM
that is claimed elsewhere) when any chunk of the disk has.  In memory, a bounded number of chunks for each disk and
kind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from vmfs_stub.core.errors import DAMAGE, MoverLost, VmfsStubError
from vmfs_stub.core.ids import PlaceholderId
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.placeholder import Placeholder

log = logging.getLogger(__name__)

CHUNKS_KEPT = 1000
"""Chunks remembered of a disk and kind; were all of them mended, the next read of another one tells of it again."""


@dataclass(slots=True)
class _Failure:
    """``subject`` is the disk's name when it failed: it may be renamed before that is over."""

    subject: str
    chunks: set[int] = field(default_factory=set)


class RecallFailures:
    """The failures of one datastore's recalls, by placeholder."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._failing: dict[PlaceholderId, dict[type[VmfsStubError], _Failure]] = {}

    def add(self, placeholder: Placeholder, chunks: Iterable[int], error: VmfsStubError) -> None:
        """A recall of these chunks failed; none: the claim of the VM, before a guest may write.

        That of a mover that was lost is over at once: the next try has another one.
        """
        if isinstance(error, MoverLost):
            return
        failing = self._failing.setdefault(placeholder.maps.record.placeholder_id, {})
        failure = failing.get(type(error))
        if failure is None:
            # A guest that waits for a store tries again and again: the log needs each kind of failure once.
            failure = failing[type(error)] = _Failure(placeholder.label)
            log.error("recall of %s failed: %s", placeholder.label, error)
        for chunk in chunks:
            if len(failure.chunks) < CHUNKS_KEPT:
                failure.chunks.add(chunk)
        self._findings.add(failure.subject, error, stays=False)

    def arrived(self, placeholder: Placeholder, chunks: Iterable[int]) -> None:
        """These chunks are back; none: the VM is claimed."""
        failing = self._failing.get(placeholder.maps.record.placeholder_id)
        if failing is None:
            return
        for kind, failure in list(failing.items()):
            failure.chunks.difference_update(chunks)
            if not failure.chunks or not issubclass(kind, DAMAGE):
                del failing[kind]
                self._findings.settle(failure.subject, kind)
        if not failing:
            del self._failing[placeholder.maps.record.placeholder_id]

    def end(self, placeholder_id: PlaceholderId) -> None:
        """The placeholder is none any more: nothing of it is recalled again."""
        for kind, failure in self._failing.pop(placeholder_id, {}).items():
            self._findings.settle(failure.subject, kind)
