"""Restore writes what was backed up, whole or not at all, and is not led astray by a hostile store."""

from __future__ import annotations

import os
import random
import shutil
import stat
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import back_up, stored_file

from vmfs_stub.core.errors import (
    AlreadyExists,
    CorruptFrame,
    CorruptManifest,
    IntegrityError,
    NoSpace,
    ObjectMissing,
    StoreUnavailable,
)
from vmfs_stub.services import restore
from vmfs_stub.services.point_writer import _implied_folders
from vmfs_stub.services.restore import restore_point
from vmfs_stub.store import manifest as manifests
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.manifest import FileKind, StoredFile, decode_manifest, encode_manifest
from vmfs_stub.store.store import Store

RANDOM = random.Random(7)
DISK = RANDOM.randbytes(300_000) + bytes(5_000_000) + RANDOM.randbytes(9_000_001)
MARKED = ("disk.raw", "nvram")
LINK = stored_file("link", 0, kind=FileKind.SYMLINK, target="disk.raw")
FOLDER = stored_file("nvram", 0, kind=FileKind.DIRECTORY, mode=0o750)


@pytest.fixture
def store(objects: FakeObjects, source: KeySource | None) -> Store:
    return Store.create(objects, source=source)


def _point(store: Store, contents: dict[str, bytes], extra: tuple[StoredFile, ...] = ()) -> RestorePoint:
    made = back_up(store, contents, extra=extra)
    return store.open_point(made.vm_id, made.point_id)


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_come_back_with_their_attributes(store: Store, tmp_path: Path) -> None:
    point = _point(store, {"disk.raw": DISK, "nvram/vars.fd": b"vars", "deep/er/empty": b""}, (LINK, FOLDER))
    xattrs = {"user.note": b"\0\xff", "security.capability": b"no"}
    marked = tuple(replace(each, xattrs=xattrs) if each.path in MARKED else each for each in point.manifest.files)
    point = RestorePoint(replace(point.manifest, files=marked), point.segments)
    done: list[int] = []
    report = restore_point(store, point, tmp_path / "out", progress=done.append)
    out = tmp_path / "out"
    assert _tree(out) == ["deep", "deep/er", "deep/er/empty", "disk.raw", "link", "nvram", "nvram/vars.fd"]
    assert (out / "disk.raw").read_bytes() == DISK
    assert (out / "nvram/vars.fd").read_bytes() == b"vars"
    assert (out / "link").readlink() == Path("disk.raw")
    for path, mode in (("disk.raw", 0o640), ("nvram", 0o750)):
        status = (out / path).stat()
        assert stat.S_IMODE(status.st_mode) == mode
        assert status.st_mtime_ns == 1_700_000_000_123_456_789
    assert (out / "link").lstat().st_mtime_ns == 1_700_000_000_123_456_789
    for path in MARKED:
        assert os.getxattr(out / path, "user.note") == b"\0\xff"
    (warning,) = report.warnings
    assert warning.endswith(" and 1 others: xattr 'security.capability' is not one that is restored")
    assert sum(done) == report.size_bytes == len(DISK) + 4
    assert report.file_count == 5


def test_zeros_are_holes(store: Store, tmp_path: Path) -> None:
    size = 40_000_000
    point = _point(store, {"disk.raw": bytes(20_000_000) + b"x" + bytes(size - 20_000_001)})
    report = restore_point(store, point, tmp_path / "out")
    status = (tmp_path / "out/disk.raw").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 <= 128 * 1024
    assert report.written_bytes == store.chunk_size


def test_nothing_is_overwritten(store: Store, tmp_path: Path) -> None:
    point = _point(store, {"a.raw": b"a", "b.raw": b"b"})
    (tmp_path / "b.raw").symlink_to("/nowhere")
    with pytest.raises(AlreadyExists, match=r"b\.raw"):
        restore_point(store, point, tmp_path)
    assert _tree(tmp_path) == ["b.raw"]


def test_what_appears_meanwhile_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    point = _point(store, {"a.raw": b"restored"})

    def interfere(_: int) -> None:
        (tmp_path / "a.raw").write_bytes(b"somebody else's")

    with pytest.raises(AlreadyExists):
        restore_point(store, point, tmp_path, progress=interfere)
    assert (tmp_path / "a.raw").read_bytes() == b"somebody else's"
    assert _tree(tmp_path) == ["a.raw"]


@pytest.mark.parametrize("fault", [CorruptFrame, ObjectMissing, StoreUnavailable])
def test_a_failure_leaves_nothing(objects: FakeObjects, store: Store, tmp_path: Path, fault: type[Exception]) -> None:
    point = _point(store, {"disk.raw": DISK})
    reads = iter(range(100))

    def fail(call: str, key: str) -> None:
        if call == "get_range" and next(reads) == 2:
            raise fault(key)

    objects.before = fail
    with pytest.raises(fault):
        restore_point(store, point, tmp_path)
    assert _tree(tmp_path) == []


