"""Retries: only what may pass, a bounded number, and a lost answer is not a lost race."""

from __future__ import annotations

import pytest
from store_fakes import FakeObjects

from vmfs_stub.core.errors import ConfigError, ObjectExists, StoreDenied, StoreError, StoreUnavailable
from vmfs_stub.store.objects import put_anew
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy

POLICY = RetryPolicy(attempts_max=4, pause_s=1.0, pause_max_s=3.0)


class Failing:
    """Fails the first ``count`` calls."""

    def __init__(self, count: int, error: type[StoreError] = StoreUnavailable) -> None:
        self.count = count
        self.error = error

    def __call__(self, call: str, key: str) -> None:
        if self.count:
            self.count -= 1
            raise self.error(f"{call} {key}")


def _retrying(inner: FakeObjects) -> tuple[RetryingObjects, list[float]]:
    pauses: list[float] = []
    return RetryingObjects(inner, POLICY, sleep=pauses.append, random=lambda: 1.0), pauses


def test_pauses_grow_and_are_bounded() -> None:
    inner = FakeObjects(Failing(3))
    inner.contents["key"] = b"x"
    objects, pauses = _retrying(inner)
    assert objects.get("key") == b"x"
    assert pauses == [1.0, 2.0, 3.0]


def test_the_last_failure_is_raised() -> None:
    objects, pauses = _retrying(FakeObjects(Failing(100)))
    for call in (
        lambda: objects.get("key"),
        lambda: objects.get_range("key", offset=0, length=1),
        lambda: objects.put("key", b""),
        lambda: objects.delete("key"),
        lambda: objects.size("key"),
        lambda: list(objects.list("")),
    ):
        pauses.clear()
        with pytest.raises(StoreUnavailable):
            call()
        assert len(pauses) == 3


def test_what_does_not_pass_is_not_retried() -> None:
    objects, pauses = _retrying(FakeObjects(Failing(1, StoreDenied)))
    with pytest.raises(StoreDenied):
        objects.get("key")
    assert pauses == []


class LosesAnswers(FakeObjects):
    """Does the put, then fails to say so, once."""

    def put(self, key: str, data: bytes, *, if_absent: bool = True) -> None:  # type: ignore[override]
        fresh = key not in self.contents
        super().put(key, data, if_absent=if_absent)
        if fresh:
            raise StoreUnavailable(key)


def test_each_try_to_put_anew_has_its_own_name() -> None:
    objects, _ = _retrying(inner := FakeObjects(Failing(2)))
    names = iter(["a", "b", "c"])
    assert put_anew(objects, lambda: (next(names), b"")) == "c"
    assert inner.calls == [("put", "a"), ("put", "b"), ("put", "c")]
    assert put_anew(inner, lambda: ("d", b"")) == "d"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_lost_answer_to_a_conditional_put_is_success(kind: type) -> None:
    objects, _ = _retrying(LosesAnswers())
    objects.put("key", kind(b"mine"))
    assert objects.get("key") == b"mine"


def test_somebody_elses_object_is_not_success() -> None:
    inner = FakeObjects(Failing(1))
    inner.contents["key"] = b"theirs"
    objects, _ = _retrying(inner)
    with pytest.raises(ObjectExists):
        objects.put("key", b"mine")


def test_equal_content_at_the_first_attempt_is_still_a_conflict() -> None:
    inner = FakeObjects()
    inner.contents["key"] = b"same"
    objects, _ = _retrying(inner)
    with pytest.raises(ObjectExists):
        objects.put("key", b"same")


def test_a_listing_that_fails_midway_hands_out_each_once() -> None:
    class Midway(FakeObjects):
        failed = False

        def list(self, prefix):  # type: ignore[no-untyped-def]
            found = list(super().list(prefix))
            yield found[0]
            if not self.failed:
                self.failed = True
                raise StoreUnavailable(prefix)
            yield from found[1:]

    inner = Midway()
    inner.contents = {"a": b"", "b": b"", "c": b""}
    objects, pauses = _retrying(inner)
    assert [info.key for info in objects.list("")] == ["a", "b", "c"]
    assert len(pauses) == 1


@pytest.mark.parametrize("url", ["", "relative/path", "http://host/x", "file://host/path", "memory://", "s3:"])
def test_unknown_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        open_objects(StoreAt(url))


def test_memory_is_one_store_per_name() -> None:
    open_objects(StoreAt("memory://one")).put("key", b"x", if_absent=False)
    assert open_objects(StoreAt("memory://one")).get("key") == b"x"
    assert list(open_objects(StoreAt("memory://two")).list("")) == []
