"""What becomes of restore points by rules, by age, and by the pins they have; what is not certain is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from store_fakes import FakeObjects
from store_points import new_id, put_point

from vmfs_stub.core.errors import CorruptStoreObject, PointPinned, StoreUnavailable
from vmfs_stub.core.ids import DatastoreId, PlaceholderId, PointId, VmId
from vmfs_stub.core.retention import Retention
from vmfs_stub.services.datastore_vms import DatastoreVms
from vmfs_stub.services.retention import Verdict, apply_rules, by_age, by_rules, carry_out, problem_of
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.claims import Claim, ClaimState
from vmfs_stub.store.keys import forgotten_key, manifest_key, pin_key
from vmfs_stub.store.pins import Pin, encode_pin
from vmfs_stub.store.points import PointSummary, StoredVm
from vmfs_stub.store.store import Store

VM = VmId("a" * 32)
NOW_S = 1_700_000_000.0
DAY_S = 86_400
LAST_TWO = Retention(keep_last=2)


@pytest.fixture
def store(objects: FakeObjects) -> Store:
    return Store.create(objects)


def points_of(*ages_days: float) -> list[PointSummary]:
    """Points that many days old."""
    return [
        PointSummary(VM, PointId(f"{number:032x}"), "web", NOW_S - age * DAY_S, "host1", 0, 0, datastore="vms")
        for number, age in enumerate(ages_days)
    ]


def damaged(point: PointSummary) -> PointSummary:
    return PointSummary(point.vm_id, point.point_id, "", 0.0, "", 0, 0, damaged="checksum does not match")


def told(verdicts: Sequence[Verdict]) -> list[tuple[bool, str]]:
    return [(verdict.is_kept, verdict.why) for verdict in verdicts]


def put_pin(objects: FakeObjects, point_id: PointId) -> None:
    pin = Pin(PlaceholderId(new_id()), "host2", "images", 1.0, new_id())
    objects.put(pin_key(VM, point_id, pin.placeholder_id), encode_pin(pin, VM, point_id))


def test_rules_say_why() -> None:
    points = points_of(3, 2, 1)
    assert told(by_rules(points, LAST_TWO, now_s=NOW_S)) == [
        (False, "not kept by keep_last 2"),
        (True, "last"),
        (True, "newest, last"),
    ]
    assert told(by_rules(points, Retention(), now_s=NOW_S)) == [(True, "no rules are set")] * 3


def test_what_cannot_be_read_counts_for_no_rule() -> None:
    points = points_of(4, 3, 2, 1)
    verdicts = by_rules([*points[:3], damaged(points[3])], LAST_TWO, now_s=NOW_S)
    assert [verdict.is_kept for verdict in verdicts] == [False, True, True, True]
    assert verdicts[3].why == "cannot be read: checksum does not match"
    points = [damaged(points[3]), *points[:3]]  # and is not the oldest, though its time is not known
    assert [verdict.why for verdict in by_rules(points, Retention(keep_yearly=2), now_s=NOW_S)[1:]] == [
        "oldest yearly",
        "not kept by keep_yearly 2",
        "newest, yearly",
    ]


@pytest.mark.parametrize(("ahead_days", "is_applied"), [(0.9, True), (1.1, False), (2**63 / DAY_S / 2, False)])
def test_a_point_from_the_future_stops_the_rules(ahead_days: float, is_applied: bool) -> None:
    """It is a wrong clock's, or somebody's who wants the others forgotten; or the clock here is wrong."""
    verdicts = by_rules(points_of(2, 1, -ahead_days), Retention(keep_last=1), now_s=NOW_S)
    assert [verdict.is_kept for verdict in verdicts] == ([False, False, True] if is_applied else [True] * 3)
    assert ("set the clock" in verdicts[0].why) is not is_applied
    assert (problem_of(verdicts) is None) is is_applied


def test_a_deleted_vm_is_forgotten_as_a_whole_when_its_newest_point_is_old() -> None:
    points = points_of(60, 31)
    assert (
        told(by_age(points, 30, now_s=NOW_S))
        == [(False, "deleted, and the newest is older than keep_deleted_days 30")] * 2
    )
    assert all(verdict.is_kept for verdict in by_age(points, 31, now_s=NOW_S))
    assert all(verdict.is_kept for verdict in by_age([*points, damaged(points[1])], 30, now_s=NOW_S))


def test_by_age_nothing_is_forgotten_while_a_clock_seems_to_be_wrong() -> None:
    verdicts = by_age(points_of(60, 50, -2), 30, now_s=NOW_S)
    assert all(verdict.is_kept and "from the future" in verdict.why for verdict in verdicts)
    assert "clock" in str(problem_of(verdicts))


def test_a_verdict_is_carried_out_unless_placeholders_depend_on_the_point(objects: FakeObjects, store: Store) -> None:
    for age in (5, 4, 3, 2, 1):
        put_point(store, vm_id=VM, created_s=NOW_S - age * DAY_S)
    points = store.points(VM)
    put_pin(objects, points[0].point_id)
    objects.put(pin_key(VM, points[1].point_id, PlaceholderId(new_id())), b"damaged")
    verdicts = by_rules(points, LAST_TWO, now_s=NOW_S)
    before = dict(objects.contents)
    for dry_run in (True, False):
        done = [carry_out(store, verdict, host="host1", dry_run=dry_run) for verdict in verdicts]
        assert [verdict.is_kept for verdict in done] == [True, True, False, True, True]
        assert "1 placeholder in datastore images of host host2" in done[0].why
        assert [type(verdict.error) for verdict in done[:3]] == [PointPinned, CorruptStoreObject, type(None)]
        assert problem_of(done) is done[1].error
        assert problem_of([done[0], *done[2:]]) is None
        if dry_run:
            assert objects.contents == before
    assert set(objects.contents) - set(before) == {forgotten_key(VM, points[2].point_id)}
    ((_, _, mark),) = store.forgotten()
    assert mark is not None
    assert (mark.host, mark.why) == ("host1", "not kept by keep_last 2")


async def test_the_rules_are_applied_to_one_vm(objects: FakeObjects, store: Store) -> None:
    for age in (3, 2, 1):
        put_point(store, vm_id=VM, created_s=NOW_S - age * DAY_S)
    other = put_point(store, vm_id="b" * 32, created_s=1.0)
    bad = put_point(store, vm_id=VM, created_s=NOW_S)
    objects.contents[manifest_key(VM, bad)] = b"damaged"
    threads = Threads(files_max=1, store_max=1, compute_max=1, store_timeout_s=10, transfer_timeout_s=10)
    try:
        done = await apply_rules(threads, store, VM, LAST_TWO, host="host1", now_s=NOW_S)
    finally:
        threads.close()
    assert sorted(verdict.is_kept for verdict in done) == [False, True, True, True]
    assert len(store.points(VM)) == 2
    assert bad in [point.point_id for point in store.points(VM, with_damaged=True)]
    assert [point.point_id for point in store.points(VmId("b" * 32))] == [other]


def test_a_store_that_is_away_is_told(objects: FakeObjects, store: Store) -> None:
    (point,) = points_of(1)

    def away(call: str, key: str) -> None:
        raise StoreUnavailable(key)

    objects.before = away
    with pytest.raises(StoreUnavailable):
        carry_out(store, Verdict(point, False, "by hand"), host="host1")


def test_who_deleted_a_vm_is_known_of_its_own_datastore_only() -> None:
    first, last = points_of(2, 1)
    here = DatastoreVms("host1", "vms", frozenset())

    def has_deleted(*points: PointSummary, here: DatastoreVms = here) -> bool | None:
        return here.has_deleted(StoredVm(VM, "web", points), lambda vm_id: None)

    assert has_deleted(first, last) is True
    assert has_deleted(first, last, here=replace(here, ids=frozenset({VM}))) is False
    assert has_deleted(replace(first, host="host2"), last) is True
    assert has_deleted(first, replace(last, host="host2")) is None
    assert has_deleted(first, replace(last, datastore="")) is None
    assert has_deleted(first, replace(last, datastore="images")) is None
    assert has_deleted(replace(first, host="host2"), damaged(last)) is None
    assert has_deleted(damaged(last), first) is True
    assert has_deleted(damaged(last), here=here) is None


@pytest.mark.parametrize("state", ClaimState)
def test_a_vm_that_another_datastore_had_last_was_not_deleted_here(state: ClaimState) -> None:
    """Names are no proof: a lost datastore had those of the one in its place, and a VM may have been moved away."""
    (point,) = points_of(1)
    ours, theirs = DatastoreId("1" * 32), DatastoreId("2" * 32)
    here = DatastoreVms("host1", "vms", frozenset(), ours)

    def has_deleted(holder: DatastoreId, here: DatastoreVms = here) -> bool | None:
        claim = Claim(VM, 1, state, holder, "host1", "vms", NOW_S, point.point_id)
        return here.has_deleted(StoredVm(VM, "web", (point,)), lambda vm_id: claim)

    def damaged_claim(vm_id: VmId) -> Claim | None:
        raise CorruptStoreObject(vm_id)

    assert has_deleted(ours) is True
    assert has_deleted(theirs) is None
    assert has_deleted(ours, replace(here, id=None)) is None
    assert here.has_deleted(StoredVm(VM, "web", (point,)), damaged_claim) is None
