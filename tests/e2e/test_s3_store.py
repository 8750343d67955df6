"""A datastore whose store is a bucket of a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, noise
from s3_bucket import Bucket

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
