"""The way out: what is left are plain files, and nothing of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, noise

from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.core.names import PLACEHOLDER_XATTR, XATTR_PREFIX
from vmfs_stub.mount.mountpoint import is_immutable, is_mounted

CONTENTS = {f"vm{number}": noise(20 * MIB, seed=number) for number in range(3)}


@pytest.fixture
def archived(make_datastore: MakeDatastore) -> LiveDatastore:
    """Two placeholders, of which one was written to, and one VM that never was one."""
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.mountpoint.chmod(0o751)
    for name, content in CONTENTS.items():
        datastore.add_vm(name, content)
    (datastore.mountpoint / "vm0" / "link").symlink_to("disk.raw")
    datastore.archive("vm0", "vm1")
    with (datastore.mountpoint / "vm1/disk.raw").open("r+b") as disk:
        disk.write(b"written since")
    return datastore


def assert_plain(top: Path) -> None:
    """All is there as it was, and nothing of ours; then it is removed."""
    for name, content in CONTENTS.items():
        wanted = b"written since" + content[13:] if name == "vm1" else content
        assert (top / name / "disk.raw").read_bytes() == wanted
    assert (top / "vm0/link").readlink() == Path("disk.raw")
    assert sorted(path.name for path in top.iterdir()) == sorted(CONTENTS)
    for path in (top, *top.rglob("*")):
        assert [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(XATTR_PREFIX)] == []
    assert top.stat().st_mode & 0o7777 == 0o751
    shutil.rmtree(top)


def test_plain_files_are_left_at_the_old_path(archived: LiveDatastore) -> None:
    archived.cli("leave", check=0)
    assert archived.daemon is not None
    assert archived.daemon.wait(timeout=10) == 0
    assert not is_mounted(archived.mountpoint)
    assert not is_immutable(archived.mountpoint)
    assert not archived.backing.exists()
    assert archived.pins() == []
    assert_plain(archived.mountpoint)
    archived.cli("restore", "vm0", "--to", archived.base / "out", "--store", archived.store_url, check=0)


def test_it_is_refused_while_a_disk_is_open_and_then_goes_on(archived: LiveDatastore) -> None:
    with (archived.mountpoint / "vm2/disk.raw").open("rb"):
        refused = archived.cli("leave")
    assert refused.code == ExitCode.REFUSED, refused
    assert is_mounted(archived.mountpoint)
    assert {row["state"] for row in archived.rows()} == {"resident"}
    archived.cli("leave", check=0)
    assert_plain(archived.mountpoint)


def test_without_the_store_nothing_is_taken_away(archived: LiveDatastore) -> None:
    away = (archived.store / "packs").rename(archived.store / "away")
    refused = archived.cli("leave")
    assert refused.code == ExitCode.STORE, refused
    assert is_mounted(archived.mountpoint)
    archived.stop()
    assert archived.cli("leave").code == ExitCode.UNREACHABLE, "only a daemon can bring back what is away"
    assert len(archived.durable_maps()) == 2
    away.rename(archived.store / "packs")
    archived.start()
    archived.cli("leave", check=0)
    assert_plain(archived.mountpoint)


def test_a_copied_placeholder_stops_it_before_anything_is_taken_away(archived: LiveDatastore) -> None:
    source, copy = archived.backing / "vm0/disk.raw", archived.backing / "vm0/copy.raw"
    record = os.getxattr(source, PLACEHOLDER_XATTR)
    archived.recall("vm0", "vm1")
    archived.stop()
    copy.write_bytes(b"")
    os.setxattr(copy, PLACEHOLDER_XATTR, record)
    refused = archived.cli("leave")
    assert (refused.code, "copy.raw" in refused.err) == (ExitCode.REFUSED, True), refused
    assert (archived.backing / ".vmfs-stub").exists()
    copy.unlink()
    archived.cli("leave", check=0)
    assert_plain(archived.mountpoint)