def test_a_full_disk_is_said(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = _point(store, {"disk.raw": b"x"})

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(restore.os, "pwritev", full)
    with pytest.raises(NoSpace, match="restore to"):
        restore_point(store, point, tmp_path)
    assert _tree(tmp_path) == []


def test_short_writes_are_continued(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = _point(store, {"disk.raw": DISK})
    monkeypatch.setattr(restore.os, "pwritev", lambda fd, chunks, offset: os.pwrite(fd, chunks[0][:1000], offset))
    restore_point(store, point, tmp_path)
    assert (tmp_path / "disk.raw").read_bytes() == DISK


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "/etc/evil",
        "a/../../evil",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "a\0b",
        "x" * 300,
        "./a",
        "\ud800",
        "a/" * 256 + "b",
    ],
)
def test_a_manifest_with_a_hostile_path_is_refused(objects: FakeObjects, store: Store, path: str) -> None:
    point = _point(store, {"a": b"x"})
    hostile = replace(point.manifest, files=(stored_file(path, 0),))
    _plant(store, hostile)
    with pytest.raises(CorruptManifest, match="path"):
        store.open_point(hostile.vm_id, hostile.point_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": FileKind.SYMLINK, "target": "a\ud8ff"},
        {"kind": FileKind.SYMLINK, "target": "a\0b"},
        {"kind": FileKind.SYMLINK, "target": ""},
        {"kind": FileKind.SYMLINK, "target": "\u00e9" * 3_000},
        {"xattrs": {"user.a\0b": b"1"}},
        {"xattrs": {"user.\ud8ff": b"1"}},
        {"xattrs": {"": b"1"}},
        {"xattrs": {"user." + "x" * 251: b"1"}},
    ],
)
def test_a_manifest_with_names_that_no_file_system_takes_is_refused(
    objects: FakeObjects, store: Store, fields: dict[str, object]
) -> None:
    point = _point(store, {"a": b"x"})
    hostile = replace(point.manifest, files=(stored_file("a", 0, **fields),))
    _plant(store, hostile)
    with pytest.raises(CorruptManifest, match=r"target|xattrs"):
        store.open_point(hostile.vm_id, hostile.point_id)


def test_deep_paths_cost_no_more_than_their_length(store: Store, tmp_path: Path) -> None:
    """All folders of 100 such paths together would be 50 MB."""
    point = _point(store, {"a": b"x"})
    deep = tuple(stored_file(f"{number:03d}/" + "a name of 14 B/" * 254 + "b", 0) for number in range(100))
    data = encode_manifest(replace(point.manifest, files=deep))
    tracemalloc.start()
    try:
        manifest = decode_manifest(data, "manifests/x")
        assert sum(1 for _ in _implied_folders(manifest.files)) == 100 * 255
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()


def test_the_deepest_path_is_restored_and_removed_again(store: Store, tmp_path: Path) -> None:
    point = _point(store, {"a": b"x"})
    deep = (stored_file("a/" * 255 + "b", 0),)
    report = restore_point(store, replace(point, manifest=replace(point.manifest, files=deep)), tmp_path / "out")
    assert report.file_count == 1
    assert (tmp_path / "out" / ("a/" * 255 + "b")).is_file()
    shutil.rmtree(tmp_path / "out")


def test_folders_that_are_only_in_paths_are_found_once() -> None:
    paths = ("a/b/c", "a/b-c/d", "a/b/d/e", "a", "f/g", "f-/g")
    kinds = [FileKind.DIRECTORY if path == "a" else FileKind.FILE for path in paths]
    files = [stored_file(path, 0, kind=kind) for path, kind in zip(paths, kinds, strict=True)]
    assert sorted(_implied_folders(files)) == ["a/b", "a/b-c", "a/b/d", "f", "f-"]


@pytest.mark.parametrize("paths", [("a", "a"), ("a/b", "a"), ("a", "a/b/c"), ("a", "a-b", "a/b"), ("a/b/c/d", "a/b")])
def test_a_manifest_that_is_no_tree_is_refused(objects: FakeObjects, store: Store, paths: tuple[str, ...]) -> None:
    point = _point(store, {"x": b"x"})
    hostile = replace(point.manifest, files=tuple(stored_file(path, 0) for path in paths))
    _plant(store, hostile)
    with pytest.raises(CorruptManifest):
        store.open_point(hostile.vm_id, hostile.point_id)


def test_a_symlink_in_the_point_is_not_followed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the manifest's own check were gone, nothing is written through a symlink."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    point = _point(store, {"a": b"x"})
    files = (stored_file("a", 0, kind=FileKind.SYMLINK, target=str(outside)), stored_file("a/evil", 0))
    with pytest.raises((AlreadyExists, IntegrityError)):
        restore_point(store, RestorePoint(replace(point.manifest, files=files), point.segments), tmp_path / "out")
    assert _tree(outside) == []
    assert _tree(tmp_path / "out") == []


def _plant(store: Store, hostile: manifests.Manifest) -> None:
    """As who has the key, if there is one."""
    store.objects.put(f"manifests/{hostile.vm_id}/{hostile.point_id}", encode_manifest(hostile), if_absent=False)


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert len(set(Path("/proc/self/fd").iterdir())) <= len(before)
