"""The copy of the store's description, by which a host starts while the store is away."""

from __future__ import annotations

import base64
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from vmfs_stub import daemon
from vmfs_stub.config import Config, parse_config
from vmfs_stub.core.errors import CorruptStoreObject, KeyMissing, ObjectMissing, WrongKey
from vmfs_stub.daemon import open_store
from vmfs_stub.store.format import encode_description
from vmfs_stub.store.key_sources import new_key_file
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store

CHUNK = 64 << 10


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A datastore whose store is there, and was never seen."""
    for name in ("backing/.vmfs-stub", "mount", "store"):
        (tmp_path / name).mkdir(parents=True)
    url = (tmp_path / "store").as_uri()
    Store.create(open_objects(StoreAt(url), create=True), chunk_size=CHUNK)
    text = f"""
[datastore]
name = "main"
backing = "{tmp_path}/backing"
mountpoint = "{tmp_path}/mount"
[store]
url = "{url}"
retries_max = 0
"""
    return parse_config(text, origin="c.toml")


def away(tmp_path: Path) -> None:
    (tmp_path / "store").rename(tmp_path / "away")


def test_it_stands_in_for_a_store_that_is_away(config: Config, tmp_path: Path) -> None:
    store = open_store(config)
    away(tmp_path)
    assert open_store(config).id == store.id


def test_it_is_written_once(config: Config) -> None:
    open_store(config)
    before = config.store_copy_path.stat()
    open_store(config)
    after = config.store_copy_path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff"])
def test_a_damaged_one_is_told_or_written_again(config: Config, tmp_path: Path, damage: bytes) -> None:
    store = open_store(config)
    whole = config.store_copy_path.read_bytes()
    config.store_copy_path.write_bytes(damage)
    away(tmp_path)
    with pytest.raises(CorruptStoreObject, match=r"the store is away .* start again when the store is back"):
        open_store(config)
    (tmp_path / "away").rename(tmp_path / "store")
    assert open_store(config).id == store.id
    assert config.store_copy_path.read_bytes() == whole


def test_a_store_that_was_never_seen_is_missing(config: Config, tmp_path: Path) -> None:
    away(tmp_path)
    with pytest.raises(ObjectMissing):
        open_store(config)


def test_replacing_it_is_durable_and_never_in_place(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(config)
    whole = config.store_copy_path.read_bytes()
    config.store_copy_path.write_bytes(b"damaged")
    order: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def seen_replace(path: Path, target: Path) -> Path:
        assert path.read_bytes() == whole
        assert config.store_copy_path.read_bytes() == b"damaged"
        order.append("rename")
        return replace(path, target)

    def seen_fsync(fd: int) -> None:
        order.append("sync")
        fsync(fd)

    monkeypatch.setattr(Path, "replace", seen_replace)
    monkeypatch.setattr(os, "fsync", seen_fsync)
    open_store(config)
    assert order == ["sync", "rename", "sync"]


def test_without_room_the_old_one_stays(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_store(config)
    config.store_copy_path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(daemon, "write_fully", full)
    open_store(config)
    assert config.store_copy_path.read_bytes() == b"old"
    assert "could not be kept" in caplog.text


@pytest.fixture
def encrypted(config: Config, tmp_path: Path) -> Config:
    """The same, with an encrypted store."""
    (tmp_path / "store/vmfs-store.json").unlink()
    key_file = tmp_path / "key"
    source = new_key_file(key_file)
    Store.create(open_objects(StoreAt(config.store.url), create=True), chunk_size=CHUNK, source=source)
    return config.model_copy(update={"store": config.store.model_copy(update={"key_file": key_file})})


def with_key(config: Config, key_file: Path | None) -> Config:
    return config.model_copy(update={"store": config.store.model_copy(update={"key_file": key_file})})


def test_an_encrypted_store_that_is_away_lets_the_host_start(encrypted: Config, tmp_path: Path) -> None:
    store = open_store(encrypted)
    assert store.key is not None
    away(tmp_path)
    again = open_store(encrypted)
    assert (again.id, again.key) == (store.id, store.key)
    assert store.key.secret not in encrypted.store_copy_path.read_bytes()
    assert base64.b64encode(store.key.secret) not in encrypted.store_copy_path.read_bytes()
    new_key_file(tmp_path / "other")
    for is_away in (True, False):
        if not is_away:
            (tmp_path / "away").rename(tmp_path / "store")
        with pytest.raises(KeyMissing, match="key_file or passphrase_file"):
            open_store(with_key(encrypted, None))
        with pytest.raises(WrongKey):
            open_store(with_key(encrypted, tmp_path / "other"))


def test_a_store_that_is_plain_all_at_once_is_refused(encrypted: Config, tmp_path: Path) -> None:
    store = open_store(encrypted)
    path = tmp_path / "store/vmfs-store.json"
    path.unlink()
    path.write_bytes(encode_description(replace(store.description, is_encrypted=False)))
    before = encrypted.store_copy_path.read_bytes()
    with pytest.raises(WrongKey, match="not encrypted"):
        open_store(encrypted)
    assert encrypted.store_copy_path.read_bytes() == before
