"""Backups together are as fast as the hour allows, and a limit that changes holds at once."""

from __future__ import annotations

import calendar
import os
import time

import pytest
import trio

from tests.datastore_harness import CHUNK, temporary_rig
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.windows import Window, Windows
from vmfs_stub.services.bandwidth import Bandwidth, local_minute
from vmfs_stub.services.mover import Content, Part

MIB = 1 << 20


async def took_s(several: Bandwidth, *counts: int) -> float:
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for count in counts:
            nursery.start_soon(several.take, count)
    return trio.current_time() - began_s


async def test_all_together_are_held_to_the_limit(autojump_clock: object) -> None:
    limited = Bandwidth(Windows(outside=MIB))
    assert await took_s(limited, 3 * MIB, 2 * MIB, 5 * MIB) == pytest.approx(10)
    await trio.sleep(60)
    assert await took_s(limited, 2 * MIB) == pytest.approx(2)  # what was not used is not caught up on


async def test_no_limit_does_not_wait(autojump_clock: object) -> None:
    assert await took_s(Bandwidth(), 1 << 50) == 0
    night = Bandwidth(Windows((Window(0, 60, 0),), outside=1), minute=lambda: 30)
    assert await took_s(night, 1 << 50) == 0


async def test_a_window_that_opens_holds_for_what_waits_already(autojump_clock: object) -> None:
    minutes = [0]
    limited = Bandwidth(Windows((Window(10, 20, 10 * MIB),), outside=MIB), minute=lambda: minutes[0])

    async def open_later() -> None:
        await trio.sleep(5)
        minutes[0] = 15

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_later)
        assert await took_s(limited, 105 * MIB) == pytest.approx(15, abs=1.1)


async def test_windows_can_be_replaced_while_something_waits(autojump_clock: object) -> None:
    limited = Bandwidth(Windows(outside=1))

    async def replace() -> None:
        await trio.sleep(3)
        limited.windows = Windows()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(replace)
        assert await took_s(limited, 1 << 40) == pytest.approx(3, abs=1.1)


def test_a_part_comes_in_pieces_only_where_there_is_a_limit() -> None:
    part = Part(Extent(3, 100), Content.DATA)
    assert list(Bandwidth().pieces(part, CHUNK)) == [part]
    pieces = list(Bandwidth(Windows(outside=1)).pieces(part, CHUNK))
    assert len(pieces) > 1
    assert [piece.chunks.start for piece in pieces[1:]] == [piece.chunks.end for piece in pieces[:-1]]
    assert (pieces[0].chunks.start, pieces[-1].chunks.end) == (3, 100)


async def test_a_backup_is_held_to_the_limit_and_whole(autojump_clock: object) -> None:
    content = os.urandom(64 * CHUNK)
    with temporary_rig() as rig:
        rig.inline = True
        rig.make_disk("vm/disk.img", content)
        async with rig.running() as services:
            rig.bandwidth.windows = Windows(outside=CHUNK)
            began_s = trio.current_time()
            report = await services.archive("vm")
            assert trio.current_time() - began_s >= 64
            assert report.read_bytes == len(content)
            rig.bandwidth.windows = Windows()
            began_s = trio.current_time()
            await services.bring_back("vm/disk.img")
            assert (rig.backing / "vm/disk.img").read_bytes() == content


def test_the_minute_is_that_of_the_wall_clock() -> None:
    """On the days on which clocks are changed, too: what they show is what counts."""
    before = os.environ.get("TZ")
    try:
        os.environ["TZ"] = "CET-1CEST,M3.5.0,M10.5.0/3"
        time.tzset()
        changes = (calendar.timegm((2026, 3, 29, 1, 0, 0)), calendar.timegm((2026, 10, 25, 1, 0, 0)))
        shown = [local_minute(change_s + step_s) for change_s in changes for step_s in (-60, 0)]
        assert shown == [60 + 59, 3 * 60, 2 * 60 + 59, 2 * 60]
    finally:
        os.environ.pop("TZ")
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()
