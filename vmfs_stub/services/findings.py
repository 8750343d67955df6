"""What an operator should know and has not been told: damage, failed recalls, things that start-up could not mend.

In memory; the newest of each kind and disk is kept, and their number is bounded.  A finding that can be over while
the daemon runs is taken back by whoever sees that it is: `status` tells how things are, not how they once were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmfs_stub.core.errors import RecallError, StoreUnavailable, VmfsStubError

FINDINGS_MAX = 1000

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``subject`` names the disk or map.

    With the severity ``problem`` somebody has to act; a ``warning`` may pass by itself, a ``note`` needs nobody.
    """

    subject: str
    error: VmfsStubError
    severity: Severity


class Findings:
    """The findings of one datastore, oldest first."""

    def __init__(self) -> None:
        self._findings: dict[tuple[str, type[VmfsStubError], bool], Finding] = {}

    def add(self, subject: str, error: VmfsStubError, *, stays: bool = True, severity: Severity | None = None) -> None:
        """Remember an error; unless it ``stays`` until the daemon ends, `settle` takes it back.

        Without a ``severity``: a store that is away may come back by itself; for anything else somebody has to act.
        """
        if len(self._findings) >= FINDINGS_MAX:
            self._findings.pop(next(iter(self._findings)))
        if severity is None:
            severity = "warning" if isinstance(error, (StoreUnavailable, RecallError)) else "problem"
        self._findings[subject, type(error), stays] = Finding(subject, error, severity)

    def settle(self, subject: str, kind: type[VmfsStubError]) -> None:
        """Take back what was found of ``subject`` and does not stay: it is over."""
        self._findings.pop((subject, kind, False), None)

    def all(self) -> list[Finding]:
        return list(self._findings.values())
