"""Which moved documents may be counted on, by whoever has a pack deleted, or needs one that is gone.

A document is of use as long as it is there, and so are the packs that it names; garbage collection deletes both when it
does not see that they are needed.  So they are asked for in this order (must = data loss otherwise):
- must: the documents, then the lists in ``condemned/``: of a document that was put too late for another collector's
  last look, that one has the packs on a list by now, or has deleted them;
- must: then whether the same documents are still there: what had to go by an earlier list may have gone with the list;
- must: last whether the packs that they name are there.
Whoever asks must be seen to need the pack by collectors that put their lists later: by a pending manifest, or as a
collector whose own last look comes before.  Blocking.  This module must not know who asks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

from vmfs_stub.core.ids import PackId
from vmfs_stub.store.condemned import Condemned, read_condemned
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.moved import Documents, offsets_of, read_documents
from vmfs_stub.store.objects import ObjectStore, absent, asked


@dataclass(frozen=True, slots=True)
class Standing:
    """``documents`` of each pack say only what can be counted on; ``condemned`` is what was on lists after that.

    ``leads_to_condemned`` are packs of which some document names a pack that is on a list.
    """

    documents: Mapping[PackId, Documents]
    condemned: Condemned
    leads_to_condemned: frozenset[PackId]

    def offsets(self, pack_id: PackId) -> set[int]:
        """Where in that pack the frames were, in bytes, that can be found elsewhere."""
        return offsets_of(self.documents[pack_id])


def standing_documents(objects: ObjectStore, packs: Collection[PackId], *, but: Set[PackId] = frozenset()) -> Standing:
    """What may be counted on about each of ``packs``; frames in one of ``but`` are not.

    Raises: CorruptStoreObject, UnknownFormat (of a list), StoreUnavailable, StoreDenied.
    """
    ordered = sorted(packs)
    found = dict(zip(ordered, asked(lambda pack_id: read_documents(objects, pack_id), ordered), strict=True))
    condemned = read_condemned(objects)
    going = condemned.packs | condemned.retired
    named = {move.pack_id for documents in found.values() for moves in documents.values() for move in moves}
    keys = [key for documents in found.values() for key in documents]
    gone_keys = absent(objects, keys, str)
    gone = absent(objects, named - going - but, pack_key)
    usable = named - going - but - gone
    return Standing(
        {
            pack_id: {
                key: kept
                for key, moves in documents.items()
                if key not in gone_keys and (kept := [move for move in moves if move.pack_id in usable])
            }
            for pack_id, documents in found.items()
        },
        condemned,
        frozenset(
            pack_id
            for pack_id, documents in found.items()
            if any(move.pack_id in going for moves in documents.values() for move in moves)
        ),
    )
