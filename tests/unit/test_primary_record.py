"""The placeholder record: bound to its inode, and damaged by any change."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from tests.primary_samples import OTHER, record_of
from vmfs_stub.core.errors import CorruptRecord, IdentityMismatch, UnknownFormat
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.primary.envelope import FILE_TIME_NS_END, seal
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import inode_identity
from vmfs_stub.primary.record import check_identity, decode_record, encode_record, read_record


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 10_000)
    return path


@pytest.mark.parametrize("replaces", [None, OTHER])
def test_a_record_comes_back_from_the_attribute(disk: Path, replaces: str | None) -> None:
    record = dataclasses.replace(record_of(disk), replaces=replaces)
    assert read_record(FileCalls(), "test", str(disk), label="disk") is None
    os.setxattr(disk, PLACEHOLDER_XATTR, encode_record(record))
    assert read_record(FileCalls(), "test", str(disk), label="disk") == record


def test_every_flipped_byte_is_a_corrupt_record(disk: Path) -> None:
    raw = encode_record(record_of(disk))
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 0xFF
        with pytest.raises(CorruptRecord, match="the disk"):
            decode_record(bytes(changed), label="the disk")
        with pytest.raises(CorruptRecord):
            decode_record(raw[:at], label="the disk")


def test_a_newer_record_is_said_to_be_newer(disk: Path) -> None:
    with pytest.raises(UnknownFormat, match="version 2"):
        decode_record(seal(b"VSPHREC\0", 2, {}), label="disk")


def test_missing_and_unknown_fields_are_damage(disk: Path) -> None:
    fields = dataclasses.asdict(record_of(disk))
    for body in ({**fields, "more": 1}, {k: v for k, v in fields.items() if k != "size"}):
        with pytest.raises(CorruptRecord):
            decode_record(seal(b"VSPHREC\0", 1, body), label="disk")


@pytest.mark.parametrize(
    "change",
    [
        {"placeholder_id": "../../../etc/x"},
        {"placeholder_id": "A1" * 16},
        {"vm_id": 7},
        {"replaces": "/x"},
        {"size": "4096"},
        {"size": -1},
        {"size": 2**63},
        {"file_index": True},
        {"ino": 1.0},
        {"filesystem": None},
        {"filesystem": "x" * 256},
        {"mtime_ns": -FILE_TIME_NS_END - 1},
        {"mtime_ns": FILE_TIME_NS_END},
    ],
)
def test_a_whole_record_with_a_wrong_field_is_damage(disk: Path, change: dict[str, object]) -> None:
    """A right checksum does not make an id one: ids become names of files."""
    body = {**dataclasses.asdict(record_of(disk)), **change}
    with pytest.raises(CorruptRecord, match=next(iter(change))):
        decode_record(seal(b"VSPHREC\0", 1, body), label="disk")


def test_a_record_counts_only_on_its_own_inode(disk: Path) -> None:
    record = record_of(disk)
    os.setxattr(disk, PLACEHOLDER_XATTR, encode_record(record))
    copy = disk.with_name("copy.img")
    shutil.copyfile(disk, copy)
    os.setxattr(copy, PLACEHOLDER_XATTR, os.getxattr(disk, PLACEHOLDER_XATTR))
    renamed = disk.rename(disk.with_name("renamed.img"))
    for path, is_copy in ((renamed, False), (copy, True)):
        fd = os.open(path, os.O_RDONLY)
        try:
            found = read_record(FileCalls(), "test", fd, label="disk")
            assert found == record
            if is_copy:
                with pytest.raises(IdentityMismatch, match="copy"):
                    check_identity(found, inode_identity(fd), label="disk")
            else:
                check_identity(found, inode_identity(fd), label="disk")
        finally:
            os.close(fd)


def test_the_same_inode_number_again_is_another_inode(disk: Path) -> None:
    record = record_of(disk)
    with pytest.raises(IdentityMismatch):
        check_identity(record, dataclasses.replace(record.identity, generation=record.generation + 1), label="disk")
