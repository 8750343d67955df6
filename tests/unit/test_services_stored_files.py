"""Directories and links of a VM that is being backed up, while its user renames and removes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.ids import VmId
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.tree import Entry, OnError
from vmfs_stub.services import stored_files
from vmfs_stub.services.stored_files import other_entries

VM = Vm(VmId("0" * 32), "vm", "vm", True, ())


def test_directories_and_links_outermost_first(tmp_path: Path) -> None:
    (tmp_path / "vm/b/c").mkdir(parents=True)
    (tmp_path / "vm/b/c/link").symlink_to("/nowhere")
    (tmp_path / "vm/a").touch()
    found = other_entries(tmp_path, VM)
    assert [(each.path, each.kind.value, each.target) for each in found] == [
        ("b", "directory", None),
        ("b/c", "directory", None),
        ("b/c/link", "symlink", "/nowhere"),
    ]


@pytest.mark.parametrize(("code", "fails"), [(errno.ENOENT, False), (errno.ENOTDIR, False), (errno.EIO, True)])
def test_what_vanishes_is_left_out_and_what_cannot_be_read_fails_this_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    (tmp_path / "vm/b").mkdir(parents=True)
    walk = stored_files.walk

    def losing(top_fd: int, on_error: OnError) -> Iterator[Entry]:
        on_error("a\udcff", OSError(code, os.strerror(code)))
        yield from walk(top_fd, on_error)

    monkeypatch.setattr(stored_files, "walk", losing)
    if fails:
        with pytest.raises(PrimaryIOError, match=r"VM vm: cannot read a\\xff: "):
            other_entries(tmp_path, VM)
    else:
        assert [each.path for each in other_entries(tmp_path, VM)] == ["b"]


def test_a_vm_that_is_gone_fails_by_name(tmp_path: Path) -> None:
    with pytest.raises(PrimaryIOError, match="VM vm: cannot read its directory"):
        other_entries(tmp_path, VM)
