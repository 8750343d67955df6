"""What the store does not give, the replica does, soon; and what neither gives is the store's error."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    CorruptFrame,
    CorruptManifest,
    ObjectMissing,
    PointNotFound,
    StoreConflict,
    StoreDenied,
    StoreUnavailable,
    UnknownFormat,
    VmfsStubError,
)
from vmfs_stub.core.ids import PointId
from vmfs_stub.services.verify import verify
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.fallback import AVOIDED_S, TOLD_EACH_S, Fallback, ReplicatedStore
from vmfs_stub.store.impatience import Impatience
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keys import MANIFESTS, PACKS, SEGMENTS
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.store import Store

CHUNK = 64 * 1024
DISK = random.Random(8).randbytes(3 * CHUNK + 5)


class Asked:
    """Two places that say what they are told to, and remember that they were asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.here: VmfsStubError | None = None
        self.there: VmfsStubError | None = None
        self.fallback = Fallback(patience_s=5, clock=lambda: self.now)

    def read(self) -> str:
        return self.fallback.read(lambda: self._say("store", self.here), lambda: self._say("replica", self.there))

    def _say(self, place: str, error: VmfsStubError | None) -> str:
        self.log.append(place)
        if error is not None:
            raise error
        return place

    def order(self) -> list[str]:
        asked, self.log = self.log, []
        return asked


@pytest.fixture
def asked() -> Asked:
    return Asked()


def test_a_store_that_answers_is_asked_alone(asked: Asked) -> None:
    assert [asked.read(), asked.read()] == ["store", "store"]
    assert asked.order() == ["store", "store"]
    assert asked.fallback.counts.reads == 0


@pytest.mark.parametrize(
    "error",
    [ObjectMissing("gone"), CorruptFrame("damaged"), CorruptManifest("damaged"), UnknownFormat("in the first bytes")],
)
def test_damage_is_of_one_object(asked: Asked, error: VmfsStubError) -> None:
    asked.here = error
    assert asked.read() == "replica"
    asked.here = None
    assert asked.read() == "store"
    assert asked.order() == ["store", "replica", "store"]
    counts = asked.fallback.counts
    assert (counts.reads, counts.damaged, counts.last_damage, counts.last_damage_s) == (1, 1, str(error), 0.0)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), StoreDenied("no")])
def test_a_store_that_is_away_is_left_alone_for_a_while(asked: Asked, error: VmfsStubError) -> None:
    asked.here = error
    assert [asked.read() for _ in range(3)] == ["replica"] * 3
    assert asked.order() == ["store", "replica", "replica", "replica"]
    asked.now += AVOIDED_S
    assert asked.read() == "replica"
    assert asked.read() == "replica"
    assert asked.order() == ["store", "replica", "replica"]  # it was tried once more, in vain
    asked.now += AVOIDED_S
    asked.here = None
    assert [asked.read(), asked.read()] == ["store", "store"]
    assert asked.order() == ["store", "store"]
    assert (asked.fallback.counts.reads, asked.fallback.counts.damaged) == (5, 0)


def test_only_one_sees_whether_it_is_back(asked: Asked) -> None:
    asked.here = StoreUnavailable("away")
    asked.read()
    asked.order()
    asked.now += AVOIDED_S
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> str:
        begun.set()
        go_on.wait(10)
        return "store"

    first = threading.Thread(target=asked.fallback.read, args=(hang, lambda: "replica"))
    first.start()
    assert begun.wait(10)
    asked.here = None
    assert [asked.read(), asked.read()] == ["replica", "replica"]
    go_on.set()
    first.join()
    assert asked.read() == "store"


def test_what_the_replica_lacks_is_asked_for_in_a_store_that_is_avoided(asked: Asked) -> None:
    asked.here = StoreUnavailable("away")
    asked.read()
    asked.here, asked.there = None, ObjectMissing("not there")
    asked.order()
    assert asked.read() == "store"
    assert asked.order() == ["replica", "store"]
    asked.there = None
    assert asked.read() == "store"  # it is back, as was just seen


@pytest.mark.parametrize("there", [ObjectMissing("replica"), StoreUnavailable("replica"), CorruptFrame("replica")])
@pytest.mark.parametrize("here", [ObjectMissing("store"), StoreUnavailable("store"), CorruptFrame("store")])
def test_the_error_is_the_stores(asked: Asked, here: VmfsStubError, there: VmfsStubError) -> None:
    asked.here, asked.there = here, there
    for _ in range(2):  # also while it is avoided
        with pytest.raises(type(here), match="store"):
            asked.read()


@pytest.mark.parametrize("error", [PointNotFound("void"), StoreConflict("never here")])
def test_what_the_replica_would_say_as_well_is_not_asked(asked: Asked, error: VmfsStubError) -> None:
    asked.here = error
    with pytest.raises(type(error)):
        asked.read()
    assert asked.order() == ["store"]


