"""Taking a placeholder up and laying it down: which map counts, and when there is none that may be believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.primary_samples import (
    BLOCK,
    BOOT,
    LATER_BOOT,
    OTHER,
    PLACEHOLDER,
    header,
    make_map,
    record_of,
)
from vmfs_stub.core.errors import CorruptMap, CorruptRecord, IdentityMismatch, MapFrozen, MapMissing
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.primary.durable_map import DurableMap, MapState
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import (
    PlaceholderMaps,
    PrivateState,
    discard_maps,
    live_guest_mtime_ns,
    mark_removed,
    open_durable,
    take_up,
)
from vmfs_stub.primary.record import PlaceholderRecord, encode_record

BLOCKS = 20
FILES = FileCalls()


class Failing(FileCalls):
    """Fails at one site, once it is told which and how many calls from now."""

    site = ""
    left = 0

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if site == self.site:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.EIO, "planted")
        return super().call(site, function, *args, **kwargs)


class Primary:
    """One placeholder on a real filesystem: blocks 2 and 3 are resident in its durable map."""

    def __init__(self, base: Path) -> None:
        self.path = base / "disk.img"
        self.path.write_bytes(bytes(BLOCKS * BLOCK))
        self.fd = os.open(self.path, os.O_RDWR)
        self.private = replace(PrivateState.at(base, base / "run"), boot=BOOT)
        self.record: PlaceholderRecord = record_of(self.path)
        path = self.private.durable_path(PLACEHOLDER)
        durable = make_map(FILES, path, header(BLOCKS, identity=self.record.identity), {2, 3})
        durable.close()
        os.setxattr(self.fd, PLACEHOLDER_XATTR, encode_record(self.record))

    def take_up(self, files: FileCalls = FILES, *, rebooted: bool = False) -> PlaceholderMaps:
        private = replace(self.private, boot=LATER_BOOT) if rebooted else self.private
        maps = take_up(files, self.fd, private, label="the disk")
        assert maps is not None
        return maps

    @property
    def volatile_path(self) -> Path:
        return self.private.volatile_path(PLACEHOLDER)

    def header(self) -> Any:
        durable = open_durable(FILES, self.private, self.record, label="disk")
        durable.close()
        return durable.header


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    made = Primary(tmp_path)
    yield made
    os.close(made.fd)


def drop(maps: PlaceholderMaps) -> None:
    """The process is gone; nothing is laid down."""
    maps.live.close(discard=False)
    maps.durable.close()


def resident(maps: PlaceholderMaps) -> set[int]:
    return {block for block in range(BLOCKS) if maps.live.is_resident(block, block + 1)}


def test_an_ordinary_file_is_none(primary: Primary) -> None:
    os.removexattr(primary.fd, PLACEHOLDER_XATTR)
    assert take_up(FILES, primary.fd, primary.private, label="disk") is None


def test_the_first_opening_starts_from_the_durable_map_and_says_so_before(primary: Primary) -> None:
    maps = primary.take_up()
    assert resident(maps) == {2, 3}
    assert primary.header().live == BOOT
    drop(maps)


def test_what_was_laid_down_comes_back(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 9)
    maps.live.set_guest_mtime(123)
    maps.lay_down(FILES, primary.fd)
    assert not primary.volatile_path.exists()
    assert primary.header().live is None
    for rebooted in (False, True):
        maps = primary.take_up(rebooted=rebooted)
        assert resident(maps) == {2, 3, 7, 8}
        assert maps.live.guest_mtime_ns == 123
        maps.lay_down(FILES, primary.fd)


def test_after_a_kill_in_the_same_boot_the_volatile_map_counts(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 9)
    maps.live.set_guest_mtime(77)
    drop(maps)
    assert live_guest_mtime_ns(FILES, primary.private, primary.record, primary.header(), label="disk") == 77
    again = primary.take_up()
    assert resident(again) == {2, 3, 7, 8}
    again.lay_down(FILES, primary.fd)
    after = primary.take_up(rebooted=True)
    assert resident(after) == {2, 3, 7, 8}, "what was taken up counted as changed"
    drop(after)


@pytest.mark.parametrize("map_survives", [True, False])
def test_after_a_reboot_the_durable_map_counts(primary: Primary, map_survives: bool) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 9)
    drop(maps)
    if not map_survives:
        primary.volatile_path.unlink()
    again = primary.take_up(rebooted=True)
    assert resident(again) == {2, 3}
    assert primary.header().live == LATER_BOOT
    drop(again)


def test_a_volatile_map_that_is_missing_in_the_same_boot_is_an_error(primary: Primary) -> None:
    drop(primary.take_up())
    primary.volatile_path.unlink()
    for _ in range(2):
        with pytest.raises(MapMissing):
            primary.take_up()
    with pytest.raises(MapMissing):
        live_guest_mtime_ns(FILES, primary.private, primary.record, primary.header(), label="disk")
    drop(primary.take_up(rebooted=True))


def test_a_volatile_map_that_is_damaged_in_the_same_boot_is_an_error(primary: Primary) -> None:
    drop(primary.take_up())
    content = bytearray(primary.volatile_path.read_bytes())
    content[20] ^= 1
    primary.volatile_path.write_bytes(content)
    with pytest.raises(CorruptMap):
        primary.take_up()


def test_a_durable_map_that_is_missing_is_an_error(primary: Primary) -> None:
    discard_maps(FILES, primary.private, PLACEHOLDER)
    with pytest.raises(MapMissing):
        primary.take_up()
    discard_maps(FILES, primary.private, PLACEHOLDER)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"placeholder_id": OTHER}, CorruptMap),
        ({"size": (BLOCKS + 1) * BLOCK}, CorruptMap),
        ({"identity": header(1).identity}, IdentityMismatch),
    ],
)
def test_a_durable_map_of_something_else_is_an_error(
    primary: Primary, changes: dict[str, Any], error: type[Exception]
) -> None:
    path = primary.private.durable_path(PLACEHOLDER)
    path.unlink()
    wrong = replace(header(BLOCKS, identity=primary.record.identity), **changes)
    DurableMap.create(FILES, path, wrong).close()
    with pytest.raises(error):
        primary.take_up()


def test_a_record_of_another_inode_or_damaged_is_an_error(primary: Primary) -> None:
    os.setxattr(primary.fd, PLACEHOLDER_XATTR, encode_record(replace(primary.record, ino=primary.record.ino + 1)))
    with pytest.raises(IdentityMismatch):
        primary.take_up()
    os.setxattr(primary.fd, PLACEHOLDER_XATTR, encode_record(primary.record)[:-1])
    with pytest.raises(CorruptRecord):
        primary.take_up()


def test_a_truncate_that_was_cut_short_is_seen_on_the_file(primary: Primary) -> None:
    maps = primary.take_up()
    os.ftruncate(primary.fd, 5 * BLOCK + 1)
    drop(maps)
    again = primary.take_up()
    assert again.live.archived_limit == 5 * BLOCK + 1
    assert resident(again) == {2, 3, *range(6, BLOCKS)}
    drop(again)


@pytest.mark.parametrize("site", ["volatile.create", "volatile.allocate", "map.write", "map.sync", "map.read"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_opening_that_fails_is_made_good_by_the_next(primary: Primary, site: str, number: int) -> None:
    files = Failing()
    files.site, files.left = site, number
    with pytest.raises((OSError, CorruptMap)):
        primary.take_up(files)
    maps = primary.take_up()
    assert resident(maps) == {2, 3}
    drop(maps)


@pytest.mark.parametrize("site", ["sync.data", "map.write", "map.sync"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_close_that_fails_freezes_until_reboot(primary: Primary, site: str, number: int) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 9)
    files = Failing()
    files.site, files.left = site, number
    maps.durable._files = files
    if (site, number) == ("sync.data", 2):
        maps.sync(files, primary.fd, {}, maps.durable.header)
    with pytest.raises(OSError, match="planted"):
        maps.lay_down(files, primary.fd)
    for _ in range(2):
        with pytest.raises(MapFrozen):
            primary.take_up()
    again = primary.take_up(rebooted=True)
    assert resident(again) in ({2, 3}, {2, 3, 7, 8})
    drop(again)


def test_a_frozen_map_is_not_laid_down_as_clean(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 9)
    maps.live.freeze()
    maps.lay_down(FILES, primary.fd)
    assert primary.header().live == BOOT
    with pytest.raises(MapFrozen):
        primary.take_up()


def test_a_replaced_map_is_superseded_by_the_opening(primary: Primary) -> None:
    old = primary.private.durable_path(OTHER)
    replaced = replace(header(BLOCKS, identity=primary.record.identity), placeholder_id=OTHER)
    DurableMap.create(FILES, old, replaced).close()
    os.setxattr(primary.fd, PLACEHOLDER_XATTR, encode_record(replace(primary.record, replaces=OTHER)))
    drop(primary.take_up())
    durable = DurableMap.open(FILES, old, label="old")
    durable.close()
    assert durable.header.state is MapState.SUPERSEDED
    old.write_bytes(b"damaged")
    drop(primary.take_up())


def test_removal_is_noted_and_tells_what_was_before(primary: Primary) -> None:
    assert mark_removed(FILES, primary.private, primary.record, label="disk") is MapState.PUNCHED
    assert primary.header().state is MapState.REMOVED
    discard_maps(FILES, primary.private, PLACEHOLDER)
    with pytest.raises(MapMissing):
        mark_removed(FILES, primary.private, primary.record, label="disk")
