"""What an operator should know and has not been told: damage, failed recalls, things that start-up could not mend.

In memory; the newest of each kind and disk is kept, and their number is bounded.  A finding that can be over while
the daemon runs is taken back by whoever sees that it is: `status` tells how things are, not how they once were.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.errors import RecallError, StoreUnavailable, VmfsStubError

FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """``subject`` names the disk or map; ``is_problem`` when somebody has to act, else it may pass by itself."""

    subject: str
    error: VmfsStubError
    is_problem: bool


class Findings:
    """The findings of one datastore, oldest first."""

    def __init__(self) -> None:
        self._findings: dict[tuple[str, type[VmfsStubError], bool], Finding] = {}

    def add(self, subject: str, error: VmfsStubError, *, stays: bool = True) -> None:
        """Remember an error; unless it ``stays`` until the daemon ends, `settle` takes it back.

        A store that is away may come back by itself; for anything else somebody has to act.
        """
        if len(self._findings) >= FINDINGS_MAX:
            self._findings.pop(next(iter(self._findings)))
        may_pass = isinstance(error, (StoreUnavailable, RecallError))
        self._findings[subject, type(error), stays] = Finding(subject, error, is_problem=not may_pass)

    def settle(self, subject: str, kind: type[VmfsStubError]) -> None:
        """Take back what was found of ``subject`` and does not stay: it is over."""
        self._findings.pop((subject, kind, False), None)

    def all(self) -> list[Finding]:
        return list(self._findings.values())
