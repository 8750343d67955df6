"""Claims: which datastore has the newest state of a VM, so that no two run it, and none runs an older one unknowingly.

Purpose: the claims of a VM are documents under ``claims/<vm id>/<epoch>``, numbered from 1.  The highest counts, and to
take the next number (a put if absent) is to take the VM: of two that try at once, one loses.  A claim is *held* from
the first use of a VM on, and *free* once all that is new is in a restore point: then anybody may go on from there.

Garbage collection removes all but the newest two, and those only when a listing has shown the newer ones for long.  So
whoever has taken a number lists once more: where that shows a higher one, the number had been removed and was not free.
This module must not know who may take a VM from whom: that is decided where it is asked for.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from vmfs_stub.core.errors import ClaimedElsewhere, ObjectExists, ObjectMissing, StoreUnavailable
from vmfs_stub.core.ids import DatastoreId, PointId, VmId
from vmfs_stub.core.times import time_text
from vmfs_stub.store import documents
from vmfs_stub.store.format import CLAIM_VERSION, DOCUMENT_SIZE_MAX, FEATURES_KNOWN
from vmfs_stub.store.keys import CLAIMS, claim_key, claim_named, claims_of
from vmfs_stub.store.objects import ObjectStore

CLAIM_FORMAT = "vmfs-stub claim"
EPOCH_MAX: Final = 10**12 - 1
_CLAIMS_KEPT: Final = 2
_LOOKS_MAX: Final = 3
"""A claim that is listed and then missing was removed for a newer one, which the next listing shows."""


class ClaimState(StrEnum):
    """What a claim says of the newest state of a VM."""

    HELD = "held"
    """It is in that datastore, and perhaps nowhere else."""
    FREE = "free"
    """It is restore point ``point_id``; whoever needs it next takes it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who has the newest state of a VM since when (``since_s`` is Unix time).

    ``host`` and ``datastore`` are names for people, ``datastore_id`` is what counts.
    """

    vm_id: VmId
    epoch: int
    state: ClaimState
    datastore_id: DatastoreId
    host: str
    datastore: str
    since_s: float
    point_id: PointId | None = None
    nonce: str = ""


def newest_claim(objects: ObjectStore, vm_id: VmId) -> Claim | None:
    """The claim of a VM that counts; None when nobody ever claimed it.

    What was just made may not be listed yet: whether there is a next epoch is asked by its name.
    Raises: StoreUnavailable, StoreDenied; CorruptStoreObject, UnknownFormat: a claim that cannot be read is not none.
    """
    for _ in range(_LOOKS_MAX):
        epoch = newest_epoch(objects, vm_id)
        try:
            claim = _read(objects, vm_id, epoch) if epoch else None
        except ObjectMissing:
            continue
        return _later(objects, vm_id, claim)
    raise _restless(vm_id)


def newest_epoch(objects: ObjectStore, vm_id: VmId) -> int:
    """The highest listed epoch of a VM, 0 when it has none.  Raises: StoreUnavailable."""
    return max(_epochs(objects, claims_of(vm_id)).get(vm_id, ()), default=0)


def claimed_vms(objects: ObjectStore) -> dict[VmId, int]:
    """The highest listed epoch of every VM that was ever claimed, from the names alone.  Raises: StoreUnavailable."""
    return {vm_id: max(epochs) for vm_id, epochs in _epochs(objects, CLAIMS).items()}


def outdated_claims(objects: ObjectStore) -> frozenset[str]:
    """Names of all claims but the newest two of each VM.  Raises: StoreUnavailable."""
    return frozenset(
        claim_key(vm_id, epoch)
        for vm_id, epochs in _epochs(objects, CLAIMS).items()
        for epoch in sorted(epochs)[:-_CLAIMS_KEPT]
    )


def put_claim(objects: ObjectStore, claim: Claim) -> None:
    """Take an epoch, which is to be one more than the newest that is known.

    Raises: ClaimedElsewhere when that epoch or a later one is there, be it one's own; as `try_claim`.
    """
    later = try_claim(objects, claim)
    if later is not None:
        raise claimed_elsewhere(later)


def try_claim(objects: ObjectStore, claim: Claim) -> Claim | None:
    """Take an epoch as `put_claim` does; None when it is the newest now, else the claim that counts instead.

    Raises: StoreUnavailable (it may be taken then), StoreDenied, StoreFull; as `newest_claim`.
    """
    try:
        # The nonce tells a retried put from another one's.
        objects.put(claim_key(claim.vm_id, claim.epoch), encode_claim(replace(claim, nonce=secrets.token_hex(8))))
    except ObjectExists:
        newest = newest_claim(objects, claim.vm_id)
        if newest is None or newest.epoch < claim.epoch:
            raise _restless(claim.vm_id) from None
        return newest
    return newest_claim(objects, claim.vm_id) if newest_epoch(objects, claim.vm_id) > claim.epoch else None


def claimed_elsewhere(claim: Claim) -> ClaimedElsewhere:
    """The error that says who has a VM since when, and what can be done."""
    if claim.state is ClaimState.HELD:
        return ClaimedElsewhere(
            f"VM {claim.vm_id} is in use in datastore {claim.datastore} of host {claim.host} since "
            f"{time_text(claim.since_s)}: its newest state is there. Archive it there, remove what is here of it, and "
            "adopt it here then; or, if that state is to be given up, `vmfs-stub adopt --force --accept-loss`"
        )
    return ClaimedElsewhere(
        f"VM {claim.vm_id} was last archived in datastore {claim.datastore} of host {claim.host}, at "
        f"{time_text(claim.since_s)}: its newest state is restore point {claim.point_id}. `vmfs-stub adopt` brings it "
        "here, when what is here of it was removed"
    )


def encode_claim(claim: Claim) -> bytes:
    """The bytes of a claim."""
    return documents.encode(
        CLAIM_FORMAT,
        CLAIM_VERSION,
        {
            "vm_id": claim.vm_id,
            "epoch": claim.epoch,
            "state": claim.state.value,
            "datastore_id": claim.datastore_id,
            "host": claim.host,
            "datastore": claim.datastore,
            "since_s": claim.since_s,
            "point_id": claim.point_id,
            "nonce": claim.nonce,
        },
    )


def decode_claim(data: bytes, key: str) -> Claim:
    """Parse the claim that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, CLAIM_FORMAT, version=CLAIM_VERSION, features=FEATURES_KNOWN)
    state = fields.text("state")
    if state not in set(ClaimState):
        raise fields.error("state", "is not known")
    claim = Claim(
        vm_id=VmId(fields.hex_id("vm_id")),
        epoch=fields.integer("epoch", low=1, high=EPOCH_MAX),
        state=ClaimState(state),
        datastore_id=DatastoreId(fields.hex_id("datastore_id")),
        host=fields.text("host"),
        datastore=fields.text("datastore"),
        since_s=fields.number("since_s"),
        point_id=None if fields.text_or_none("point_id") is None else PointId(fields.hex_id("point_id")),
        nonce=fields.text("nonce"),
    )
    if claim_key(claim.vm_id, claim.epoch) != key:
        raise fields.error("epoch", "or VM is another one's, not that of its name")
    if (claim.state is ClaimState.FREE) != (claim.point_id is not None):
        raise fields.error("point_id", "goes with a free claim, and with no other")
    return claim


def _epochs(objects: ObjectStore, folder: str) -> dict[VmId, list[int]]:
    """Those that are listed, of each VM that has any in that folder; epoch 0 is none."""
    found: dict[VmId, list[int]] = {}
    for info in objects.list(folder):
        named = claim_named(info.key)
        if named is not None and named[1] > 0:
            found.setdefault(named[0], []).append(named[1])
    return found


def _read(objects: ObjectStore, vm_id: VmId, epoch: int) -> Claim:
    key = claim_key(vm_id, epoch)
    return decode_claim(objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)


def _later(objects: ObjectStore, vm_id: VmId, claim: Claim | None) -> Claim | None:
    """The claim that has followed this one, or it itself.  They follow one another without gaps."""
    while True:
        try:
            claim = _read(objects, vm_id, 1 if claim is None else claim.epoch + 1)
        except ObjectMissing:
            return claim


def _restless(vm_id: VmId) -> StoreUnavailable:
    return StoreUnavailable(f"the claims of VM {vm_id} change faster than they can be read")
