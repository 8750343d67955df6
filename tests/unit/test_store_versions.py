"""What becomes of a store, and of those who use it, when its version is raised; with a version that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Run, runner

from tests.store_fakes import FakeObjects
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.core.errors import StoreConflict, UnknownFormat
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.store import documents
from vmfs_stub.store import format as store_format
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.format import decode_description, encode_description
from vmfs_stub.store.keyring import decode_seen, look_at
from vmfs_stub.store.keys import STORE_KEY, VERSIONS
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store
from vmfs_stub.store.versions import raise_version, version_of

CHUNK = 64 << 10


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects, chunk_size=CHUNK)


@contextmanager
def program_of(version: int) -> Iterator[None]:
    """A program that knows versions up to that one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "STORE_VERSION", version)
        yield


def test_a_newer_program_leaves_a_store_as_it_is_until_it_is_told(objects: FakeObjects, store: Store) -> None:
    before = dict(objects.contents)
    with program_of(3):
        Store.open(objects).check()
        assert version_of(objects, store.description) == 1
    assert objects.contents == before


def test_an_older_program_refuses_a_store_that_was_raised(objects: FakeObjects, store: Store) -> None:
    with program_of(3):
        assert raise_version(objects, store.description, 2) == 2
        Store.open(objects).check()
        assert raise_version(objects, store.description, 3) == 3
        assert raise_version(objects, store.description, 2) == 3, "it is never lowered"
    with program_of(2), pytest.raises(UnknownFormat, match="later version than 2"):
        Store.open(objects)
    with pytest.raises(UnknownFormat, match="use a newer vmfs-stub"):
        store.check()
    with pytest.raises(UnknownFormat):
        store.begin_backup(index=ChunkIndex(None, store.id))
    assert objects.contents[STORE_KEY] == encode_description(store.description)


def test_what_an_older_program_has_begun_is_not_committed(objects: FakeObjects, store: Store) -> None:
    index = ChunkIndex(None, store.id)
    writer = store.begin_backup(index=index)
    with program_of(2):
        raise_version(objects, store.description, 2)
    with pytest.raises(StoreConflict, match="raised to a version"):
        writer.commit(vm_id=VmId("1" * 32), point_id=PointId("2" * 32), vm_name="a", host="h", files=[], metadata={})
    assert store.vms() == []
    index.close()


def test_two_who_raise_it_at_once_both_have_it(objects: FakeObjects, store: Store) -> None:
    with program_of(2):
        objects.contents[f"{VERSIONS}2"] = b""
        assert raise_version(objects, store.description, 2) == 2


def test_a_store_that_a_newer_program_made(objects: FakeObjects, store: Store) -> None:
    body = {"store_id": store.id, "chunk_size": CHUNK, "compression": "lz4-block", "hash": "blake3-256"}
    objects.contents[STORE_KEY] = documents.encode("vmfs-stub store", 2, body)
    with program_of(2):
        description = Store.open(objects).description
        assert description.version == version_of(objects, description) == 2
        assert decode_seen(look_at(objects).encode()).description == description
        assert decode_description(encode_description(description)) == description
    with pytest.raises(UnknownFormat, match="version 2 is not known"):
        Store.open(objects)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run: Run = runner(monkeypatch, capsys, config=tmp_path / "none")
    (tmp_path / "store").mkdir()
    url = (tmp_path / "store").as_uri()
    made = Store.create(open_objects(StoreAt(url), create=True), chunk_size=CHUNK)
    done = run("store", "upgrade", "--store", url)
    assert done.code == 0
    assert f"store {made.id} is at version 1, the newest this program knows" in done.out
    assert run("store", "upgrade", "--to", "2", "--store", url).code == ExitCode.USAGE
    with program_of(2):
        assert "would be raised to 2" in run("store", "upgrade", "--dry-run", "--store", url).out
        assert (
            "is at version 1, and this program knows up to 2"
            in run("store", "upgrade", "--to", "1", "--store", url).out
        )
        assert "from version 1 to 2" in run("store", "upgrade", "--store", url).out
        assert run("store", "upgrade", "--to", "1", "--store", url).code == ExitCode.USAGE
        assert "is at version 2, the newest" in run("store", "upgrade", "--store", url).out
        assert run("points", "--store", url).code == 0
    assert run("points", "--store", url).code == ExitCode.UNKNOWN_FORMAT
    assert run("store", "upgrade", "--store", url).code == ExitCode.UNKNOWN_FORMAT
