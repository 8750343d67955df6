"""Claims: of two that take the same epoch one loses, whatever was removed meanwhile; a damaged claim is not none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_fakes import FakeObjects

from vmfs_stub.core.errors import ClaimedElsewhere, CorruptStoreObject, ObjectMissing, StoreUnavailable
from vmfs_stub.core.ids import DatastoreId, PointId, VmId
from vmfs_stub.core.times import time_text
from vmfs_stub.store.claims import (
    Claim,
    ClaimState,
    claimed_elsewhere,
    claimed_vms,
    decode_claim,
    encode_claim,
    newest_claim,
    outdated_claims,
    put_claim,
    try_claim,
)
from vmfs_stub.store.keys import claim_key

VM, OTHER_VM, POINT = VmId("a" * 32), VmId("d" * 32), PointId("b" * 32)
HERE, THERE = DatastoreId("1" * 32), DatastoreId("2" * 32)


def held(epoch: int, datastore: DatastoreId = HERE, vm_id: VmId = VM) -> Claim:
    return Claim(vm_id, epoch, ClaimState.HELD, datastore, f"host{datastore[0]}", "vms", 10.0)


def free(epoch: int, datastore: DatastoreId = HERE) -> Claim:
    return replace(held(epoch, datastore), state=ClaimState.FREE, point_id=POINT)


def test_the_highest_epoch_counts_and_of_two_that_take_one_the_second_loses() -> None:
    objects = FakeObjects()
    assert newest_claim(objects, VM) is None
    for claim in (held(1), free(2), held(3, THERE)):
        put_claim(objects, claim)
    with pytest.raises(ClaimedElsewhere, match="in use in datastore vms of host host2"):
        put_claim(objects, held(3))
    found = newest_claim(objects, VM)
    assert found is not None
    assert replace(found, nonce="") == held(3, THERE)
    put_claim(objects, held(1, vm_id=OTHER_VM))
    assert claimed_vms(objects) == {VM: 3, OTHER_VM: 1}


def test_epochs_are_ordered_by_number_and_not_by_age_or_by_foreign_names() -> None:
    objects = FakeObjects()
    for epoch in (10, 9, 2):
        objects.put(claim_key(VM, epoch), encode_claim(held(epoch)))
    objects.put(f"claims/{VM}/notes.txt", b"")
    objects.put(f"claims/{VM}/{11:09d}", b"")
    found = newest_claim(objects, VM)
    assert found is not None
    assert found.epoch == 10


def test_an_epoch_that_was_removed_is_not_free() -> None:
    objects = FakeObjects()
    for epoch in (4, 5):
        objects.put(claim_key(VM, epoch), encode_claim(held(epoch, THERE)))
    with pytest.raises(ClaimedElsewhere, match="host2"):
        put_claim(objects, held(3))


def test_a_claim_that_is_removed_while_it_is_read_is_looked_for_again() -> None:
    objects = FakeObjects()
    put_claim(objects, held(1))
    reads = 0

    def moves_on(call: str, key: str) -> None:
        nonlocal reads
        if call == "get":
            reads += 1
            if reads == 1:
                objects.contents[claim_key(VM, 3)] = encode_claim(held(3, THERE))
                raise ObjectMissing(key)

    objects.before = moves_on
    found = newest_claim(objects, VM)
    assert found is not None
    assert (found.epoch, reads) == (3, 3)  # and whether there is a fourth

    def never_there(call: str, key: str) -> None:
        if call == "get":
            raise ObjectMissing(key)

    objects.before = never_there
    with pytest.raises(StoreUnavailable):
        newest_claim(objects, VM)


def test_a_damaged_claim_is_an_error_and_not_none() -> None:
    objects = FakeObjects()
    put_claim(objects, held(1))
    data = objects.contents[claim_key(VM, 1)]
    objects.contents[claim_key(VM, 1)] = data.replace(b"host1", b"host9")
    with pytest.raises(CorruptStoreObject):
        newest_claim(objects, VM)


@pytest.mark.parametrize(
    "claim",
    [held(2), held(1, vm_id=OTHER_VM), replace(held(1), point_id=POINT), replace(free(1), point_id=None)],
    ids=["another epoch", "another VM", "held with a point", "free without"],
)
def test_a_claim_that_is_not_what_its_name_says_is_refused(claim: Claim) -> None:
    with pytest.raises(CorruptStoreObject):
        decode_claim(encode_claim(claim), claim_key(VM, 1))


def test_whoever_comes_second_is_told_of_a_claim_that_is_not_listed_yet() -> None:
    objects = FakeObjects()
    put_claim(objects, free(1))
    objects.put(claim_key(VM, 2), encode_claim(held(2, THERE)))
    listed = objects.list
    objects.list = lambda prefix: iter([info for info in listed(prefix) if not info.key.endswith("2")])  # type: ignore[method-assign]
    later = try_claim(objects, held(2))
    assert later is not None
    assert (later.epoch, later.datastore_id) == (2, THERE)
    assert newest_claim(objects, VM) == later


def test_what_is_outdated_is_known_from_names() -> None:
    objects = FakeObjects()
    for epoch in (1, 2, 3):
        put_claim(objects, held(epoch))
    put_claim(objects, held(1, vm_id=OTHER_VM))
    assert outdated_claims(objects) == {claim_key(VM, 1)}


def test_a_time_that_no_calendar_has_is_no_reason_to_say_nothing() -> None:
    assert f"since {time_text(10.0)}" in str(claimed_elsewhere(replace(held(1), since_s=10.0)))
    assert "at -: its newest state" in str(claimed_elsewhere(replace(free(1), since_s=1e18)))
