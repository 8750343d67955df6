"""One user's very many files: refused to that user in time, and no I/O error for anybody else."""

from __future__ import annotations

import contextlib
import errno
import os
import resource

import pytest
from live_datastore import BLOCK, MIB, QUIET, LiveDatastore, MakeDatastore, merged, noise

DESCRIPTORS = 512


def limited(make_datastore: MakeDatastore) -> LiveDatastore:
    """A datastore with an archived VM, whose daemon may have few descriptors."""
    datastore = make_datastore(merged(QUIET, {"archive": {"placeholder_bytes_min": BLOCK}}))
    datastore.start()
    datastore.add_vm("victim", noise(4 * MIB, seed=1))
    datastore.archive("victim")
    assert datastore.daemon is not None
    resource.prlimit(datastore.daemon.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    return datastore


def test_files_that_one_user_makes_and_lists(make_datastore: MakeDatastore) -> None:
    datastore = limited(make_datastore)
    many = datastore.mountpoint / "many"
    many.mkdir()
    made = 0
    with pytest.raises(OSError, match="Too many open files in system") as failure:
        for made in range(2 * DESCRIPTORS):
            os.mknod(many / f"{made}")
    assert (failure.value.errno, made > DESCRIPTORS // 4) == (errno.ENFILE, True)
    assert not (datastore.backing / "many" / f"{made}").exists()
    assert (datastore.mountpoint / "victim/disk.raw").read_bytes() == noise(4 * MIB, seed=1)
    datastore.archive("victim")
    datastore.cli("ls", check=0)


def test_files_that_one_user_opens(make_datastore: MakeDatastore) -> None:
    datastore = limited(make_datastore)
    many = datastore.mountpoint / "many"
    many.mkdir()
    for number in range(DESCRIPTORS // 4):
        os.mknod(many / f"{number}")
    with contextlib.ExitStack() as stack:
        victim = stack.enter_context((datastore.mountpoint / "victim/disk.raw").open("rb"))
        with pytest.raises(OSError, match="Too many open files in system"):
            for number in range(DESCRIPTORS // 4):
                stack.enter_context((many / f"{number}").open("rb"))
        assert number > DESCRIPTORS // 32  # each may need six, and all disks together have a quarter
        assert victim.read() == noise(4 * MIB, seed=1)
