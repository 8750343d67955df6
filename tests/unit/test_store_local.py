"""The local directory is durable: what a put has acknowledged is on the medium, name included."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmfs_stub.core.errors import (
    CorruptPack,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from vmfs_stub.store import local
from vmfs_stub.store.local import TEMPORARY, TEMPORARY_AGE_S, LocalObjects
from vmfs_stub.store.retrying import RetryingObjects

KEY = "packs/ab/abcdef"


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[LocalObjects]:
    made = LocalObjects(tmp_path / "store")
    yield made
    made.close()


class Journal:
    """Records what is done to the disk, in order, by path relative to the store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[str, str]] = []

    def path(self, fd: int) -> str:
        return os.path.relpath(Path(f"/proc/self/fd/{fd}").readlink(), self.root)

    @contextmanager
    def recording(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("fsync", "pwritev", "link", "rename", "mkdir")}

        def by_fd(name: str) -> Callable[..., object]:
            def call(fd: int, *args: object) -> object:
                self.events.append((name, self.path(fd)))
                return real[name](fd, *args)

            return call

        def by_target(name: str) -> Callable[..., object]:
            def call(source: str, target: str, **kwargs: object) -> object:
                self.events.append((name, target))
                return real[name](source, target, **kwargs)

            return call

        def mkdir(path: str, mode: int, **kwargs: object) -> object:
            answer = real["mkdir"](path, mode, **kwargs)
            self.events.append(("mkdir", path))
            return answer

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "pwritev"):
                patch.setattr(os, name, by_fd(name))
            for name in ("link", "rename"):
                patch.setattr(os, name, by_target(name))
            patch.setattr(os, "mkdir", mkdir)
            yield


def not_durable(events: list[tuple[str, str]], key: str) -> list[str]:
    """What a power cut after these events could lose of ``key``: the model of a file system that keeps nothing else.

    A file's bytes need an fsync after the last write and before its name; a name, or a new folder, needs an fsync of
    the folder that it is in.
    """
    named = next((at for at, (call, path) in enumerate(events) if call in ("link", "rename") and path == key), None)
    if named is None:
        return ["the name was never made"]
    written = [at for at, (call, _) in enumerate(events) if call == "pwritev"]
    synced = [at for at, (call, path) in enumerate(events) if call == "fsync" and path.startswith(TEMPORARY)]
    lost = []
    if not synced or max(written) > synced[-1] or synced[-1] > named:
        lost.append("the bytes")
    entries = [(named, os.path.dirname(key) or ".")]
    entries += [(at, os.path.dirname(path) or ".") for at, (call, path) in enumerate(events) if call == "mkdir"]
    lost += [f"an entry of {folder}" for at, folder in entries if ("fsync", folder) not in events[at + 1 :]]
    return lost


@pytest.mark.parametrize("if_absent", [True, False])
def test_file_and_folders_are_synced_before_put_returns(objects: LocalObjects, if_absent: bool) -> None:
    journal = Journal(objects.root)
    with journal.recording():
        objects.put(KEY, b"bytes", if_absent=if_absent)
    assert not_durable(journal.events, KEY) == []
    assert ("mkdir", "packs/ab") in journal.events


def test_a_second_put_syncs_file_and_folder(objects: LocalObjects) -> None:
    objects.put(KEY, b"bytes")
    journal = Journal(objects.root)
    with journal.recording():
        objects.put("packs/ab/second", b"bytes")
    assert not_durable(journal.events, "packs/ab/second") == []


def test_folders_that_somebody_else_made_are_synced_too(objects: LocalObjects) -> None:
    (objects.root / "packs/ab").mkdir(parents=True)
    journal = Journal(objects.root)
    with journal.recording():
        objects.put(KEY, b"bytes")
    assert {path for call, path in journal.events if call == "fsync"} >= {".", "packs", "packs/ab"}


