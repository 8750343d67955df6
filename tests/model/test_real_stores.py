"""Random lives of a datastore whose store is real: a directory, memory, Ceph's S3 gateway, and that behind troubles.

`scripts/soak model --store …` plays many more.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Final

import pytest

from scripts.lab.s3_server import Bucket
from scripts.lab.s3_troubles import expect_met
from tests.model.play import play
from tests.store_places import PLACES, InBucket, Place
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.retrying import RetryingObjects

SEEDS: Final[dict[str, Sequence[int]]] = {"file": range(12), "memory": range(12), "s3": range(8)}
TROUBLED_SEEDS: Final = range(8)
SEEDS_FOR_A_FAULT: Final = 20


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    name: str = request.param
    return InBucket(request.getfixturevalue("bucket")) if name == "s3" else PLACES[name]


@pytest.mark.parametrize(
    ("place", "seed"), [(name, seed) for name, seeds in SEEDS.items() for seed in seeds], indirect=["place"]
)
def test_a_real_store_holds_what_was_written_to_it(place: Place, seed: int) -> None:
    play(seed, place=place)


def test_no_trouble_of_the_store_loses_or_changes_anything(bucket: Bucket) -> None:
    place = InBucket(bucket, troubled=True)
    for seed in TROUBLED_SEEDS:
        play(seed, place=place)
    expect_met(place.met, ("answered 503", "answered 500", "lost", "forgotten PUT", "cut", "given up"))


def test_a_put_that_takes_its_own_first_try_for_another_s_is_found(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: RetryingObjects, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        self._retried(lambda _: self.inner.put(key, data, if_absent=if_absent))

    monkeypatch.setattr(RetryingObjects, "put", put)
    place = InBucket(bucket, troubled=True)
    with pytest.raises((AssertionError, BaseExceptionGroup)) as found:
        for seed in range(SEEDS_FOR_A_FAULT):
            play(seed, place=place)
    assert "exists already" in "".join(traceback.format_exception(found.value))
