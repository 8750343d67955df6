"""The top directory: open to hypervisors' users through the mount, while the backing directory stays closed."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from plain_mount import PlainMount


def test_others_reach_their_disks_while_the_backing_directory_is_closed(mounted: PlainMount) -> None:
    mounted.backing.chmod(0o700)
    (mounted.mountpoint / "open").write_text("text")
    (mounted.mountpoint / "open").chmod(0o644)
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"]
    assert subprocess.run([*as_nobody, mounted.mountpoint / "open"], capture_output=True, check=True).stdout == b"text"
    assert subprocess.run([*as_nobody, mounted.backing / "open"], capture_output=True, check=False).returncode != 0
    (mounted.mountpoint / "open").unlink()


def test_mode_of_the_top_is_shown_and_not_applied(mounted: PlainMount) -> None:
    mounted.backing.chmod(0o700)
    assert mounted.mountpoint.stat().st_mode & 0o7777 == 0o755
    mounted.mountpoint.chmod(0o711)
    assert mounted.mountpoint.stat().st_mode & 0o7777 == 0o711
    assert mounted.backing.stat().st_mode & 0o7777 == 0o700
    mounted.mountpoint.chmod(0o755)


def test_top_keeps_its_owner_and_takes_no_acl(mounted: PlainMount) -> None:
    with pytest.raises(PermissionError):
        os.chown(mounted.mountpoint, 65534, -1)
    acl = bytes.fromhex("0200000001000700ffffffff02000700feff000004000500ffffffff10000700ffffffff20000500ffffffff")
    with pytest.raises(OSError) as caught:
        os.setxattr(mounted.mountpoint, "system.posix_acl_access", acl)
    assert caught.value.errno == errno.EOPNOTSUPP
