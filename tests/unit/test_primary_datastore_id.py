"""Which datastore this is: made once, kept, and not taken from another one's directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmfs_stub.core.errors import CorruptRecord, UnknownFormat
from vmfs_stub.core.ids import DatastoreId
from vmfs_stub.primary.datastore_id import decode_datastore_id, load_datastore_id, load_or_make_datastore_id
from vmfs_stub.primary.envelope import seal
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.store.keys import is_id

FILES = FileCalls()


@pytest.fixture
def private(tmp_path: Path) -> Path:
    made = tmp_path / ".vmfs-stub"
    made.mkdir()
    return made


def test_it_is_made_once_and_kept(private: Path) -> None:
    made = load_or_make_datastore_id(FILES, private)
    assert is_id(made)
    assert load_or_make_datastore_id(FILES, private) == made
    assert [path.name for path in private.iterdir()] == ["datastore"]


def test_it_moves_with_the_directory(private: Path) -> None:
    made = load_or_make_datastore_id(FILES, private)
    moved = private.rename(private.with_name("elsewhere"))
    assert load_or_make_datastore_id(FILES, moved) == made


def test_a_copy_gets_an_id_of_its_own(private: Path) -> None:
    made = load_or_make_datastore_id(FILES, private)
    assert load_datastore_id(FILES, private) == made
    copy = shutil.copytree(private, private.with_name("copy"))
    assert load_datastore_id(FILES, copy) is None
    other = load_or_make_datastore_id(FILES, copy)
    assert other != made
    assert load_or_make_datastore_id(FILES, copy) == other
    assert load_or_make_datastore_id(FILES, private) == made


def test_a_crash_before_it_has_its_name_leaves_nothing_that_counts(private: Path) -> None:
    (private / "datastore.new").write_bytes(b"half of something longer than what is to be written" * 9)
    made = load_or_make_datastore_id(FILES, private)
    assert decode_datastore_id((private / "datastore").read_bytes())[0] == made


def test_one_that_cannot_be_read_is_refused_and_not_replaced(private: Path) -> None:
    load_or_make_datastore_id(FILES, private)
    path = private / "datastore"
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    with pytest.raises(CorruptRecord, match="delete it"):
        load_or_make_datastore_id(FILES, private)
    assert path.read_bytes() == damaged
    path.write_bytes(seal(b"VSTBDST\0", 2, {"datastore_id": DatastoreId("a" * 32), "ino": 1, "generation": 1}))
    with pytest.raises(UnknownFormat, match="version 2"):
        load_or_make_datastore_id(FILES, private)
