"""A datastore whose store is a bucket of a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, noise

from scripts.lab.s3_server import Bucket
from vmfs_stub.cli.exit_codes import ExitCode

CONTENT = noise(24 * MIB, seed=5)


@pytest.fixture
def in_environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The commands find the bucket's credentials where the standard chain looks first."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.account.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.account.secret_access_key)
    return bucket


def assert_secret_is_nowhere(datastore: LiveDatastore, bucket: Bucket) -> None:
    secret = bucket.account.secret_access_key
    for path in (datastore.log_path, datastore.config, *(datastore.backing / ".vmfs-stub").glob("*")):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_a_vm_goes_there_and_comes_back(make_datastore: MakeDatastore, in_environment: Bucket, tmp_path: Path) -> None:
    bucket = in_environment
    datastore = make_datastore(QUIET, store=bucket.url("some/prefix"))
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.archive("vm")
    assert datastore.state("vm") == "placeholder"
    assert len(list(bucket.objects().list("some/prefix/pins/"))) == 1
    datastore.kill()
    datastore.start()
    assert disk.read_bytes() == CONTENT
    datastore.recall("vm")
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert list(bucket.objects().list("some/prefix/pins/")) == []
    datastore.cli("verify", check=0)
    datastore.cli("doctor", check=0)
    datastore.cli("restore", "vm", "--to", tmp_path / "out", "--store", bucket.url("some/prefix"), check=0)
    assert (tmp_path / "out" / disk.name).read_bytes() == CONTENT
    assert datastore.client.status().healthy
    assert_secret_is_nowhere(datastore, bucket)


def test_credentials_of_the_configuration(
    make_datastore: MakeDatastore, in_environment: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = in_environment
    datastore = make_datastore(QUIET, store=bucket.url())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    account = bucket.account
    named = {"access_key_id": account.access_key_id, "secret_access_key": account.secret_access_key}
    datastore.configure({"store": named})
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT[:MIB])
    datastore.archive("vm")
    assert disk.read_bytes() == CONTENT[:MIB]
    datastore.stop()
    datastore.configure({"store": named | {"secret_access_key": "wrong"}})
    refused = datastore.cli("points")
    assert refused.code != 0
    assert "credentials" in refused.err
    assert "wrong" not in refused.err


def test_init_needs_a_bucket_that_is_there(make_datastore: MakeDatastore, in_environment: Bucket, base: Path) -> None:
    datastore = LiveDatastore(base / "new")
    (base / "new").mkdir()
    url = in_environment.url().replace(in_environment.name, "no-such-bucket")
    words = ("--backing", datastore.backing, "--mountpoint", datastore.mountpoint, "--store", url)
    refused = datastore.cli("init", *words, "--runtime-dir", datastore.runtime)
    assert refused.code != 0
    assert "no such bucket" in refused.err
    assert not datastore.config.exists()


def test_garbage_collection_beside_a_placeholder(
    make_datastore: MakeDatastore, in_environment: Bucket, tmp_path: Path
) -> None:
    bucket = in_environment
    datastore = make_datastore(QUIET | {"store": {"listing_lag_s": 0.2}}, store=bucket.url("prefix"))
    datastore.start()
    disk = datastore.add_vm("vm", CONTENT)
    datastore.cli("backup", "vm", check=0)
    disk.write_bytes(changed := noise(24 * MIB, seed=6))
    datastore.archive("vm")
    before = len(list(bucket.objects().list("prefix/packs/")))
    first, second = (row["point"] for row in json.loads(datastore.cli("points", "vm", "--json", check=0).out))
    assert datastore.cli("forget", f"vm@{second}").code == ExitCode.REFUSED, "a placeholder depends on it"
    datastore.cli("forget", f"vm@{first}", check=0)
    collected = json.loads(datastore.cli("gc", "--json", check=0).out)
    assert collected["points"] == 1
    assert len(list(bucket.objects().list("prefix/packs/"))) == before - collected["packs"] < before
    assert disk.read_bytes() == changed
    datastore.cli("verify", check=0)
    for left in ("condemned", "leases", "dead", "forgotten"):
        assert list(bucket.objects().list(f"prefix/{left}/")) == []
