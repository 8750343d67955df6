"""The volatile map against a list of bits; it never says more than it was told, and survives its process."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.primary_samples import BLOCK, BOOT, LATER_BOOT, OTHER, PLACEHOLDER, pages_in_turn, resident_of
from vmfs_stub.core.errors import CorruptMap, MapMissing, NoSpace
from vmfs_stub.primary.durable_map import PAGE_BLOCKS
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import BootIdentity
from vmfs_stub.primary.volatile_map import _REGION_BLOCKS, VolatileMap

BLOCKS = 3 * _REGION_BLOCKS + 100
"""Of the four regions the last is short."""


class Full(FileCalls):
    """A filesystem that is full from now on, when told so."""

    is_full = False

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.is_full and function is os.posix_fallocate:
            raise OSError(errno.ENOSPC, "full")
        return super().call(site, function, *args, **kwargs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.bits"


def create(path: Path, resident: set[int], *, blocks: int = BLOCKS, files: FileCalls | None = None) -> VolatileMap:
    return VolatileMap.create(
        files or FileCalls(),
        path,
        placeholder_id=PLACEHOLDER,
        boot=BOOT,
        size=blocks * BLOCK,
        pages=pages_in_turn(blocks, resident),
        archived_limit=blocks * BLOCK,
        guest_mtime_ns=0,
    )


def reopen(path: Path, *, blocks: int = BLOCKS, boot: BootIdentity = BOOT) -> VolatileMap:
    return VolatileMap.open(
        FileCalls(), path, placeholder_id=PLACEHOLDER, boot=boot, size=blocks * BLOCK, label="the disk"
    )


@pytest.fixture
def live(path: Path) -> Iterator[VolatileMap]:
    made = create(path, {0, 5, _REGION_BLOCKS + 1})
    yield made
    made.close(discard=False)


def absent(live: VolatileMap, blocks: int = BLOCKS) -> set[int]:
    return {block for run in live.absent_runs(0, blocks) for block in range(run.start, run.end)}


def assert_agrees(live: VolatileMap, resident: set[int], chosen: random.Random) -> None:
    missing = set(range(BLOCKS)) - resident
    assert absent(live) == missing
    assert live.absent_count() == len(missing)
    for _ in range(30):
        first = chosen.randrange(BLOCKS)
        end = min(BLOCKS, first + chosen.choice((1, 2, 9, 4096, _REGION_BLOCKS + 1)))
        assert live.is_resident(first, end) == all(block in resident for block in range(first, end))


def test_random_changes_agree_with_a_set_also_after_reopening(path: Path) -> None:
    chosen = random.Random(3)
    resident = {0, 5, _REGION_BLOCKS + 1, BLOCKS - 1}
    live = create(path, resident)
    for _ in range(25):
        first = chosen.choice((chosen.randrange(BLOCKS), _REGION_BLOCKS - 2, 2 * _REGION_BLOCKS - 1))
        end = min(BLOCKS, first + chosen.choice((1, 3, 8, 100, _REGION_BLOCKS)))
        live.set_resident(first, end + 5 if end == BLOCKS else end)
        resident |= set(range(first, end))
        assert_agrees(live, resident, chosen)
        if chosen.random() < 0.3:
            live.close(discard=False)
            live = reopen(path)
            assert_agrees(live, resident, chosen)
    live.close(discard=True)
    assert list(path.parent.iterdir()) == []


def test_regions_are_allocated_when_they_are_first_needed(path: Path, live: VolatileMap) -> None:
    before = path.stat().st_blocks
    assert path.stat().st_size == 5 * 4096
    assert before == 3 * 8, "the header and the two regions with set bits"
    live.set_resident(3 * _REGION_BLOCKS, 3 * _REGION_BLOCKS + 1)
    assert path.stat().st_blocks == before + 8
    list(live.absent_runs(0, BLOCKS))
    live.is_resident(0, BLOCKS)
    live.take_dirty()
    assert path.stat().st_blocks == before + 8, "looking allocates nothing"


def test_a_full_filesystem_is_an_error_and_sets_no_bit(path: Path) -> None:
    files = Full()
    live = create(path, {0}, files=files)
    files.is_full = True
    live.set_resident(1, 2)
    with pytest.raises(NoSpace, match="runtime directory"):
        live.set_resident(_REGION_BLOCKS - 3, _REGION_BLOCKS + 3)
    assert not live.is_resident(_REGION_BLOCKS - 1, _REGION_BLOCKS)
    assert absent(live) == set(range(BLOCKS)) - {0, 1}
    files.is_full = False
    live.set_resident(_REGION_BLOCKS - 3, _REGION_BLOCKS + 3)
    assert live.is_resident(_REGION_BLOCKS - 3, _REGION_BLOCKS + 3)
    live.close(discard=True)


def test_a_full_filesystem_at_creation_leaves_nothing(path: Path) -> None:
    files = Full()
    files.is_full = True
    with pytest.raises(NoSpace, match="runtime directory"):
        create(path, {0}, files=files)
    assert list(path.parent.iterdir()) == []


def test_what_is_beyond_the_limit_is_resident(live: VolatileMap, path: Path) -> None:
    live.lower_archived_limit(10 * BLOCK + 1)
    assert live.archived_limit == 10 * BLOCK + 1
    assert not live.is_resident(10, 11), "the limit lies in this block"
    assert live.is_resident(11, BLOCKS)
    assert absent(live) == {1, 2, 3, 4, 6, 7, 8, 9, 10}
    live.lower_archived_limit(20 * BLOCK)
    assert live.archived_limit == 10 * BLOCK + 1, "it never rises"
    live.lower_archived_limit(0)
    assert live.is_resident(0, BLOCKS)
    again = reopen(path)
    assert again.archived_limit == 0
    again.close(discard=False)


def test_limits_and_times_survive_the_process(live: VolatileMap, path: Path) -> None:
    live.set_guest_mtime(-5)
    live.freeze()
    again = reopen(path)
    assert (again.guest_mtime_ns, again.frozen) == (-5, True)
    again.close(discard=False)


def test_dirty_pages_are_those_that_changed(live: VolatileMap) -> None:
    assert not live.is_dirty
    live.set_resident(PAGE_BLOCKS - 1, PAGE_BLOCKS + 2)
    assert live.is_dirty
    pages = live.take_dirty()
    assert sorted(pages) == [0, 1]
    assert resident_of(pages[0], PAGE_BLOCKS * BLOCK) == {0, 5, PAGE_BLOCKS - 1}
    assert resident_of(pages[1], PAGE_BLOCKS * BLOCK) == {0, 1, _REGION_BLOCKS + 1 - PAGE_BLOCKS}
    assert not live.is_dirty
    assert live.take_dirty() == {}
    live.lower_archived_limit(BLOCK)
    assert live.is_dirty
    assert live.take_dirty() == {}
    assert not live.is_dirty


def test_after_reopening_everything_counts_as_changed(live: VolatileMap, path: Path) -> None:
    live.set_resident(BLOCKS - 1, BLOCKS)
    live.take_dirty()
    again = reopen(path)
    pages = again.take_dirty()
    found = {
        number * PAGE_BLOCKS + block
        for number in pages
        for block in resident_of(pages[number], len(pages[number]) * 8 * BLOCK)
    }
    assert sorted(pages) == [0, 1, 2, 3]
    assert found == {0, 5, _REGION_BLOCKS + 1, BLOCKS - 1}
    again.close(discard=False)


def test_a_missing_map_is_said_to_be_missing(path: Path) -> None:
    with pytest.raises(MapMissing, match="the disk"):
        reopen(path)


def test_a_map_of_another_boot_mount_placeholder_or_size_is_not_accepted(live: VolatileMap, path: Path) -> None:
    for boot in (LATER_BOOT, BootIdentity(BOOT.boot_id, BOOT.mount_id + 1)):
        with pytest.raises(CorruptMap):
            reopen(path, boot=boot)
    with pytest.raises(CorruptMap):
        reopen(path, blocks=BLOCKS - 1)
    with pytest.raises(CorruptMap):
        VolatileMap.open(FileCalls(), path, placeholder_id=OTHER, boot=BOOT, size=BLOCKS * BLOCK, label="disk")


def test_a_cut_or_damaged_file_is_refused_before_it_is_touched(live: VolatileMap, path: Path) -> None:
    """Reading a mapping beyond the end of its file would be a SIGBUS."""
    whole = path.read_bytes()
    copy = path.with_name("copy.bits")
    for length in (0, 10, 100, 4095, 4096, 3 * 4096, len(whole) - 1, len(whole) + 4096):
        copy.write_bytes(whole[:length].ljust(min(length, len(whole) + 4096), b"\0"))
        with pytest.raises(CorruptMap):
            reopen(copy)
    for at in range(80):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        copy.write_bytes(damaged)
        with pytest.raises(CorruptMap):
            reopen(copy)


def test_a_limit_beyond_what_was_archived_is_damage(live: VolatileMap, path: Path) -> None:
    """It changes in place and has no checksum, but goes into the durable map."""
    content = bytearray(path.read_bytes())
    content[128:136] = (BLOCKS * BLOCK + 1).to_bytes(8, "little")
    copy = path.with_name("copy.bits")
    copy.write_bytes(content)
    with pytest.raises(CorruptMap, match="impossible limit"):
        reopen(copy)


def test_a_new_map_replaces_an_old_one_whole(live: VolatileMap, path: Path) -> None:
    live.set_resident(0, BLOCKS)
    again = create(path, {7})
    assert absent(again) == set(range(BLOCKS)) - {7}
    again.close(discard=False)