@pytest.mark.parametrize("victim", ["file", "folder", "parent"])
def test_the_check_finds_a_sync_that_is_left_out(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """The check above is proven by taking each of the syncs away."""
    journal = Journal(objects.root)
    real = os.fsync

    def forgetful(fd: int) -> None:
        path = journal.path(fd)
        kind = "file" if path.startswith(TEMPORARY) else "folder" if path == "packs/ab" else "parent"
        if kind != victim:
            journal.events.append(("fsync", path))
        real(fd)

    with journal.recording(), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", forgetful)
        objects.put(KEY, b"bytes")
    assert not_durable(journal.events, KEY)


def test_nothing_is_named_before_its_bytes_are_synced(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreUnavailable):
        objects.put("top", b"bytes")
    monkeypatch.undo()
    with pytest.raises(ObjectMissing):
        objects.get("top")
    assert list((objects.root / TEMPORARY).iterdir()) == []


def test_modes_are_private(objects: LocalObjects) -> None:
    previous = os.umask(0)
    try:
        objects.put(KEY, b"bytes")
    finally:
        os.umask(previous)
    for path in ("", TEMPORARY, "packs", "packs/ab"):
        assert stat.S_IMODE((objects.root / path).stat().st_mode) == 0o700
    assert stat.S_IMODE((objects.root / KEY).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
        (errno.ENOENT, StoreUnavailable),
    ],
)
def test_failed_writes_are_told_apart(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[StoreError]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local.os, "pwritev", fail)
    with pytest.raises(expected, match=KEY):
        objects.put(KEY, b"bytes")
    assert list((objects.root / TEMPORARY).iterdir()) == []


def test_short_writes_and_reads_are_continued(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwrite(fd, parts[0][:3], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:2]], offset))
    objects.put(KEY, b"more than three")
    assert objects.get(KEY) == b"more than three"
    assert objects.get_range(KEY, offset=5, length=4) == b"than"


def test_an_object_that_shrinks_while_read_is_an_error(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put(KEY, b"bytes")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CorruptPack, match="cut short"):
        objects.get_range(KEY, offset=0, length=5)


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_only_regular_files_are_objects(objects: LocalObjects, tmp_path: Path, kind: str) -> None:
    if kind == "symlink":
        (tmp_path / "secret").write_bytes(b"secret")
        (objects.root / "odd").symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(objects.root / "odd")
    with pytest.raises(StoreDenied):
        objects.get("odd")
    assert list(objects.list("")) == []


def test_leftovers_of_a_crash_are_swept_but_not_other_hosts_or_recent_ones(tmp_path: Path) -> None:
    first = LocalObjects(tmp_path)
    folder = tmp_path / TEMPORARY
    own = f"{os.uname().nodename}.x.1"
    (folder / own).write_bytes(b"old")
    (folder / "elsewhere.x.1").write_bytes(b"old")
    now = (folder / own).stat().st_mtime
    first.close()
    LocalObjects(tmp_path, clock=lambda: now + TEMPORARY_AGE_S - 1).close()
    assert {path.name for path in folder.iterdir()} == {own, "elsewhere.x.1"}
    LocalObjects(tmp_path, clock=lambda: now + TEMPORARY_AGE_S + 1).close()
    assert {path.name for path in folder.iterdir()} == {"elsewhere.x.1"}


def test_a_folder_removed_meanwhile_is_made_again_on_retry(objects: LocalObjects) -> None:
    objects.put(KEY, b"bytes")
    objects.delete(KEY)
    (objects.root / "packs/ab").rmdir()
    with pytest.raises(StoreUnavailable):
        objects.put(KEY, b"bytes")
    objects.put(KEY, b"bytes")
    assert objects.get(KEY) == b"bytes"


def test_the_root_moved_away_is_still_the_store(objects: LocalObjects, tmp_path: Path) -> None:
    """As when something is mounted over it: the descriptor, not the path, is the store."""
    objects.put(KEY, b"bytes")
    objects.root.rename(tmp_path / "moved")
    objects.root.mkdir()
    assert objects.get(KEY) == b"bytes"
    with pytest.raises(ObjectExists):
        objects.put(KEY, b"other")


def test_a_root_whose_parent_is_missing_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        LocalObjects(tmp_path / "a" / "b")


def test_a_name_that_is_taken_is_synced_before_that_is_said(objects: LocalObjects) -> None:
    """A caller that reuses the object depends on it as on its own."""
    objects.put(KEY, b"bytes")
    journal = Journal(objects.root)
    with journal.recording(), pytest.raises(ObjectExists):
        objects.put(KEY, b"bytes")
    assert ("fsync", "packs/ab") in journal.events


def test_a_retry_after_a_failed_folder_sync_syncs_again(objects: LocalObjects) -> None:
    objects.put("packs/ab/first", b"bytes")
    real, journal, fails = os.fsync, Journal(objects.root), iter([True])

    def failing_once(fd: int) -> None:
        path = journal.path(fd)
        if path == "packs/ab" and next(fails, False):
            raise OSError(errno.EIO, "Input/output error")
        journal.events.append(("fsync", path))
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing_once)
        RetryingObjects(objects, sleep=lambda _: None).put(KEY, b"bytes")
    assert journal.events[-1] == ("fsync", "packs/ab")
    assert objects.get(KEY) == b"bytes"
