"""Garbage collection beside backups on other hosts, and the mistakes that such a world must find."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.collection import hosts
from tests.collection.hosts import play
from vmfs_stub.core.errors import ObjectExists
from vmfs_stub.store import collector, committing, uses
from vmfs_stub.store.claims import Claim, encode_claim
from vmfs_stub.store.collector import Collector
from vmfs_stub.store.condemned import Condemned
from vmfs_stub.store.condemning import Condemning
from vmfs_stub.store.keys import PENDING_SUFFIX, claim_key
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.retirement import Retirement

Patch = pytest.MonkeyPatch

SEEDS = 40
SEEDS_FOR_A_FAULT = 400


def test_hosts_that_share_a_store_lose_nothing_and_leave_nothing() -> None:
    conflicts = runs = points = starts = repacked = 0
    for seed in range(SEEDS):
        record = play(seed)
        conflicts, runs, points = conflicts + record.conflicts, runs + record.runs, points + len(record.contents)
        starts, repacked = starts + record.starts, repacked + record.repacked
    # It has met what it is about.
    assert min(conflicts, runs, points, starts) > SEEDS
    assert repacked > SEEDS // 4


def test_a_seed_plays_the_same_again() -> None:
    assert play(3) == play(3)


def no_look_at_lists(patch: Patch) -> None:
    patch.setattr(uses, "read_condemned", lambda objects: Condemned())


def no_look_whether_it_is_there(patch: Patch) -> None:
    patch.setattr(uses, "absent", lambda objects, names, key_of: set())
    patch.setattr(committing, "exists", lambda objects, key: False)  # nor at the mark of a dead one


def no_last_look(patch: Patch) -> None:
    patch.setattr(Collector, "_still", lambda self, doomed: doomed)


def pending_does_not_count(patch: Patch) -> None:
    manifests = Condemning.manifests
    patch.setattr(
        Condemning, "manifests", lambda self: (key for key in manifests(self) if not key.endswith(PENDING_SUFFIX))
    )


def no_wait(patch: Patch) -> None:
    patch.setattr(Condemning, "wait", lambda self, seconds, why: None)


def no_void_manifest(patch: Patch) -> None:
    patch.setattr(collector, "committed_name", lambda key: f"{key.split('.')[0]}.elsewhere")


def pins_do_not_count(patch: Patch) -> None:
    look = Collector._look
    patch.setattr(Collector, "_look", lambda self: replace(look(self), pinned=frozenset()))


def no_look_after_a_claim(patch: Patch) -> None:
    def put_only(objects: ObjectStore, claim: Claim) -> Claim | None:
        try:
            objects.put(claim_key(claim.vm_id, claim.epoch), encode_claim(replace(claim, nonce=secrets.token_hex(8))))
        except ObjectExists:
            return claim
        return None

    patch.setattr(hosts, "try_claim", put_only)


def what_is_needed_now_does_not_count(patch: Patch) -> None:
    patch.setattr(Retirement, "_may_go", lambda self, needed, told: frozenset(told))


def any_document_will_do(patch: Patch) -> None:
    patch.setattr(uses, "_is_kept", lambda pack_id, offsets, standing, saved: True)


def what_was_moved_there_does_not_count(patch: Patch) -> None:
    patch.setattr(Reachability, "is_target", lambda self, pack_id: False)


def not_all_is_moved(patch: Patch) -> None:
    needed_of = Retirement._needed_of

    def but_one(self: Retirement, batch: Any) -> Any:
        return {
            pack_id: dict([*refs.items()][: max(1, len(refs) - 1)]) for pack_id, refs in needed_of(self, batch).items()
        }

    patch.setattr(Retirement, "_needed_of", but_one)


@pytest.mark.parametrize(
    "plant",
    [
        no_look_at_lists,
        no_look_whether_it_is_there,
        no_last_look,
        pending_does_not_count,
        no_wait,
        no_void_manifest,
        pins_do_not_count,
        no_look_after_a_claim,
        what_is_needed_now_does_not_count,
        any_document_will_do,
        what_was_moved_there_does_not_count,
        not_all_is_moved,
    ],
)
def test_a_planted_mistake_is_found(plant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS_FOR_A_FAULT):
        try:
            play(seed, hours=3)
        except Exception as exc:
            print(f"found by seed {seed}: {exc!r}")
            return
    pytest.fail(f"not found in {SEEDS_FOR_A_FAULT} seeds")
