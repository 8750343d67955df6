"""One suite over every object store and every fake: what the rest of ``store`` may rely on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore
from store_fakes import FakeObjects
from store_places import PATIENCE_S, PATIENT

from scripts.lab.s3_proxy import s3_proxy
from scripts.lab.s3_server import Bucket
from scripts.lab.s3_troubles import SeededTroubles
from vmfs_stub.core.errors import ConfigError, CorruptManifest, CorruptPack, IntegrityError, ObjectExists, ObjectMissing
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import Buffer, ObjectStore
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.retrying import RetryingObjects

KEY = "packs/ab/abcdef"


def _local(folder: Path) -> ObjectStore:
    return LocalObjects(folder / "local")


def _obstore_directory(folder: Path) -> ObjectStore:
    # Not durable, so never used as a store; a second transport shows that the adapter fits more than memory.
    (folder / "obstore").mkdir()
    return RemoteObjects(LocalStore(folder / "obstore"), name="obstore directory")


MAKERS: dict[str, Callable[[Path], ObjectStore]] = {
    "memory": lambda _: RemoteObjects(MemoryStore(), name="memory://test"),
    "obstore-directory": _obstore_directory,
    "local": _local,
    "retrying-local": lambda folder: RetryingObjects(_local(folder)),
    "fake": lambda _: FakeObjects(),
}


@contextmanager
def _troubled(bucket: Bucket, *, seed: int) -> Iterator[ObjectStore]:
    """Listings are never late here: the suite looks at once at what it has just done."""
    with s3_proxy(bucket.account.endpoint) as proxy:
        proxy.plan = SeededTroubles(seed, patience_s=PATIENCE_S)
        yield RetryingObjects(bucket.through(proxy.endpoint).objects(timeout_s=PATIENCE_S), PATIENT)


@pytest.fixture(params=[*MAKERS, "s3", "s3-prefix", "troubled-s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param in ("s3", "s3-prefix"):
        yield request.getfixturevalue("bucket").objects("some/prefix" if request.param == "s3-prefix" else "")
        return
    if request.param == "troubled-s3":
        with _troubled(request.getfixturevalue("bucket"), seed=len(request.node.name)) as troubled:
            yield troubled
        return
    made = MAKERS[request.param](tmp_path)
    yield made
    inner = made.inner if isinstance(made, RetryingObjects) else made
    if isinstance(inner, LocalObjects):
        inner.close()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_put_is_read(objects: ObjectStore, kind: Callable[[bytes], bytes]) -> None:
    objects.put(KEY, kind(b"some bytes"))
    assert objects.get(KEY) == b"some bytes"
    assert objects.size(KEY) == 10
    assert objects.get_range(KEY, offset=5, length=5) == b"bytes"
    assert objects.get_range(KEY, offset=10, length=0) == b""


def test_part_of_a_larger_buffer_is_put(objects: ObjectStore) -> None:
    objects.put(KEY, memoryview(bytearray(b"xxsomexx"))[2:6])
    assert objects.get(KEY) == b"some"


def test_an_empty_object(objects: ObjectStore) -> None:
    objects.put(KEY, b"")
    assert objects.get(KEY) == b""
    assert objects.size(KEY) == 0


def test_if_absent_leaves_what_is_there(objects: ObjectStore) -> None:
    objects.put(KEY, b"first")
    with pytest.raises(ObjectExists, match=KEY):
        objects.put(KEY, b"second")
    assert objects.get(KEY) == b"first"


def test_overwrite_replaces(objects: ObjectStore) -> None:
    objects.put(KEY, b"first, and longer")
    objects.put(KEY, b"second", if_absent=False)
    assert objects.get(KEY) == b"second"


def test_a_missing_object(objects: ObjectStore) -> None:
    for call in (
        lambda: objects.get(KEY),
        lambda: objects.size(KEY),
        lambda: objects.get_range(KEY, offset=0, length=1),
        lambda: objects.get_range(KEY, offset=0, length=0),
    ):
        with pytest.raises(ObjectMissing, match=KEY):
            call()
    objects.delete(KEY)


def test_a_folder_is_not_an_object(objects: ObjectStore) -> None:
    objects.put("packs/ab/abcdef", b"x")
    with pytest.raises(ObjectMissing):
        objects.get("packs/ab")


def test_deleted_is_missing(objects: ObjectStore) -> None:
    objects.put(KEY, b"x")
    assert objects.get_range(KEY, offset=0, length=1) == b"x"
    objects.delete(KEY)
    with pytest.raises(ObjectMissing):
        objects.get_range(KEY, offset=0, length=1)
    assert list(objects.list("")) == []
    objects.put(KEY, b"y")
    assert objects.get(KEY) == b"y"


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (5, 6), (10, 1), (11, 0), (100, 5)])
def test_a_range_beyond_the_end_is_never_short(objects: ObjectStore, offset: int, length: int) -> None:
    objects.put(KEY, b"some bytes")
    objects.put("manifests/cd", b"some bytes")
    with pytest.raises(CorruptPack, match=KEY):
        objects.get_range(KEY, offset=offset, length=length)
    with pytest.raises(CorruptManifest, match="manifests/cd"):
        objects.get_range("manifests/cd", offset=offset, length=length)


def test_an_object_above_the_bound_is_refused(objects: ObjectStore) -> None:
    objects.put(KEY, bytes(1000))
    with pytest.raises(IntegrityError, match=KEY):
        objects.get(KEY, size_max=999)
    assert len(objects.get(KEY, size_max=1000)) == 1000


def test_list_is_by_folder_at_any_depth(objects: ObjectStore) -> None:
    keys = {"vmfs-store.json", "packs/ab/1", "packs/ab/22", "packs/cd/3", "packsx/1", "pins/1"}
    for key in keys:
        objects.put(key, key.encode())
    assert {info.key for info in objects.list("")} == keys
    assert {(info.key, info.size) for info in objects.list("packs/")} == {
        ("packs/ab/1", 10),
        ("packs/ab/22", 11),
        ("packs/cd/3", 10),
    }
    assert {info.key for info in objects.list("packs/ab/")} == {"packs/ab/1", "packs/ab/22"}
    assert list(objects.list("nothing/")) == []


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\0b", "a b", "ü", "a\n", "x" * 300]
)
def test_names_that_lead_elsewhere_are_refused(objects: ObjectStore, key: str) -> None:
    for call in (
        lambda: objects.get(key),
        lambda: objects.size(key),
        lambda: objects.put(key, b""),
        lambda: objects.delete(key),
        lambda: objects.get_range(key, offset=0, length=1),
    ):
        with pytest.raises(ConfigError):
            call()
    for prefix in (key, f"{key}/"):
        if prefix:
            with pytest.raises(ConfigError):
                list(objects.list(prefix if prefix != "a/" else "a"))


def winners(objects: ObjectStore, key: str) -> list[int]:
    """Many put the same key at once; those that are told that it is theirs."""
    serial = itertools.count()

    def put(_: int) -> int | None:
        mine = next(serial)
        try:
            objects.put(key, b"%d" % mine)
        except ObjectExists:
            return None
        return mine

    with ThreadPoolExecutor(8) as executor:
        return [mine for mine in executor.map(put, range(40)) if mine is not None]


def test_one_of_many_conditional_puts_wins(objects: ObjectStore) -> None:
    (won,) = winners(objects, KEY)
    assert objects.get(KEY) == b"%d" % won


def test_a_retry_that_takes_any_object_for_its_own_is_found(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(self: RetryingObjects, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        def attempt(number: int) -> None:
            try:
                self.inner.put(key, data, if_absent=if_absent)
            except ObjectExists:
                if number == 0:
                    raise

        self._retried(attempt)

    monkeypatch.setattr(RetryingObjects, "put", put)
    with _troubled(bucket, seed=1) as objects:
        assert any(len(winners(objects, f"{KEY}{number}")) > 1 for number in range(5))


def test_readers_of_a_replaced_object_see_old_or_new_whole(objects: ObjectStore) -> None:
    values = [bytes([value]) * 50_000 for value in range(20)]
    objects.put(KEY, values[0])
    with ThreadPoolExecutor(2) as executor:
        writing = executor.submit(lambda: [objects.put(KEY, value, if_absent=False) for value in values])
        while not writing.done():
            assert objects.get(KEY) in values
        writing.result()
    assert objects.get(KEY) == values[-1]
