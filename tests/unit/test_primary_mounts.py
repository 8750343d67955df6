"""A backing filesystem that is mounted anew in the same boot, and one that only looks so from another namespace."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.primary_samples import BOOT
from tests.unit.test_primary_placeholder import FILES, Primary, drop, primary, resident
from vmfs_stub.core.errors import MapFrozen, MapMissing
from vmfs_stub.primary.placeholder import take_up

__all__ = ["primary"]

OTHER_MOUNT = replace(BOOT, mount_id=BOOT.mount_id + 1)


def mount_anew(primary: Primary) -> None:
    primary.private = replace(primary.private, boot=OTHER_MOUNT)


def test_unsynced_bits_and_a_new_mount_are_an_error_that_changes_nothing(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 8)
    drop(maps)
    before = primary.volatile_path.read_bytes()
    mount_anew(primary)
    for _ in range(2):
        with pytest.raises(MapFrozen, match="mounted anew"):
            primary.take_up()
    assert primary.volatile_path.read_bytes() == before
    primary.private = replace(primary.private, boot=BOOT)
    maps = primary.take_up()
    assert resident(maps) == {2, 3, 7}
    drop(maps)


def test_a_cut_file_counts_as_unsynced(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.lower_archived_limit(4096)
    drop(maps)
    mount_anew(primary)
    with pytest.raises(MapFrozen):
        primary.take_up()


def test_with_everything_synced_a_new_mount_goes_on(primary: Primary) -> None:
    maps = primary.take_up()
    maps.live.set_resident(7, 8)
    maps.sync(FILES, primary.fd, maps.live.take_dirty(), maps.current_header())
    drop(maps)
    mount_anew(primary)
    for _ in range(2):
        maps = primary.take_up()
        assert resident(maps) == {2, 3, 7}
        maps.live.set_resident(9, 10)
        assert primary.header().live == OTHER_MOUNT
        drop(maps)
        maps = primary.take_up()
        assert resident(maps) == {2, 3, 7, 9}
        maps.sync(FILES, primary.fd, maps.live.take_dirty(), maps.current_header())
        drop(maps)
        primary.private = replace(primary.private, boot=replace(OTHER_MOUNT, mount_id=OTHER_MOUNT.mount_id + 1))
        maps = primary.take_up()
        assert resident(maps) == {2, 3, 7, 9}
        drop(maps)
        return


def test_a_lost_volatile_map_is_an_error_after_a_new_mount_too(primary: Primary) -> None:
    drop(primary.take_up())
    primary.volatile_path.unlink()
    mount_anew(primary)
    with pytest.raises(MapMissing):
        take_up(FILES, primary.fd, primary.private, label="disk")


_SHOW = """
import os, sys
from vmfs_stub.primary import identity
identity.INIT_ROOT = sys.argv[1]
print(identity.boot_identity(os.open(sys.argv[2], os.O_RDONLY)).mount_id)
"""


def test_a_private_mount_namespace_is_the_same_mount(tmp_path: Path) -> None:
    """Process 1 may be out of reach where tests run, so any process outside the namespace stands for it."""
    outside = subprocess.Popen(["sleep", "60"])
    try:
        root = f"/proc/{outside.pid}/root"

        def mount_id(*before: str, init_root: str = root) -> str:
            command = [*before, sys.executable, "-c", _SHOW, init_root, str(tmp_path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        private = ("unshare", "--mount", "--propagation", "unchanged")
        assert mount_id(*private) == mount_id()
        # The checker sees a difference where there is one.
        assert mount_id(*private, init_root="/nowhere") != mount_id()
    finally:
        outside.kill()
        outside.wait()
