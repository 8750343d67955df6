"""Directories and links of a VM that is being backed up, while its user renames and removes them."""

from __future__ import annotations

import errno
import os
import pickle
import struct
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.tree import Entry, OnError
from vmfs_stub.services import stored_files
from vmfs_stub.services.stored_files import other_entries

_NO_ID = 0xFFFFFFFF
DEFAULT_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((0x01, 7, _NO_ID), (0x02, 7, 1000), (0x04, 5, _NO_ID), (0x10, 7, _NO_ID), (0x20, 0, _NO_ID))
)
"""What `setfacl -d -m u:1000:rwx` makes: owner, user 1000, group, mask, others."""
VM = Vm(VmId("0" * 32), "vm", "vm", True, ())


def test_directories_and_links_outermost_first(tmp_path: Path) -> None:
    (tmp_path / "vm/b/c").mkdir(parents=True)
    (tmp_path / "vm/b/c/link").symlink_to("/nowhere")
    (tmp_path / "vm/a").touch()
    found = other_entries(tmp_path, VM).stored
    assert [(each.path, each.kind.value, each.target) for each in found] == [
        ("b", "directory", None),
        ("b/c", "directory", None),
        ("b/c/link", "symlink", "/nowhere"),
    ]
    assert pickle.loads(pickle.dumps(found)) == found, "they go to the data mover"


def test_the_top_is_told_with_all_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir(mode=0o700)
    os.setxattr(tmp_path / "vm", "user.note", b"x")
    os.setxattr(tmp_path / "vm", "trusted.vmfs-stub.vm", b"ours")
    top = other_entries(tmp_path, VM).top
    assert top is not None
    assert (top.path, top.kind.value, top.mode, top.xattrs) == ("vm", "directory", 0o700, {"user.note": b"x"})
    assert pickle.loads(pickle.dumps(top)) == top
    assert other_entries(tmp_path, replace(VM, is_directory=False)).top is None


def test_attributes_of_directories_are_kept_and_our_own_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "vm/b"
    folder.mkdir(parents=True)
    os.setxattr(folder, "system.posix_acl_default", DEFAULT_ACL)
    os.setxattr(folder, "user.note", b"x")
    os.setxattr(folder, "trusted.vmfs-stub.vm", b"ours")
    (found,) = other_entries(tmp_path, VM).stored
    assert set(found.xattrs) == {"user.note", "system.posix_acl_default"}
    assert found.xattrs["system.posix_acl_default"] == DEFAULT_ACL


def test_what_no_backup_holds_is_named(tmp_path: Path) -> None:
    (tmp_path / "vm/b").mkdir(parents=True)
    os.mkfifo(tmp_path / "vm/b/fifo")
    found = other_entries(tmp_path, VM)
    assert ([each.path for each in found.stored], found.left_out) == (["b"], ["b/fifo"])


@pytest.mark.parametrize(("code", "fails"), [(errno.ENOENT, False), (errno.ENOTDIR, False), (errno.EIO, True)])
def test_what_vanishes_is_left_out_and_what_cannot_be_read_fails_this_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    (tmp_path / "vm/b").mkdir(parents=True)
    walk = stored_files.walk

    def losing(top_fd: int, on_error: OnError, *, site: str, files: FileCalls) -> Generator[Entry, None, None]:
        on_error("a\udcff", OSError(code, os.strerror(code)))
        yield from walk(top_fd, on_error, site=site, files=files)

    monkeypatch.setattr(stored_files, "walk", losing)
    if fails:
        with pytest.raises(PrimaryIOError, match=r"VM vm: cannot read a\\xff: "):
            other_entries(tmp_path, VM)
    else:
        assert [each.path for each in other_entries(tmp_path, VM).stored] == ["b"]


def test_a_vm_that_is_gone_fails_by_name(tmp_path: Path) -> None:
    with pytest.raises(PrimaryIOError, match="VM vm: cannot read its directory"):
        other_entries(tmp_path, VM)
