"""Forgotten marks: a point that has one is in no listing and still there for placeholders; one with pins gets none."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import back_up, new_id

from vmfs_stub.core.errors import CorruptStoreObject, PointNotFound, PointPinned, StoreUnavailable, UnknownFormat
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.services.stored_vms import find_stored
from vmfs_stub.services.verify import verify
from vmfs_stub.store.forgotten import Forgotten, decode_forgotten, encode_forgotten
from vmfs_stub.store.keys import forgotten_key, manifest_key, pin_key
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.pins import Pin, encode_pin
from vmfs_stub.store.store import Store

VM, POINT = VmId("a" * 32), PointId("b" * 32)


@pytest.fixture(params=["fake", "memory", "file"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "fake":
        return FakeObjects()
    url = f"memory://{secrets.token_hex(8)}" if request.param == "memory" else f"file://{tmp_path}/store"
    return open_objects(StoreAt(url), create=True)


@pytest.fixture
def store(objects: ObjectStore) -> Store:
    return Store.create(objects)


def forget(store: Store, made: Manifest) -> None:
    store.forget(made.vm_id, made.point_id, host="host1", why="by hand")


def a_pin(host: str = "host1", datastore: str = "vms") -> Pin:
    return Pin(PlaceholderId(new_id()), host, datastore, 1.0, new_id())


def put_pin(objects: ObjectStore, made: Manifest, pin: Pin) -> None:
    key = pin_key(made.vm_id, made.point_id, pin.placeholder_id)
    objects.put(key, encode_pin(pin, made.vm_id, made.point_id))


def test_a_forgotten_point_is_in_no_listing_and_can_still_be_opened(store: Store) -> None:
    first = back_up(store, {"disk": b"first"})
    second = back_up(store, {"disk": b"second"}, vm_id=first.vm_id)
    other = back_up(store, {"disk": b"other"}, vm_name="db")
    forget(store, first)
    forget(store, other)
    for seen in (store, Store.open(store.objects)):
        assert [(vm.vm_id, [point.point_id for point in vm.points]) for vm in seen.vms()] == [
            (first.vm_id, [second.point_id])
        ]
        assert [point.point_id for point in seen.points(first.vm_id, with_damaged=True)] == [second.point_id]
        assert seen.points(other.vm_id) == []
        assert seen.point_counts() == {first.vm_id: 1}
        with pytest.raises(PointNotFound):
            find_stored(seen.vms(), f"{first.vm_id}@{first.point_id}")
        with pytest.raises(PointNotFound):
            verify(seen, vm_id=first.vm_id, point_id=first.point_id)
        assert verify(seen).point_count == 1
        assert seen.open_point(first.vm_id, first.point_id).manifest == first


def test_the_first_mark_stays(store: Store) -> None:
    made = back_up(store, {"disk": b"x"})
    store.forget(made.vm_id, made.point_id, host="host1", why="by hand")
    store.forget(made.vm_id, made.point_id, host="host2", why="rules: keep_last 1")
    ((vm_id, point_id, mark),) = store.forgotten()
    assert (vm_id, point_id) == (made.vm_id, made.point_id)
    assert mark is not None
    assert (mark.host, mark.why, mark.forgotten_s > 10**9) == ("host1", "by hand", True)


def test_a_point_with_pins_is_refused_and_says_where_they_are(store: Store) -> None:
    pins = [a_pin(), a_pin(), a_pin("host2", "images")]
    made = back_up(store, {"disk": b"x"}, pins=pins)
    free = back_up(store, {"disk": b"y"}, vm_id=made.vm_id)
    assert store.pin_counts() == {(made.vm_id, made.point_id): 3}
    wanted = "needed by 2 placeholders in datastore vms of host host1, 1 placeholder in datastore images of host host2;"
    with pytest.raises(PointPinned, match=wanted):
        forget(store, made)
    assert store.forgotten() == []
    assert store.point_counts() == {made.vm_id: 2}
    store.check_unpinned(free.vm_id, free.point_id)
    for pin in pins:
        store.remove_pin(made.vm_id, made.point_id, pin.placeholder_id)
    forget(store, made)
    assert [point_id for _, point_id, _ in store.forgotten()] == [made.point_id]


def test_an_unreadable_pin_is_a_pin(store: Store, objects: ObjectStore) -> None:
    made = back_up(store, {"disk": b"x"})
    objects.put(pin_key(made.vm_id, made.point_id, PlaceholderId(new_id())), b"damaged")
    with pytest.raises(CorruptStoreObject):
        forget(store, made)
    assert store.forgotten() == []
    assert store.pin_counts() == {(made.vm_id, made.point_id): 1}


def test_a_pin_that_comes_in_between_is_told_and_the_mark_stays() -> None:
    objects = FakeObjects()
    store = Store.create(objects)
    made = back_up(store, {"disk": b"x"})

    def pin_first(call: str, key: str) -> None:
        if (call, key) == ("put", forgotten_key(made.vm_id, made.point_id)):
            objects.before = lambda call, key: None
            put_pin(objects, made, a_pin())

    objects.before = pin_first
    with pytest.raises(PointPinned, match="marked as forgotten by now"):
        forget(store, made)
    assert [point_id for _, point_id, _ in store.forgotten()] == [made.point_id]


def test_a_mark_that_cannot_be_read_counts(store: Store, objects: ObjectStore) -> None:
    made = back_up(store, {"disk": b"x"})
    objects.put(forgotten_key(made.vm_id, made.point_id), b"")
    objects.put("forgotten/README", b"not a mark")
    assert store.vms() == []
    assert store.forgotten() == [(made.vm_id, made.point_id, None)]


def test_marks_are_listed_once_and_before_the_manifests() -> None:
    """The collector deletes a manifest before its mark: in the other order a point that goes could be seen again."""
    objects = FakeObjects()
    store = Store.create(objects)
    vm_id = new_id()
    for _ in range(3):
        made = back_up(store, {"disk": b"x"}, vm_id=vm_id)
    forget(store, made)
    listed: list[str] = []
    objects.before = lambda call, key: listed.append(key) if call == "list" else None
    store.vms()
    store.points(made.vm_id)
    store.point_counts()
    store.pin_counts()
    of_all, of_vm = ["forgotten/", "manifests/"], [f"forgotten/{vm_id}/", f"manifests/{vm_id}/"]
    assert listed == [*of_all, *of_vm, *of_all, "unpinned/", "pins/"]


def test_a_mark_that_goes_while_it_is_read_is_none() -> None:
    objects = FakeObjects()
    store = Store.create(objects)
    made = back_up(store, {"disk": b"x"})
    forget(store, made)

    def collect(call: str, key: str) -> None:
        if call == "get":
            objects.contents.pop(manifest_key(made.vm_id, made.point_id), None)
            objects.contents.pop(key, None)

    objects.before = collect
    assert store.forgotten() == []


def test_a_store_that_is_away_is_told() -> None:
    objects = FakeObjects()
    store = Store.create(objects)
    made = back_up(store, {"disk": b"x"})

    def away(call: str, key: str) -> None:
        if key.startswith("forgotten/"):
            raise StoreUnavailable(key)

    objects.before = away
    for call in (store.vms, store.point_counts, store.forgotten, lambda: forget(store, made)):
        with pytest.raises(StoreUnavailable):
            call()


def test_a_mark_is_a_document_of_its_place() -> None:
    mark = Forgotten("h\udcff", 12.5, "rules: keep_last 3", "n")
    data, key = encode_forgotten(mark, VM, POINT), forgotten_key(VM, POINT)
    assert decode_forgotten(data, key) == mark
    with pytest.raises(CorruptStoreObject, match="belongs to"):
        decode_forgotten(data, forgotten_key(VM, PointId("c" * 32)))
    with pytest.raises(CorruptStoreObject):
        decode_forgotten(data.replace(b"keep_last 3", b"keep_last 4"), key)
    with pytest.raises(UnknownFormat):
        decode_forgotten(encode_pin(a_pin(), VM, POINT), key)
