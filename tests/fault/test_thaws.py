"""What the sweep over all sites (test_sites.py) finds when guests that are frozen for a backup may stay so."""

from __future__ import annotations

from functools import partial

import pytest

from tests.fault.site_faults import said_of
from tests.fault.spoilings import AWAY
from vmfs_stub.primary.guest_notes import GuestNote
from vmfs_stub.services.frozen_guests import FrozenGuests, _Owed

swept = partial(said_of, "back_up_at_rest")
FREEZE, THAW = "hypervisor.freeze.answered", "hypervisor.thaw.asked"
TROUBLES = ((FREEZE, "kill"), (FREEZE, AWAY), (THAW, "kill"), (THAW, AWAY), (THAW, "error"))


async def test_whatever_becomes_of_the_thaw_there_is_another() -> None:
    for site, kind in TROUBLES:
        assert await swept(site, kind) == "", (site, kind)


async def test_a_guest_that_is_frozen_without_a_note_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unnoted(self: FrozenGuests, *arguments: object) -> bool:
        return True

    monkeypatch.setattr(FrozenGuests, "_note", unnoted)
    assert "the guest is frozen, and that is not noted" in await swept("changes.replace", "error")


async def test_a_note_that_goes_before_the_thaw_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrozenGuests._thaw_or_tell

    async def hasty(self: FrozenGuests, note: GuestNote, owed: _Owed, name: str) -> None:
        self._notes.remove(note)
        await real(self, note, owed, name)

    monkeypatch.setattr(FrozenGuests, "_thaw_or_tell", hasty)
    for site, kind in ((THAW, "kill"), (THAW, AWAY)):
        assert "frozen" in await swept(site, kind), (site, kind)


async def test_a_thaw_that_is_not_tried_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unsettled(self: FrozenGuests) -> None:
        pass

    monkeypatch.setattr(FrozenGuests, "settle", unsettled)
    for site, kind in TROUBLES:
        assert "the guest's filesystems are frozen" in await swept(site, kind), (site, kind)


async def test_a_thaw_that_is_taken_for_done_when_it_failed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrozenGuests._thaw_or_tell

    async def trusting(self: FrozenGuests, note: GuestNote, owed: _Owed, name: str) -> None:
        await real(self, note, owed, name)
        if note in self._owed:
            await self._forget(note, owed, name)

    monkeypatch.setattr(FrozenGuests, "_thaw_or_tell", trusting)
    for site, kind in ((THAW, AWAY), (THAW, "error")):
        assert "frozen" in await swept(site, kind), (site, kind)


async def test_a_note_that_stays_after_the_thaw_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unforgotten(self: FrozenGuests, note: GuestNote, owed: _Owed, name: str) -> None:
        pass

    monkeypatch.setattr(FrozenGuests, "_forget", unforgotten)
    assert "a note of a thaw is left" in await swept(THAW, "kill")
