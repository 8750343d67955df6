"""What is kept of what changed: it comes back as it was, or says nothing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.primary_samples import BOOT, IDENTITY, LATER_BOOT, POINT, STORE, VM
from vmfs_stub.core.changed import Changed, bits_size
from vmfs_stub.core.origin import Origin
from vmfs_stub.primary.changed_map import ChangedMap, ChangedState
from vmfs_stub.primary.changed_record import ChangedRecord, Seen, load_changed, save_changed
from vmfs_stub.primary.files import FileCalls

CHUNK = 64 * 1024
CHUNKS = 100_000
ORIGIN = Origin(STORE, VM, POINT, 3, CHUNKS * CHUNK - 5, CHUNK)
SEEN = Seen(ORIGIN.size, -5, 2**63 + 7)
FILES = FileCalls()
UNIT = 4096


def changed(*chunks: int) -> Changed:
    bits = bytearray(bits_size(ORIGIN))
    for chunk in chunks:
        bits[chunk >> 3] |= 1 << (chunk & 7)
    return Changed(ORIGIN, bytes(bits))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "42"


@pytest.fixture
def live(path: Path) -> Iterator[ChangedMap]:
    made = ChangedMap.create(FILES, path, identity=IDENTITY, boot=BOOT, changed=changed(7))
    yield made
    made.close()


def reopened(path: Path) -> Changed:
    found = ChangedMap.open(FILES, path, boot=BOOT)
    assert found is not None
    try:
        assert found.identity == IDENTITY
        return found.changed()
    finally:
        found.close()


# The record


def test_a_record_comes_back_as_it_was(path: Path) -> None:
    for bits in (changed(), changed(0, 1, CHUNKS - 1), changed(*random.Random(1).sample(range(CHUNKS), 5000))):
        record = ChangedRecord(IDENTITY, SEEN, bits)
        save_changed(FILES, path, record)
        assert load_changed(FILES, path) == record
    assert [each.name for each in path.parent.iterdir()] == ["42"]


def test_a_record_that_is_missing_cut_or_altered_says_nothing(path: Path) -> None:
    assert load_changed(FILES, path) is None
    save_changed(FILES, path, ChangedRecord(IDENTITY, SEEN, changed(3, 70_000)))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_changed(FILES, path) is None
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load_changed(FILES, path) is None
    path.write_bytes(whole + b"\0")
    assert load_changed(FILES, path) is None
    path.write_bytes(whole)
    assert load_changed(FILES, path) is not None


def test_a_file_is_recognised_by_what_was_seen_of_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 10)
    st = path.stat()
    seen = Seen.of(st)
    assert seen.is_all_of(st)
    path.chmod(0o640)
    touched = path.stat()
    assert seen.is_content_of(touched)
    assert not seen.is_all_of(touched)
    assert seen.is_left_as(touched, until_ns=touched.st_ctime_ns + 1)
    assert not seen.is_left_as(touched, until_ns=touched.st_ctime_ns)
    path.write_bytes(b"y" * 10)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    rewritten = path.stat()
    assert seen.is_content_of(rewritten), "who sets times deceives"
    assert not seen.is_left_as(rewritten, until_ns=rewritten.st_ctime_ns)
    path.write_bytes(b"y" * 11)
    assert not seen.is_left_as(path.stat(), until_ns=1 << 70)


# The map


def test_what_is_noted_is_there_also_after_the_process(live: ChangedMap, path: Path) -> None:
    live.set_changed(3 * CHUNK, 1)
    live.set_changed(9 * CHUNK - 1, 2)
    live.set_changed(40_000 * CHUNK, 2 * CHUNK)
    live.set_changed(ORIGIN.size - 1, 1 << 62)
    live.set_changed(ORIGIN.size + CHUNK, 10)
    wanted = changed(3, 7, 8, 9, 40_000, 40_001, CHUNKS - 1)
    assert live.changed() == wanted
    assert reopened(path) == wanted


def test_space_is_taken_where_something_changed(live: ChangedMap, path: Path) -> None:
    assert path.stat().st_blocks * 512 == 2 * UNIT
    live.set_changed(90_000 * CHUNK, 1)
    assert path.stat().st_blocks * 512 == 3 * UNIT
    assert live.changed() == changed(7, 90_000)
    assert path.stat().st_blocks * 512 == 3 * UNIT


def test_states_and_what_was_seen_survive_the_process(live: ChangedMap, path: Path) -> None:
    def found() -> tuple[ChangedState, Seen | None]:
        again = ChangedMap.open(FILES, path, boot=BOOT)
        assert again is not None
        try:
            return again.state, again.seen
        finally:
            again.close()

    assert found() == (ChangedState.MADE, None)
    live.mark()
    assert found() == (ChangedState.MARKED, None)
    live.leave(SEEN)
    assert found() == (ChangedState.LEFT, SEEN)
    live.mark()
    assert found() == (ChangedState.MARKED, None)
    live.make_void()
    assert found() == (ChangedState.VOID, None)


def test_a_map_of_another_boot_or_mount_says_nothing(live: ChangedMap, path: Path) -> None:
    for boot in (LATER_BOOT, type(BOOT)(BOOT.boot_id, BOOT.mount_id + 1)):
        assert ChangedMap.open(FILES, path, boot=boot) is None
    assert reopened(path) == live.changed()


def test_a_missing_cut_or_damaged_map_says_nothing(live: ChangedMap, path: Path) -> None:
    assert ChangedMap.open(FILES, path.with_name("43"), boot=BOOT) is None
    whole = path.read_bytes()
    other = path.with_name("44")
    for raw in (b"", whole[:100], whole[:UNIT], whole[:-1], whole + bytes(UNIT), b"\0" + whole[1:]):
        other.write_bytes(raw)
        assert ChangedMap.open(FILES, other, boot=BOOT) is None
    unknown = whole[:_STATE_AT] + b"\xff" + whole[_STATE_AT + 1 :]
    other.write_bytes(unknown)
    found = ChangedMap.open(FILES, other, boot=BOOT)
    assert found is not None
    assert found.state is ChangedState.VOID
    found.close()
    assert live.state is ChangedState.MADE


_STATE_AT = 3072


class Full(FileCalls):
    """A filesystem without room, at one site."""

    def __init__(self, site: str) -> None:
        self.site = site

    def call(self, site: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if site == self.site:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)


def test_a_full_filesystem_is_an_error_and_leaves_no_map(path: Path) -> None:
    for site in ("changes.begin", "changes.allocate", "changes.map"):
        with pytest.raises(OSError, match="space"):
            ChangedMap.create(Full(site), path, identity=IDENTITY, boot=BOOT, changed=changed(7))
        found = ChangedMap.open(FILES, path, boot=BOOT)
        if found is not None:  # it was named before: then it says that nothing was written
            assert found.state is ChangedState.MADE
            found.close()


def test_where_there_is_no_room_for_a_bit_nothing_is_touched(path: Path) -> None:
    files = Full("none")
    made = ChangedMap.create(files, path, identity=IDENTITY, boot=BOOT, changed=changed())
    try:
        made.mark()
        made.set_changed(0, 1)
        files.site = "changes.allocate"
        with pytest.raises(OSError, match="space"):
            made.set_changed(90_000 * CHUNK, 1)
        made.set_changed(CHUNK, 1)
        made.make_void()
    finally:
        made.close()
    found = ChangedMap.open(FILES, path, boot=BOOT)
    assert found is not None
    assert (found.state, found.changed()) == (ChangedState.VOID, changed(0, 1))
    found.close()
