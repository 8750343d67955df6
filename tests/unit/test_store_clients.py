"""Clients of a store are replaced while they are used, and what fails is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreUnavailable
from vmfs_stub.store import clients as module
from vmfs_stub.store.clients import ReplaceableObjects, StoreClients
from vmfs_stub.store.objects import ObjectInfo, ObjectStore
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.s3 import S3Credentials

AT = StoreAt("memory://clients")
REPLICA_AT = StoreAt("memory://clients-replica")


class Named:
    """A store that answers with its name, when it may."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def get(self, key: str, *, size_max: int = 0) -> bytes:
        self.asked.set()
        assert self.may_answer.wait(10)
        return self.name

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for number in range(3):
            yield ObjectInfo(f"{self.name.decode()}{number}", 0)

    def size(self, key: str) -> int:
        raise {"missing": ObjectMissing, "there": ObjectExists}.get(key, StoreUnavailable)(key)

    def drop_cache(self, key: str) -> None:
        self.name += b" dropped"


def objects_of(store: Named) -> ReplaceableObjects:
    return ReplaceableObjects(cast(ObjectStore, store))


def test_who_has_begun_goes_on_and_the_next_takes_the_new_one() -> None:
    old, new = Named(b"old"), Named(b"new")
    objects, got = objects_of(old), list[bytes]()
    old.may_answer.clear()
    reader = threading.Thread(target=lambda: got.append(objects.get("key")))
    reader.start()
    assert old.asked.wait(10)
    listing = objects.list("")
    first = next(listing)
    objects.inner = cast(ObjectStore, new)
    assert objects.get("key") == b"new"
    assert not got
    old.may_answer.set()
    reader.join()
    assert got == [b"old"]
    assert [first.key, *(info.key for info in listing)] == ["old0", "old1", "old2"]
    objects.drop_cache("key")
    assert new.name == b"new dropped"


def test_errors_are_counted_by_kind_and_answers_are_none() -> None:
    objects = objects_of(Named(b"x"))
    for key in ("missing", "there", "away", "away"):
        with pytest.raises((ObjectMissing, ObjectExists, StoreUnavailable)):
            objects.size(key)
    objects.inner = cast(ObjectStore, Named(b"y"))
    with pytest.raises(StoreUnavailable):
        objects.size("away")
    assert objects.errors.all() == {"StoreUnavailable": 3}


def test_it_is_an_object_store_with_all_that_belongs_to_one() -> None:
    objects = ReplaceableObjects(open_objects(StoreAt("memory://clients-all")))
    objects.put("packs/a", b"1234")
    assert objects.put_anew(lambda: ("packs/b", b"5")) == "packs/b"
    assert (objects.get("packs/a"), bytes(objects.get_range("packs/a", offset=1, length=2))) == (b"1234", b"23")
    assert {info.key for info in objects.list("packs/")} == {"packs/a", "packs/b"}
    objects.delete("packs/a")
    with pytest.raises(ObjectMissing):
        objects.size("packs/a")
    assert objects.errors.all() == {}


def test_only_what_has_changed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[StoreAt] = []

    def opening(at: StoreAt) -> ObjectStore:
        opened.append(at)
        return open_objects(at)

    monkeypatch.setattr(module, "open_objects", opening)
    clients = StoreClients(AT, REPLICA_AT)
    assert opened == [AT, REPLICA_AT]
    assert clients.replica is not None
    before = (clients.store.inner, clients.replica.inner)
    same = clients.prepare(AT, REPLICA_AT)
    assert not same.is_change
    same.take()
    assert (clients.store.inner, clients.replica.inner) == before
    other = replace(REPLICA_AT, credentials=S3Credentials("id", "secret"))
    prepared = clients.prepare(AT, other)
    assert prepared.is_change
    assert (clients.store.inner, clients.replica.inner) == before, "prepared is not taken"
    prepared.take()
    assert clients.store.inner is before[0]
    assert clients.replica.inner is prepared.replica is not before[1]
    assert not clients.prepare(AT, other).is_change


def test_what_the_standard_chain_says_may_have_changed() -> None:
    at = StoreAt("s3://bucket/prefix?endpoint=http://127.0.0.1:1")
    assert StoreClients(at, None).prepare(at, None).is_change
    named = replace(at, credentials=S3Credentials("id", "secret"))
    assert not StoreClients(named, None).prepare(named, None).is_change
