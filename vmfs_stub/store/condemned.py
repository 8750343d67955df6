"""Condemned lists: packs and segments that garbage collection is about to delete, so that no backup refers to them.

Packs on a list that are *retired* are still needed by restore points, but all that they need of them was moved.  Such a
list requires a feature: a writer that does not know it refuses, rather than refer to what is about to go.

A list is a checked document under ``condemned/``, put before the collector looks for a last time whether anything needs
what is on it, and deleted when all on it is gone or was spared.  Several collectors may have lists at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import ObjectMissing
from vmfs_stub.core.ids import PackId, SegmentId
from vmfs_stub.store import documents
from vmfs_stub.store.format import CONDEMNED_VERSION, DOCUMENT_SIZE_MAX, FEATURE_RETIRED, FEATURES_KNOWN
from vmfs_stub.store.keys import CONDEMNED, is_id, is_segment_id
from vmfs_stub.store.objects import ObjectStore

CONDEMNED_FORMAT: Final = "vmfs-stub condemned"
LIST_FEATURES_KNOWN: Final = FEATURES_KNOWN | {FEATURE_RETIRED}
LIST_MAX: Final = 10_000
"""Names in one list, so that it stays a small document."""


@dataclass(frozen=True, slots=True)
class Condemned:
    """Names on a list."""

    packs: frozenset[PackId] = frozenset()
    segments: frozenset[SegmentId] = frozenset()
    retired: frozenset[PackId] = frozenset()

    def __or__(self, other: Condemned) -> Condemned:
        return Condemned(self.packs | other.packs, self.segments | other.segments, self.retired | other.retired)


def encode_condemned(condemned: Condemned, nonce: str) -> bytes:
    """The bytes of a list; ``nonce`` tells a retried put from somebody else's."""
    body: dict[str, object] = {
        "packs": sorted(condemned.packs),
        "segments": sorted(condemned.segments),
        "nonce": nonce,
    }
    if condemned.retired:
        body |= {"required": [FEATURE_RETIRED], "retired": sorted(condemned.retired)}
    return documents.encode(CONDEMNED_FORMAT, CONDEMNED_VERSION, body)


def decode_condemned(data: bytes, key: str) -> Condemned:
    """Parse the list that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, CONDEMNED_FORMAT, version=CONDEMNED_VERSION, features=LIST_FEATURES_KNOWN)
    packs, segments, retired = fields.texts("packs"), fields.texts("segments"), fields.texts("retired")
    for name, found in (("packs", packs), ("retired", retired)):
        if not all(map(is_id, found)):
            raise fields.error(name, "holds something that is not a pack id")
    if not all(map(is_segment_id, segments)):
        raise fields.error("segments", "holds something that is not a segment id")
    return Condemned(
        frozenset(map(PackId, packs)), frozenset(map(SegmentId, segments)), frozenset(map(PackId, retired))
    )


def list_keys(objects: ObjectStore) -> Iterator[str]:
    """The keys of all lists; anything else that lies there is not ours.  Raises: StoreUnavailable, StoreDenied."""
    return (info.key for info in objects.list(CONDEMNED) if is_id(info.key.removeprefix(CONDEMNED)))


def read_lists(objects: ObjectStore) -> Iterator[tuple[str, Condemned]]:
    """What is on each list, with its key.  Raises: as `read_condemned`."""
    for key in list_keys(objects):
        try:
            yield key, decode_condemned(objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
        except ObjectMissing:
            continue  # all on it is gone, or may be used again


def read_condemned(objects: ObjectStore) -> Condemned:
    """What is on any list.

    Raises: CorruptStoreObject, UnknownFormat, StoreUnavailable, StoreDenied: then nothing is known to be free.
    """
    found = Condemned()
    for _, listed in read_lists(objects):
        found |= listed
    return found
