"""A datastore whose store has a replica: guests read on without the store, and what it lost comes back from there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from live_datastore import BLOCK, CHUNK, MIB, QUIET, LiveDatastore, MakeDatastore, damage, noise, objects, wait_until

SIZE = 16 * MIB
CONTENT = noise(SIZE, seed=11)


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def words(request: pytest.FixtureRequest, base: Path) -> tuple[str | Path, ...]:
    """For `init`."""
    key = ("--encrypt", "--key-file", base / "key") if request.param else ()
    return (*key, "--replica", (base / "replica").as_uri())


def key_of(words: tuple[str | Path, ...], base: Path) -> tuple[str | Path, ...]:
    return ("--key", base / "key") if "--encrypt" in words else ()


def boots(disk: Path, *, seed: int) -> None:
    """Small reads here and there, each of what was archived."""
    chosen = random.Random(seed)
    with disk.open("rb", buffering=0) as file:
        for _ in range(12):
            at = chosen.randrange(SIZE // BLOCK) * BLOCK
            file.seek(at)
            assert file.read(BLOCK) == CONTENT[at : at + BLOCK]


def replica_of(datastore: LiveDatastore) -> dict[str, object]:
    status: dict[str, object] = json.loads(datastore.cli("status", "--json").out)
    found = status["replica"]
    assert isinstance(found, dict)
    return found


def test_the_store_is_lost_and_comes_back(
    make_datastore: MakeDatastore, base: Path, words: tuple[str | Path, ...]
) -> None:
    datastore = make_datastore(QUIET, *words)
    replica = base / "replica"
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    assert datastore.state("vm") == "placeholder"
    for kind in ("packs", "segments", "manifests"):
        assert [path.read_bytes() for path in objects(datastore.store / kind)] == [
            path.read_bytes() for path in objects(replica / kind)
        ]
    assert not objects(replica / "pins")
    # Its packs are lost, then all of it.
    packs = datastore.store / "packs"
    packs.rename(base / "packs")
    boots(disk, seed=1)
    (base / "packs").rename(packs)
    away = datastore.store.rename(base / "away")
    boots(disk, seed=2)
    datastore.crash()  # and the daemon starts without it
    boots(disk, seed=3)
    assert replica_of(datastore)["reads"] > 0  # type: ignore[operator]
    assert not datastore.store.exists()
    # Who has nothing but the replica.
    datastore.cli("restore", "vm", "--to", base / "out", "--store", replica.as_uri(), *key_of(words, base), check=0)
    assert (base / "out/disk.raw").read_bytes() == CONTENT
    datastore.cli("verify", "--store", replica.as_uri(), *key_of(words, base), check=0)
    away.rename(datastore.store)
    wait_until("the store is seen again", lambda: datastore.client.status().store.reachable)
    # A pack is damaged: reads go on, and scrub repairs it.
    damage(max(objects(packs), key=lambda path: path.stat().st_size), 5 * CHUNK)
    told = datastore.cli("verify", check=0)
    assert "answered by the replica" in told.err
    datastore.cli("scrub", check=0)
    shutil.move(replica, base / "gone")
    datastore.cli("verify", check=0)
    shutil.move(base / "gone", replica)
    datastore.cli("recall", "vm", check=0)
    assert disk.read_bytes() == CONTENT
    datastore.assert_nothing_left(datastore.backing_of(disk))


def test_nothing_is_released_while_the_replica_is_away(make_datastore: MakeDatastore, base: Path) -> None:
    replica, away = base / "replica", base / "away"
    datastore = make_datastore(QUIET, "--replica", replica.as_uri())
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.stop()  # who has a directory open does not notice that it was renamed
    replica.rename(away)
    datastore.start()
    refused = datastore.cli("archive", "vm", check=5)
    assert "nothing released" in refused.err
    assert datastore.state("vm") == "resident"
    datastore.cli("backup", "vm", "--no-archive", check=0)
    wait_until("the loss is told", lambda: not replica_of(datastore)["reachable"])
    assert "replica" in datastore.cli("status", check=8).out
    assert not replica.exists()
    assert len(objects(datastore.store / "manifests")) == 2
    away.rename(replica)
    datastore.cli("archive", "vm", check=0)
    assert datastore.state("vm") == "placeholder"
    done = json.loads(datastore.cli("replicate", "--json", check=0).out)
    assert done["failures"] == {}
    assert len(objects(replica / "manifests")) == 3
    assert disk.read_bytes() == CONTENT


def test_a_replica_that_is_added_later_is_filled(make_datastore: MakeDatastore, base: Path) -> None:
    replica = base / "replica"
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    assert datastore.cli("replicate").code == 2
    datastore.stop()
    datastore.configure({"replica": {"url": replica.as_uri()}})
    assert datastore.cli("replicate", check=5).err
    datastore.cli("replicate", "--create", check=0)
    assert len(objects(replica / "manifests")) == 1
    shutil.rmtree(replica / "manifests")
    shutil.rmtree(replica / "segments")
    datastore.start()
    wait_until("what is missing is brought over", lambda: len(objects(replica / "manifests")) == 1)
    (vm,) = json.loads(datastore.cli("points", "--json", check=0).out)
    datastore.cli("recall", "vm", check=0)
    datastore.cli("backup", "vm", "--no-archive", check=0)
    wait_until("the next point is, too", lambda: len(objects(replica / "manifests")) == 2)
    wait_until("and nothing is behind", lambda: replica_of(datastore)["behind"] == 0)
    assert vm
