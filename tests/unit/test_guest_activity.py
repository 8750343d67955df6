"""Whether guests use their disks: noticed here, and told to the data mover, which then takes small steps."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from tests.contract.test_movers import NOISE, make_place
from vmfs_stub.core.extents import Extent
from vmfs_stub.mover import client
from vmfs_stub.mover.channel import Channel
from vmfs_stub.mover.messages import Message, Ping, Pong
from vmfs_stub.mover.server import Server
from vmfs_stub.mover.shared_slots import SharedSlots
from vmfs_stub.paced_io import pace
from vmfs_stub.services import guest_activity
from vmfs_stub.services.guest_activity import RECENT_S, GuestActivity
from vmfs_stub.services.mover import Content, CopyOrder, Mover, Part
from vmfs_stub.store.clients import StoreClients
from vmfs_stub.store.objects_url import StoreAt


async def test_a_stream_of_requests_is_told_of_once_and_again_after_a_pause(autojump_clock: MockClock) -> None:
    guests, told = GuestActivity(), []
    guests.on_return = lambda: told.append(trio.current_time())
    assert not guests.is_recent
    for pause_s in (RECENT_S / 2, RECENT_S / 2, RECENT_S * 1.5, RECENT_S / 2):
        guests.note()
        assert guests.is_recent
        await trio.sleep(pause_s)
    assert guests.is_recent
    assert len(told) == 2
    await trio.sleep(RECENT_S)
    assert not guests.is_recent


async def test_the_mover_is_told_at_once_when_guests_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Message] = []
    post, pinged = Channel.post, trio.Event()

    def noted(self: Channel, number: int, message: Message, *, fd: int | None = None) -> None:
        posted.append(message)
        if message == Ping(beside_guests=False):
            pinged.set()
        post(self, number, message, fd=fd)

    monkeypatch.setattr(Channel, "post", noted)
    place = make_place(tmp_path, "process")
    async with place.process():
        with trio.fail_after(10):
            await pinged.wait()
        place.guests.note()
        place.guests.note()
        assert posted.count(Ping(beside_guests=True)) == 1
    place.guests.note()  # nobody is there to be told any more


async def test_a_backup_is_told_at_once_that_guests_have_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with the next ping: it would go on in small steps until then."""
    monkeypatch.setattr(client, "PING_INTERVAL_S", 60.0)
    monkeypatch.setattr(guest_activity, "RECENT_S", 0.3)
    place = make_place(tmp_path, "process")
    place.path.write_bytes(NOISE)
    paces = []

    async def parts() -> AsyncIterator[Part]:
        for at in (0, 1):
            yield Part(Extent(at, at + 1), Content.DATA)
            paces.append(mover.life().beside_guests)
            await trio.sleep(2 * guest_activity.RECENT_S)

    with trio.fail_after(30), place.path.open("r+b") as file:
        async with place.process() as mover, mover.backup() as backup, backup.copying(verify=False) as copying:
            order = CopyOrder(len(NOISE), "disk")
            place.guests.note()
            await copying.copy(file.fileno(), order, parts(), lambda count: None)
    assert paces == [True, False]


@pytest.mark.parametrize("beside_guests", [True, False])
async def test_the_mover_does_as_it_is_told(monkeypatch: pytest.MonkeyPatch, beside_guests: bool) -> None:
    monkeypatch.setattr(pace, "beside_guests", not beside_guests)
    ours, theirs = (Channel(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    server = Server(
        theirs, cast(Mover, None), cast(SharedSlots, None), StoreClients(StoreAt("memory://activity"), None)
    )
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for end in (ours, theirs):
                nursery.start_soon(end.run_sender)
            nursery.start_soon(server.run)
            ours.post(0, Ping(beside_guests))
            _, answer, _ = await ours.receive()
            nursery.cancel_scope.cancel()
    ours.close()
    theirs.close()
    assert answer == Pong({})
    assert pace.beside_guests == beside_guests
