"""Which restore point of a VM of the store is adopted here, and when none is without being told to.

What is newest is what the claim says: a free one names the restore point.  A held one says that the newest state is
in a datastore, and perhaps nowhere else: of the store, the newest point is the nearest to it.  This module decides,
and touches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.errors import ClaimedElsewhere, CorruptManifest, PointNotFound, Refused, VmfsStubError
from vmfs_stub.core.ids import DatastoreId
from vmfs_stub.core.times import age_text, time_text
from vmfs_stub.services.stored_vms import LATEST, find_point
from vmfs_stub.store.claims import Claim, ClaimState
from vmfs_stub.store.points import PointSummary, StoredVm


@dataclass(frozen=True, slots=True)
class Told:
    """What an operator has said: ``force`` to take a VM from the datastore that has it, ``accept_loss`` to go without
    what was written since the restore point."""

    force: bool = False
    accept_loss: bool = False


def chosen_point(
    vm: StoredVm, named: str, claim: Claim | None, *, here: DatastoreId, told: Told, now_s: float
) -> PointSummary:
    """The restore point to adopt: the newest state, or the one that is ``named``, if that may be.

    ``claim`` is the one that counts, ``here`` this datastore.  Raises: ClaimedElsewhere, Refused (an older point),
    PointNotFound, AmbiguousName, CorruptManifest (of the point, or of one that may be the newest).
    """
    newest = _newest(vm, claim)
    if named != LATEST:
        point = find_point(vm, named)
        if point.damaged is not None:
            raise CorruptManifest(f"restore point {point.point_id} of VM {_name(vm)} cannot be read: {point.damaged}")
    elif isinstance(newest, VmfsStubError):
        raise newest
    else:
        point = newest
    if claim is not None and claim.state is ClaimState.HELD and claim.datastore_id != here:
        _check_may_take(vm, point, claim, told, now_s)
    if point != newest and not told.accept_loss:
        raise Refused(
            f"restore point {point.point_id} of VM {_name(vm)} {_rolled_back(newest)}; --accept-loss goes without "
            "what was written since"
        )
    return point


def _newest(vm: StoredVm, claim: Claim | None) -> PointSummary | VmfsStubError:
    """The point with the newest state, or what to raise where that cannot be told, or cannot be had."""
    hint = "`VM@POINT` with --accept-loss goes on from another one (`vmfs-stub points`)"
    if claim is not None and claim.state is ClaimState.FREE:
        point = next((known for known in vm.points if known.point_id == claim.point_id), None)
        if point is None:
            return PointNotFound(
                f"the newest state of VM {_name(vm)} is restore point {claim.point_id}, which is forgotten or gone; "
                f"{hint}"
            )
        if point.damaged is not None:
            return CorruptManifest(
                f"the newest state of VM {_name(vm)} is restore point {point.point_id}, which cannot be read "
                f"({point.damaged}); {hint}"
            )
        return point
    # When a damaged one was made is not known.
    damaged = next((known for known in vm.points if known.damaged is not None), None)
    if damaged is not None:
        return CorruptManifest(
            f"restore point {damaged.point_id} of VM {_name(vm)} may be the newest, and cannot be read "
            f"({damaged.damaged}); {hint}"
        )
    return vm.points[-1]


def _check_may_take(vm: StoredVm, point: PointSummary, claim: Claim, told: Told, now_s: float) -> None:
    missing = [
        flag
        for flag, is_given in (
            ("--force takes it from the host that has it", told.force),
            (
                f"--accept-loss goes without what was written there since restore point {point.point_id}",
                told.accept_loss,
            ),
        )
        if not is_given
    ]
    if missing:
        raise ClaimedElsewhere(
            f"the newest state of VM {_name(vm)} is in datastore {claim.datastore} (id {claim.datastore_id}) of host "
            f"{claim.host} since {time_text(claim.since_s)}, and restore point {point.point_id} is "
            f"{age_text(now_s - point.created_s)} old. If that host is lost: {', and '.join(missing)}"
        )


def _rolled_back(newest: PointSummary | VmfsStubError) -> str:
    if isinstance(newest, VmfsStubError):
        return f"may not be its newest state ({newest})"
    return f"is not its newest state, which is restore point {newest.point_id} of {time_text(newest.created_s)}"


def _name(vm: StoredVm) -> str:
    return vm.name or vm.vm_id
