"""A datastore whose store is encrypted: all that a VM goes through, and what an operator of the store can see of it."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path

import pytest
from live_datastore import BLOCK, MIB, QUIET, LiveDatastore, MakeDatastore, noise, wait_until

MARKER = b"what only the guest may know, in the middle of noise"
NAME = "payroll-db"
SIZE = 24 * MIB


def content() -> bytes:
    """A disk of noise, which no compression hides, with markers in it."""
    disk = bytearray(noise(SIZE, seed=3))
    for at in range(5 * MIB + 77, SIZE, 4 * MIB):
        disk[at : at + len(MARKER)] = MARKER
    return bytes(disk)


CONTENT = content()
ANEW = ("-m", "vmfs_stub.cli.main")
"""So that a daemon has a command line and an environment of its own, in which the key could be."""


def holds(directory: Path, needle: bytes) -> bool:
    """Whether any file below has these bytes in its content, its name or its attributes."""
    for path in directory.rglob("*"):
        if needle in os.fsencode(path.relative_to(directory)) or (path.is_file() and needle in path.read_bytes()):
            return True
        if any(needle in os.getxattr(path, name) for name in os.listxattr(path)):
            return True
    return False


def assert_key_is_nowhere(datastore: LiveDatastore, key: Path) -> None:
    text = key.read_text().strip()
    assert datastore.daemon is not None
    pid = datastore.daemon.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children  # the mover, which has the store's key
    for process in (str(pid), *children):
        assert text not in Path(f"/proc/{process}/cmdline").read_text()
        assert text not in Path(f"/proc/{process}/environ").read_text(errors="replace")
    for needle in (text.encode(), base64.b64decode(text)):
        assert needle not in datastore.log_path.read_bytes()
        assert needle not in datastore.config.read_bytes()
        for directory in (datastore.backing, datastore.runtime, datastore.store):
            assert not holds(directory, needle), directory


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])
def test_what_lies_in_the_store(make_datastore: MakeDatastore, base: Path, is_encrypted: bool) -> None:
    """Of a plain store the same look finds everything, so it would find it here."""
    words = ("--encrypt", "--key-file", base / "key") if is_encrypted else ()
    datastore = make_datastore(QUIET, *words)
    datastore.start(program=ANEW)
    datastore.add_vm(NAME, CONTENT)
    datastore.archive(NAME)
    for needle in (MARKER, NAME.encode(), b"disk.raw", b'"host":'):
        assert holds(datastore.store, needle) is not is_encrypted, needle


def test_a_vm_goes_there_and_comes_back(make_datastore: MakeDatastore, base: Path) -> None:
    key = base / "key"
    datastore = make_datastore(QUIET, "--encrypt", "--key-file", key)
    datastore.start()
    disk = datastore.add_vm(NAME, CONTENT)
    datastore.archive(NAME)
    assert datastore.state(NAME) == "placeholder"
    assert_key_is_nowhere(datastore, key)
    # A boot: small reads here and there, through a daemon that started while the store was away.
    datastore.kill()
    away = datastore.store.rename(base / "away")
    datastore.start(program=ANEW)
    away.rename(datastore.store)
    chosen = random.Random(5)
    with disk.open("rb") as file:
        for at in (0, SIZE - BLOCK, *(chosen.randrange(SIZE // BLOCK) * BLOCK for _ in range(40))):
            assert os.pread(file.fileno(), BLOCK, at) == CONTENT[at : at + BLOCK]
    with disk.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"written since")
        os.fsync(file.fileno())
    changed = CONTENT[: 9 * MIB] + b"written since" + CONTENT[9 * MIB + 13 :]
    wait_until("the disk is closed", lambda: datastore.client.status().mount.open_disks == 0)
    datastore.archive(NAME)
    assert disk.read_bytes() == changed
    datastore.recall(NAME)
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert len(datastore.cli("points", NAME, check=0).out.splitlines()) == 3
    datastore.cli("verify", check=0)
    datastore.cli("doctor", check=0)
    assert datastore.client.status().findings == []
    assert_key_is_nowhere(datastore, key)


def test_a_host_that_has_nothing_restores_with_the_key(make_datastore: MakeDatastore, base: Path) -> None:
    key, phrase = base / "key", base / "phrase"
    phrase.touch(mode=0o600)
    phrase.write_text("correct horse battery staple\n")
    datastore = make_datastore(QUIET, "--encrypt", "--key-file", key)
    datastore.start()
    disk = datastore.add_vm(NAME, CONTENT)
    datastore.archive(NAME)
    datastore.cli("store", "add-key", "--new-passphrase", phrase, check=0)
    datastore.kill()
    bare = LiveDatastore(base / "bare")
    there = ("--store", datastore.store_url)
    for number, given in enumerate((("--key", key), ("--passphrase", phrase))):
        to = base / f"out{number}"
        bare.cli("restore", NAME, "--to", to, *there, *given, check=0)
        assert (to / disk.name).read_bytes() == CONTENT
    for given in ((), ("--key", phrase), ("--passphrase", key)):
        refused = bare.cli("restore", NAME, "--to", base / "none", *there, *given)
        assert refused.code in {2, 14}, refused
        assert "correct horse" not in refused.err
        assert key.read_text().strip() not in refused.err
    assert not (base / "none").exists()
    # An operator of the store who alters what he cannot read is found out.
    pack = next(path for path in (datastore.store / "packs").rglob("*") if path.is_file())
    altered = bytearray(pack.read_bytes())
    altered[1000] ^= 1
    pack.write_bytes(altered)
    assert bare.cli("verify", *there, "--key", key).code == 6
    assert bare.cli("restore", NAME, "--to", base / "none", *there, "--key", key).code == 6
