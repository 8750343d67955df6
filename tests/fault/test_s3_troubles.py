"""A real S3 server behind a network that delays, refuses, cuts and forgets: nothing is lost, and no byte is wrong."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
from store_points import back_up

from scripts.lab.s3_proxy import NOTHING, S3Proxy, Trouble, delaying_proxy, s3_proxy
from scripts.lab.s3_server import Bucket
from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreUnavailable
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy
from vmfs_stub.store.store import Store

KEY = "packs/ab/abcdef"
PATIENT = RetryPolicy(attempts_max=12, pause_s=0.01, pause_max_s=0.05)


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[S3Proxy]:
    with s3_proxy(bucket.account.endpoint) as proxy:
        yield proxy


@pytest.fixture
def objects(bucket: Bucket, proxy: S3Proxy) -> ObjectStore:
    return RetryingObjects(bucket.through(proxy.endpoint).objects("some/prefix"), PATIENT)


def first(proxy: S3Proxy, trouble: Trouble) -> None:
    """The next request meets it, those after that do not."""
    lock, left = threading.Lock(), [trouble]

    def plan(method: str, path: str) -> Trouble:
        with lock:
            return left.pop() if left else NOTHING

    proxy.plan = plan


TROUBLES = [Trouble(status=500), Trouble(status=503), Trouble(loses=True), Trouble(forgets=True)]


@pytest.mark.parametrize("trouble", TROUBLES, ids=str)
def test_each_call_is_made_once_more(objects: ObjectStore, proxy: S3Proxy, trouble: Trouble) -> None:
    first(proxy, trouble)
    objects.put(KEY, b"of our own")  # which may find its own first try
    first(proxy, trouble)
    with pytest.raises(ObjectExists):
        objects.put(KEY, b"of another")
    first(proxy, trouble)
    assert objects.get(KEY) == b"of our own"
    first(proxy, trouble)
    assert objects.get_range(KEY, offset=3, length=3) == b"our"
    first(proxy, trouble)
    assert [info.key for info in objects.list("packs/")] == [KEY]
    first(proxy, trouble)
    assert objects.size(KEY) == 10
    first(proxy, trouble)
    objects.delete(KEY)
    with pytest.raises(ObjectMissing):
        objects.get(KEY)
    assert proxy.troubles == 7


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_an_answer_that_is_cut_is_asked_for_again(objects: ObjectStore, proxy: S3Proxy, size: int) -> None:
    data = random.Random(1).randbytes(size)
    objects.put(KEY, data)
    first(proxy, Trouble(cuts=True))
    assert objects.get(KEY) == data
    first(proxy, Trouble(cuts=True))
    assert objects.get_range(KEY, offset=10, length=size - 20) == data[10 : size - 10]
    assert proxy.troubles == 2


def test_a_listing_that_is_late_does_not_know_of_the_last_changes(bucket: Bucket) -> None:
    with s3_proxy(bucket.account.endpoint, lag_s=60) as proxy:
        objects = bucket.through(proxy.endpoint).objects("some/prefix")
        for key in ("packs/old", "packs/over"):
            bucket.objects("some/prefix").put(key, b"before")

        def listed() -> frozenset[str]:
            return frozenset(info.key.removeprefix("packs/") for info in objects.list("packs/"))

        assert listed() == {"old", "over"}
        objects.put("packs/new", b"new")
        objects.put("packs/over", b"over", if_absent=False)
        objects.delete("packs/old")
        assert listed() == {"over", "new"}
        proxy.plan = lambda method, path: Trouble(lists_late=True)
        seen = {listed() for _ in range(60)}
        assert seen == {
            frozenset(each) for each in (("over", "new"), ("over", "old"), ("over",), ("over", "old", "new"))
        }
        assert proxy.happened["listed late"] > 10
        proxy.listings.lag_s = 0.0
        assert {listed() for _ in range(10)} == {frozenset({"over", "new"})}


def test_a_proxy_in_a_process_of_its_own_delays_each_request(bucket: Bucket) -> None:
    with delaying_proxy(bucket.account.endpoint, delay_s=0.1) as endpoint:
        objects = bucket.through(endpoint).objects()
        objects.put(KEY, b"some bytes")
        started_s = time.monotonic()
        assert objects.get_range(KEY, offset=5, length=5) == b"bytes"
        assert time.monotonic() - started_s > 0.1


def test_a_server_that_does_not_recover_is_an_error(objects: ObjectStore, proxy: S3Proxy) -> None:
    proxy.plan = lambda method, path: Trouble(status=503)
    with pytest.raises(StoreUnavailable):
        objects.get(KEY)
    assert proxy.troubles == PATIENT.attempts_max


@pytest.mark.parametrize("seed", range(3))
def test_a_backup_and_what_it_stores_survive_all_of_it(objects: ObjectStore, proxy: S3Proxy, seed: int) -> None:
    chosen, lock = random.Random(seed), threading.Lock()

    def plan(method: str, path: str) -> Trouble:
        with lock:
            if chosen.random() < 0.7:
                return NOTHING
            return chosen.choice([*TROUBLES, Trouble(cuts=method == "GET"), Trouble(delay_s=0.1)])

    proxy.plan = plan
    store = Store.create(objects, chunk_size=1 << 16)
    content = {f"disk{number}.raw": chosen.randbytes(1_000_003 * (number + 1)) for number in range(3)}
    made = back_up(store, content)
    point = Store.open(objects).open_point(made.vm_id, made.point_id)
    for number, stored in enumerate(point.manifest.files):
        found = bytearray()
        table = point.chunks(number)
        for ref in table.locate(0, -(-table.size // store.chunk_size)):
            assert ref is not None
            found += store.fetch([ref])[0]
        assert found == content[stored.path]
    assert proxy.troubles > 10
