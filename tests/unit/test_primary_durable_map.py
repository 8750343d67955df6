"""The durable map: what it says survives a damaged unit and a torn update, and it never says more than was written."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.primary_samples import BLOCK, BOOT, OTHER, bits_of, header, make_map, resident_of
from vmfs_stub.core.errors import CorruptMap, UnknownFormat
from vmfs_stub.core.extents import Extent
from vmfs_stub.primary.durable_map import PAGE_BLOCKS, UNIT, DurableMap, MapHeader, MapState, _page_offset, pages_of
from vmfs_stub.primary.envelope import seal
from vmfs_stub.primary.files import FileCalls, write_fully
from vmfs_stub.primary.volatile_map import VolatileMap

BLOCKS = 2 * PAGE_BLOCKS + 17
RESIDENT = {0, 1, 9, PAGE_BLOCKS - 1, PAGE_BLOCKS, 2 * PAGE_BLOCKS - 1, 2 * PAGE_BLOCKS + 16}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.map"


@pytest.fixture
def made(path: Path) -> Iterator[DurableMap]:
    durable = make_map(FileCalls(), path, header(BLOCKS), RESIDENT)
    yield durable
    durable.close()


def load(path: Path) -> tuple[MapHeader, set[int]]:
    durable = DurableMap.open(FileCalls(), path, label="disk")
    try:
        return durable.header, resident_of(b"".join(durable.load_pages(label="disk")), durable.header.size)
    finally:
        durable.close()


def page(*resident: int) -> bytes:
    return bits_of(PAGE_BLOCKS, set(resident))


@pytest.mark.parametrize("blocks", [1, 8, 9, PAGE_BLOCKS, PAGE_BLOCKS + 1, BLOCKS])
def test_a_new_map_says_what_it_was_made_of(path: Path, blocks: int) -> None:
    resident = {0, blocks // 2, blocks - 1}
    make_map(FileCalls(), path, header(blocks), resident).close()
    assert load(path) == (header(blocks), resident)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_update_changes_its_pages_and_the_header_only(made: DurableMap, path: Path) -> None:
    changed = replace(made.header, state=MapState.GRADUATING, live=BOOT, guest_mtime_ns=5, hydrate=True)
    made.update({1: page(3, 4)}, changed)
    expected = {block for block in RESIDENT if not PAGE_BLOCKS <= block < 2 * PAGE_BLOCKS}
    assert load(path) == (changed, expected | {PAGE_BLOCKS + 3, PAGE_BLOCKS + 4})
    made.set_state(MapState.REMOVED)
    assert load(path)[0] == replace(changed, state=MapState.REMOVED)


def test_each_damaged_unit_is_made_good_by_its_copy(made: DurableMap, path: Path) -> None:
    made.update({0: page(5), 2: page(1)}, replace(made.header, guest_mtime_ns=9))
    whole, expected = path.read_bytes(), load(path)
    chosen = random.Random(1)
    assert len(whole) == (2 + 2 * 3) * UNIT
    for unit in range(len(whole) // UNIT):
        used = 200 if unit < 2 else UNIT
        for at in [0, *(chosen.randrange(used) for _ in range(20))]:
            damaged = bytearray(whole)
            damaged[unit * UNIT + at] ^= 1 << chosen.randrange(8)
            path.write_bytes(damaged)
            assert load(path) == expected, (unit, at)
        path.write_bytes(whole[: unit * UNIT] + bytes(UNIT) + whole[(unit + 1) * UNIT :])
        assert load(path) == expected


@pytest.mark.parametrize("pair", range(4))
def test_both_copies_damaged_is_an_error_and_no_map(made: DurableMap, path: Path, pair: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[2 * pair * UNIT + 20] ^= 1
    damaged[(2 * pair + 1) * UNIT + 30] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptMap, match="disk"):
        load(path)


def test_a_truncated_file_is_an_error(made: DurableMap, path: Path) -> None:
    whole = path.read_bytes()
    for length in [0, 1, UNIT - 1, *(unit * UNIT for unit in range(3)), 3 * UNIT - 1, 4 * UNIT, 6 * UNIT]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptMap):
            load(path)
    path.write_bytes(whole[: 7 * UNIT])
    assert load(path)[1] == RESIDENT, "the last unit is a copy"


def test_pages_of_another_map_or_place_are_damage(made: DurableMap, path: Path) -> None:
    whole = path.read_bytes()
    other = path.with_name("other.map")
    DurableMap.create(FileCalls(), other, replace(header(BLOCKS), placeholder_id=OTHER)).close()
    foreign = other.read_bytes()
    path.write_bytes(whole[: 4 * UNIT] + foreign[4 * UNIT :])
    with pytest.raises(CorruptMap):
        load(path)
    path.write_bytes(whole[: 4 * UNIT] + whole[2 * UNIT : 4 * UNIT] + whole[6 * UNIT :])
    with pytest.raises(CorruptMap):
        load(path)


def test_a_newer_map_is_said_to_be_newer(made: DurableMap, path: Path) -> None:
    newer = seal(b"VSTBMAP\0", 2, {}).ljust(UNIT, b"\0")
    path.write_bytes(newer * 2 + path.read_bytes()[2 * UNIT :])
    with pytest.raises(UnknownFormat, match="version 2"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"placeholder_id": "not hex"},
        {"placeholder_id": "../x"},
        {"size": "4096"},
        {"size": -4096},
        {"sequence": 2**64 - 1},
        {"sequence": float("inf")},
        {"state": 7},
        {"state": True},
        {"chunk_size": 0},
        {"archived_limit": None},
        {"guest_mtime_ns": 2**63},
        {"hydrate": 1},
        {"identity": {"filesystem": "18" * 16, "ino": 42}},
        {"identity": []},
        {"live": {"boot_id": "not hex", "mount_id": 1}},
        {"live": {"boot_id": "f6" * 16, "mount_id": 2**64}},
        {"more": 1},
    ],
)
def test_a_whole_header_with_a_wrong_field_is_damage(made: DurableMap, path: Path, change: dict[str, object]) -> None:
    body = {"sequence": 3, **asdict(header(BLOCKS)), **change}
    path.write_bytes(seal(b"VSTBMAP\0", 1, body).ljust(UNIT, b"\0") * 2 + path.read_bytes()[2 * UNIT :])
    with pytest.raises(CorruptMap, match="header"):
        load(path)


# Torn updates


class Recorder(FileCalls):
    """Notes the writes of an update, and where its syncs are, without making them."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.syncs: list[int] = []
        self.is_noting = False

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.is_noting and function is write_fully:
            _, data, offset = args
            self.writes.append((offset, bytes(data)))
            return None
        if self.is_noting and function is os.fdatasync:
            self.syncs.append(len(self.writes))
            return None
        return super().call(site, function, *args, **kwargs)


