"""Whether guests use their disks: noticed here, and told to the data mover, which then takes small steps."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from tests.contract.test_movers import make_place
from vmfs_stub.mover.channel import Channel
from vmfs_stub.mover.messages import Message, Ping, Pong
from vmfs_stub.mover.server import Server
from vmfs_stub.mover.shared_slots import SharedSlots
from vmfs_stub.paced_io import pace
from vmfs_stub.services.guest_activity import RECENT_S, GuestActivity
from vmfs_stub.services.mover import Mover


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


@pytest.mark.parametrize("beside_guests", [True, False])
async def test_the_mover_does_as_it_is_told(monkeypatch: pytest.MonkeyPatch, beside_guests: bool) -> None:
    monkeypatch.setattr(pace, "beside_guests", not beside_guests)
    ours, theirs = (Channel(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    server = Server(theirs, cast(Mover, None), cast(SharedSlots, None))
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
    assert answer == Pong()
    assert pace.beside_guests == beside_guests
