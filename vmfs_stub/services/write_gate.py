"""A gate that every change of a disk's bytes passes: shut, it makes a moment at which no change is under way."""

from __future__ import annotations

import trio


class WriteGate:
    """The gate of one disk.

    Whoever passes may wait for the backing filesystem, and for nothing else: not for the store, nor at another gate.
    """

    def __init__(self) -> None:
        self._passing = 0
        self._is_shut = False
        self._turns = trio.lowlevel.ParkingLot()

    async def enter(self) -> None:
        """Return when a change may be made; each owes one `leave`.  No checkpoint while the gate is open."""
        while self._is_shut:
            await self._turns.park()
        self._passing += 1

    def leave(self) -> None:
        """The change is made, or was not."""
        self._passing -= 1
        if self._is_shut and not self._passing:
            self._turns.unpark_all()

    def shut(self) -> None:
        """Let nobody in any more, until `open`."""
        self._is_shut = True

    async def wait_at_rest(self) -> None:
        """Return when no change is under way; the gate is shut."""
        while self._passing:
            await self._turns.park()

    def open(self) -> None:
        """Let everybody in again."""
        self._is_shut = False
        self._turns.unpark_all()
