"""A host is lost: another one adopts what the store has, and the VMs are there as they were."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, forget_pages, noise

from scripts.lab.appearance import appearance
from vmfs_stub.cli.exit_codes import ExitCode

SIZE = 6 * MIB
VARS = noise(64 << 10, seed=9)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (1, 6, 2**32 - 1),
        (2, 4, 1234),
        (4, 4, 2**32 - 1),
        (16, 6, 2**32 - 1),
        (32, 0, 2**32 - 1),
    )
)
"""An access list that lets one more user read."""


def add_vms(datastore: LiveDatastore) -> None:
    """One with all that a VM can have, and one that is a single file."""
    disk = datastore.add_vm("web", noise(SIZE, seed=1))
    top = disk.parent
    (top / "state" / "empty").mkdir(parents=True)
    (top / "state" / "vars.fd").write_bytes(VARS)
    (top / "state" / "second.raw").write_bytes(noise(SIZE, seed=2))
    (top / "current").symlink_to("disk.raw")
    os.setxattr(disk, "user.note", b"kept")
    os.setxattr(disk, "system.posix_acl_access", ACL)
    os.setxattr(top / "state", "system.posix_acl_default", ACL)
    os.chown(disk, 1000, 1001)
    os.chown(top / "current", 1000, 1001, follow_symlinks=False)
    os.chown(top, 0, 1001)
    (top / "state" / "vars.fd").chmod(0o600)
    for number, path in enumerate([*sorted(top.rglob("*"), reverse=True), top]):
        os.utime(path, ns=(10**18, 10**18 + number * 1_000_000_007), follow_symlinks=False)
    top.chmod(0o2750)
    flat = datastore.mountpoint / "flat.img"
    flat.write_bytes(noise(SIZE, seed=3))
    flat.chmod(0o604)


def lose(datastore: LiveDatastore) -> None:
    """The host, and all of the datastore that was not in the store."""
    datastore.stop()
    shutil.rmtree(datastore.backing)
    shutil.rmtree(datastore.runtime)


def outcomes(datastore: LiveDatastore, *words: str, check: int) -> dict[str, dict[str, Any]]:
    found = json.loads(datastore.cli("adopt", *words, "--json", check=check).out)
    return {each["vm"]: each for each in found}


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_lost_host_comes_back_from_the_store_alone(
    make_datastore: MakeDatastore, base: Path, is_encrypted: bool
) -> None:
    key = ("--key-file", base / "key") if is_encrypted else ()
    lost = make_datastore(QUIET, *(("--encrypt",) if is_encrypted else ()), *key)
    lost.start()
    add_vms(lost)
    before = appearance(lost.mountpoint)
    lost.archive("web", "flat")
    lose(lost)
    new = make_datastore(QUIET, *key, store=lost.store)
    new.start()
    for name in ("web", "flat.img"):
        assert not (new.mountpoint / name).exists()  # which the kernel remembers
    found = outcomes(new, "--all", check=0)
    assert {vm: each["outcome"] for vm, each in found.items()} == {"web": "adopted", "flat": "adopted"}
    assert sorted(found["web"]["placeholders"]) == ["web/disk.raw", "web/state/second.raw"]
    assert appearance(new.mountpoint) == before
    assert {row["disk"]: row["state"] for row in new.rows()} == {
        "disk.raw": "placeholder",
        "state/second.raw": "placeholder",
        "state/vars.fd": "resident",
        "flat.img": "placeholder",
    }
    pins = json.loads(new.cli("points", "--json", check=0).out)
    assert {row["vm"]: (row["pins"], row["deleted"]) for row in pins} == {"web": (4, False), "flat": (2, False)}
    again = new.cli("adopt", "web", check=ExitCode.REFUSED)
    assert "is here already" in again.err
    assert new.cli("adopt", "--all", check=0).out == "every VM of the store is here\n"
    job = new.wait_job(new.client.start_backup(["web"], archive=False))
    assert job.result is not None
    assert job.result["vms"][0]["read_bytes"] == len(VARS)
    new.crash()
    contents = {"web/disk.raw": 1, "web/state/second.raw": 2, "flat.img": 3}
    for path, seed in contents.items():
        assert (new.mountpoint / path).read_bytes() == noise(SIZE, seed=seed), path
    assert (new.mountpoint / "web/state/vars.fd").read_bytes() == VARS
    new.recall("web", "flat")
    for path, seed in contents.items():
        forget_pages(new.mountpoint / path)
        assert (new.mountpoint / path).read_bytes() == noise(SIZE, seed=seed), path
    assert new.durable_maps() == []
    assert new.cli("status").code == 0


def test_one_vm_that_cannot_be_adopted_stops_no_other(make_datastore: MakeDatastore) -> None:
    lost = make_datastore(QUIET)
    lost.start()
    for number, name in enumerate(("db", "mail", "web")):
        lost.add_vm(name, noise(SIZE, seed=number))
    lost.archive("db", "mail", "web")
    lost.recall("mail")  # from here on it is claimed there
    lose(lost)
    new = make_datastore(QUIET, store=lost.store)
    new.start()
    (new.mountpoint / "db").mkdir()
    found = outcomes(new, "web", "nobody", "db", "mail", check=ExitCode.NOT_FOUND)
    assert {vm: each["outcome"] for vm, each in found.items()} == {
        "nobody": "failed",
        "db": "failed",
        "web": "adopted",
        "mail": "failed",
    }
    for words in (["mail"], ["mail", "--force"], ["mail", "--accept-loss"]):
        refused = new.cli("adopt", *words, check=ExitCode.REFUSED).err
        assert "the newest state of VM mail is in datastore mount (id " in refused
        assert ("--force takes it" in refused, "--accept-loss goes without" in refused) == (
            "--force" not in words,
            "--accept-loss" not in words,
        )
    taken = new.cli("adopt", "mail", "--force", "--accept-loss", check=0).out
    assert "taken from datastore mount of host " in taken
    assert (new.mountpoint / "mail/disk.raw").read_bytes() == noise(SIZE, seed=1)
    assert "db is the name of another VM here" in found["db"]["message"]
    assert list((new.mountpoint / "db").iterdir()) == []
    (new.mountpoint / "db").rename(new.mountpoint / "other")
    assert new.cli("adopt", "db", check=0).out.startswith("db: adopted (as it was at ")
    assert (new.mountpoint / "db/disk.raw").read_bytes() == noise(SIZE, seed=0)
    assert new.cli("adopt", check=ExitCode.USAGE).err.endswith("name at least one VM, or give --all\n")


def test_what_was_adopted_leaves_as_the_files_that_were_lost(make_datastore: MakeDatastore, base: Path) -> None:
    lost = make_datastore(QUIET)
    lost.start()
    add_vms(lost)
    originals = base / "originals"
    subprocess.run(["cp", "-a", lost.mountpoint, originals], check=True)
    before = appearance(lost.mountpoint)
    assert appearance(originals) == before
    lost.archive("web", "flat")
    (lost.mountpoint / "flat.img").write_bytes(b"since then, and lost with the host")
    lose(lost)
    new = make_datastore(QUIET, store=lost.store)
    new.start()
    assert outcomes(new, "--all", check=ExitCode.REFUSED)["flat"]["outcome"] == "failed"
    outcomes(new, "--all", "--force", "--accept-loss", check=0)
    assert {row["state"] for row in new.rows() if row["disk"] != "state/vars.fd"} == {"placeholder"}
    new.cli("leave", check=0)
    for gone in (new.store, new.runtime, new.config):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert appearance(new.mountpoint) == before  # with the attributes, of which none is ours
    files = [path for path in originals.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) == 4
    for path in files:
        subprocess.run(["cmp", path, new.mountpoint / path.relative_to(originals)], check=True)