def test_the_log_has_one_line_for_many(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    asked.here = ObjectMissing("gone")
    for _ in range(5):
        asked.read()
    assert len(caplog.records) == 1
    asked.now += TOLD_EACH_S
    asked.read()
    assert len(caplog.records) == 2


def test_a_store_that_hangs_is_not_waited_for_for_long() -> None:
    go_on = threading.Event()
    fallback = Fallback(patience_s=0.1)
    began = time.monotonic()
    try:
        for _ in range(10):
            assert fallback.read(go_on.wait, lambda: "replica") == "replica"
        assert time.monotonic() - began < 5  # once, not ten times
    finally:
        go_on.set()


def test_calls_that_hang_take_a_bounded_number_of_threads() -> None:
    go_on, began = threading.Event(), [0]
    impatience = Impatience(0.02, threads_max=3)

    def hang() -> None:
        began[0] += 1
        go_on.wait()

    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            impatience.call(hang)
    assert began[0] == 3
    go_on.set()
    patient = Impatience(5, threads_max=3)
    assert [patient.call(lambda at=at: at) for at in range(50)] == list(range(50))  # type: ignore[misc]
    deadline = time.monotonic() + 10
    while True:  # those that were given up are not made, and the threads are there for others
        try:
            assert impatience.call(lambda: "again") == "again"
            break
        except StoreUnavailable:
            assert time.monotonic() < deadline
    assert began[0] == 3


# With a store


class Two:
    def __init__(self, source: KeySource | None) -> None:
        self.here = FakeObjects()
        self.plain = Store.create(self.here, chunk_size=CHUNK, source=source)
        self.manifest: Manifest = back_up(self.plain, {"disk": DISK})
        self.there = FakeObjects()
        self.there.contents.update(self.here.contents)
        self.store = self.opened()

    def opened(self) -> ReplicatedStore:
        replica = Store(self.there, self.plain.description, self.plain.key)
        return ReplicatedStore(self.plain, replica, Fallback(patience_s=5))

    def disk(self) -> bytes:
        table = self.opened().open_point(self.manifest.vm_id, self.manifest.point_id).chunks(0)
        refs: list[FrameRef] = [ref for ref in table.locate(0, table.chunk_count) if ref is not None]
        return b"".join(self.store.fetch(refs))


@pytest.fixture(params=[None, KEY_SOURCE], ids=["plain", "encrypted"])
def two(request: pytest.FixtureRequest) -> Two:
    return Two(request.param)


def lose(data: bytes) -> bytes | None:
    return None


def spoil(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 4]) + data[61:]


def cut(data: bytes) -> bytes:
    return data[:40]


@pytest.mark.parametrize("kind", [PACKS, SEGMENTS, MANIFESTS])
@pytest.mark.parametrize("how", [lose, spoil, cut])
def test_what_is_lost_or_damaged_is_read_from_the_replica(
    two: Two, kind: str, how: Callable[[bytes], bytes | None]
) -> None:
    for key, data in list(two.here.contents.items()):
        if key.startswith(kind):
            changed = how(data)
            if changed is None:
                del two.here.contents[key]
            else:
                two.here.contents[key] = changed
    assert two.disk() == DISK
    two.there.contents.clear()
    with pytest.raises(VmfsStubError):
        two.disk()


def test_a_store_that_is_away_altogether(two: Two) -> None:
    def refuse(call: str, key: str) -> None:
        raise StoreUnavailable("away")

    two.here.before = refuse
    assert two.disk() == DISK
    with pytest.raises(StoreUnavailable):
        two.store.vms()  # what there is, only the store says


def test_no_point_is_no_point(two: Two) -> None:
    with pytest.raises(PointNotFound):
        two.store.open_point(two.manifest.vm_id, PointId("0" * 32))


def test_verify_says_who_answered(two: Two) -> None:
    assert verify(two.opened()).replica_reads == 0
    (key,) = [key for key in two.here.contents if key.startswith(PACKS)]
    two.here.contents[key] = spoil(two.here.contents[key])
    report = verify(two.opened())
    assert report.findings == ()
    assert report.replica_reads > 0


def test_a_backup_relies_on_nothing_that_only_the_replica_has(two: Two) -> None:
    (key,) = [key for key in two.here.contents if key.startswith(PACKS)]
    index = ChunkIndex(None, two.plain.id)
    index.sync(two.plain.objects)
    del two.here.contents[key]
    with pytest.raises(StoreConflict):
        back_up(two.store, {"disk": DISK}, index=index)
    back_up(two.store, {"disk": DISK}, index=index)  # stored afresh
    assert len([name for name in two.here.contents if name.startswith(PACKS)]) == 1