def noted_update(path: Path) -> tuple[bytes, Recorder, MapHeader, MapHeader]:
    files = Recorder()
    durable = make_map(files, path, header(BLOCKS), RESIDENT)
    durable.update({0: page(2), 1: page(6)}, replace(durable.header, guest_mtime_ns=1))
    before, before_header = path.read_bytes(), durable.header
    files.is_noting = True
    after_header = replace(before_header, guest_mtime_ns=2, state=MapState.GRADUATING)
    durable.update({0: page(2, 3), 1: page(6, 7), 2: page(1)}, after_header)
    durable.close()
    assert len(files.writes) == 8
    assert files.syncs == [4, 8]
    return before, files, before_header, after_header


def applied(raw: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(raw)
    for offset, data in writes:
        content[offset : offset + len(data)] = data
    return bytes(content)


def by_page(resident: set[int]) -> list[frozenset[int]]:
    return [frozenset(block for block in resident if block // PAGE_BLOCKS == number) for number in range(3)]


def assert_before_or_after(path: Path, before: tuple[MapHeader, set[int]], after: tuple[MapHeader, set[int]]) -> None:
    found = load(path)
    assert found[0] in (before[0], after[0])
    for page_found, old, new in zip(by_page(found[1]), by_page(before[1]), by_page(after[1]), strict=True):
        assert page_found in (old, new)


def test_an_update_that_is_cut_off_leaves_each_page_old_or_new(path: Path) -> None:
    raw, files, _, _ = noted_update(path)
    path.write_bytes(raw)
    before = load(path)
    path.write_bytes(applied(raw, files.writes))
    after = load(path)
    assert before != after
    for count in range(len(files.writes) + 1):
        done = files.writes[:count]
        path.write_bytes(applied(raw, done))
        assert_before_or_after(path, before, after)
        if count < len(files.writes):
            offset, data = files.writes[count]
            for length in (1, 100, 512, UNIT - 512):
                torn = [*done, (offset, data[:length])]
                path.write_bytes(applied(raw, torn))
                assert_before_or_after(path, before, after)
        if count >= 4:
            assert load(path) == after, "one whole copy is all that is needed"


def test_writes_that_were_not_synced_may_arrive_in_any_order(path: Path) -> None:
    raw, files, _, _ = noted_update(path)
    path.write_bytes(raw)
    before = load(path)
    path.write_bytes(applied(raw, files.writes))
    after = load(path)
    chosen = random.Random(2)
    for _ in range(100):
        first, second = files.writes[:4], files.writes[4:]
        done = chosen.sample(first, chosen.randrange(5)) if chosen.random() < 0.5 else first
        if done == first:
            done = done + chosen.sample(second, chosen.randrange(5))
        torn_offset, torn = chosen.choice(files.writes if len(done) >= 4 else first)
        path.write_bytes(applied(raw, [*done, (torn_offset, torn[: chosen.randrange(UNIT)])]))
        assert_before_or_after(path, before, after)


def test_a_creation_that_fails_leaves_no_map(path: Path) -> None:
    class Full(FileCalls):
        def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if site == self.site:
                raise OSError(28, "full")
            return super().call(site, function, *args, **kwargs)

        site = ""

    for site in ("map.create", "map.write", "map.sync", "map.create_entry"):
        files = Full()
        files.site = site
        with pytest.raises(OSError, match="full"):
            make_map(files, path, header(BLOCKS), RESIDENT)
        assert list(path.parent.iterdir()) == []


def test_pages_lie_behind_both_headers() -> None:
    assert [_page_offset(number) for number in range(3)] == [2 * UNIT, 4 * UNIT, 6 * UNIT]


def test_the_map_of_a_large_disk_is_never_held_whole(path: Path, tmp_path: Path) -> None:
    size = 512 << 30
    large = replace(header(1), size=size, archived_limit=size)
    tracemalloc.start()
    try:
        durable = DurableMap.create(FileCalls(), path, large)
        durable.update(pages_of([Extent(0, 256), Extent(size // BLOCK - 256, size // BLOCK)]), large)
        live = VolatileMap.create(
            FileCalls(),
            tmp_path / "some.bits",
            placeholder_id=large.placeholder_id,
            boot=BOOT,
            size=size,
            pages=durable.load_pages(label="disk"),
            archived_limit=size,
            guest_mtime_ns=0,
        )
        durable.close()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    absent = list(live.absent_runs(0, size // BLOCK))
    live.close(discard=True)
    assert (absent[0].start, absent[-1].end) == (256, size // BLOCK - 256)
    assert peak_bytes < 2 << 20 < size // BLOCK // 8, f"{peak_bytes} bytes"
