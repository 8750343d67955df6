"""What garbage collection does around each deletion: names on lists, a wait, last looks, and the index.

Must (or needed data is lost): what is to be deleted is on a list before manifests are listed for the last time, with
twice the lag between the two; they are listed twice, the lag apart, and both count.  A list goes last, when all on it
is gone or was spared.  Blocking.  This module must not know what is deleted, nor why.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Final

from blake3 import blake3

from vmfs_stub.core.batches import batched
from vmfs_stub.core.errors import CorruptStoreObject, ObjectExists, ObjectMissing, StoreError, UnknownFormat
from vmfs_stub.core.ids import PackId, SegmentId
from vmfs_stub.store.condemned import LIST_MAX, Condemned, encode_condemned
from vmfs_stub.store.format import INDEX_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keys import CONDEMNED, INDEX, MANIFESTS, is_manifest, pack_key
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.reachability import Reachability

WORKERS: Final = 16


class Condemning:
    """Does that for one run; ``sleep`` gets seconds, ``say`` what to tell whoever waits."""

    def __init__(
        self,
        objects: ObjectStore,
        reachability: Reachability,
        *,
        lag_s: float,
        sleep: Callable[[float], None],
        say: Callable[[str], None],
        workers: int = WORKERS,
    ) -> None:
        self.objects = objects
        self.reachability = reachability
        self.say = say
        self._lag_s = lag_s
        self._sleep = sleep
        self._workers = workers

    def manifests(self) -> Iterator[str]:
        """The keys of all manifests, committed and pending."""
        return (info.key for info in self.objects.list(MANIFESTS) if is_manifest(info.key))

    def condemn(self, names: Condemned, keys: Set[str]) -> tuple[list[str], set[str]]:
        """Put lists of these names, and look at all manifests once more; returns the lists, and the manifests.

        Without names nothing is put or waited for, and ``keys``, of an earlier look, are what is returned.  When
        anything fails no list stays.
        Raises: as `Reachability.look`; StoreUnavailable, StoreDenied, StoreFull.
        """
        lists: list[str] = []
        try:
            for part in _parts(names):
                nonce = secrets.token_hex(16)
                lists.append(f"{CONDEMNED}{nonce}")
                self.objects.put(lists[-1], encode_condemned(part, nonce))
            return lists, self._look_again() if lists else set(keys)
        except BaseException:
            with suppress(StoreError):  # nothing will be deleted, so backups may need all of it
                self.delete(lists)
            raise

    def delete(self, keys: list[str]) -> None:
        """Delete objects, several at a time."""
        if self._workers == 1:
            for key in keys:
                self.objects.delete(key)
            return
        with ThreadPoolExecutor(self._workers) as executor:
            for _ in executor.map(self.objects.delete, keys):
                pass

    def clear_index(self, deleted: Set[PackId]) -> set[str]:
        """Index objects that name packs that are gone are written again without these, or hosts would go on using them.

        Packs that an earlier collector has deleted count, too: it may have died before it came to this.  Returns the
        keys of the index objects that were left as they are.
        """
        keys = {info.key for info in self.objects.list(INDEX)}
        for key, packs in self.reachability.packs_of_index(keys):
            gone = {pack_id for pack_id in packs if pack_id in deleted or self._is_missing(pack_id)}
            if gone:
                self._write_index_without(key, gone)
                keys.remove(key)
        return keys

    def is_gone(self, pack_id: PackId) -> bool:
        """Whether a pack is not there, and nothing needs it."""
        return not self.reachability.has_pack(pack_id) and not exists(self.objects, pack_key(pack_id))

    def wait(self, seconds: float, why: str) -> None:
        """Let so much time pass."""
        if seconds >= 1:
            self.say(f"waiting {seconds:.0f} s {why}")
        if seconds:
            self._sleep(seconds)

    def _look_again(self) -> set[str]:
        self.wait(2 * self._lag_s, "for backups that are about to finish")
        keys = set(self.manifests())
        # What is committed between two pages of a listing, or within the lag, is in neither of its places.
        self.wait(self._lag_s, "for what they commit now")
        keys |= set(self.manifests())
        self.reachability.look(keys)
        return keys

    def _is_missing(self, pack_id: PackId) -> bool:
        """Whether a pack is gone, and is to be: nothing needs it, or it was retired."""
        is_retired = self.reachability.is_moved(pack_id) and not exists(self.objects, pack_key(pack_id))
        return is_retired or self.is_gone(pack_id)

    def _write_index_without(self, key: str, gone: set[PackId]) -> None:
        try:
            packs = decode_index(self.objects.get(key, size_max=INDEX_SIZE_MAX), key)
        except (ObjectMissing, CorruptStoreObject, UnknownFormat):
            return  # another collector was quicker, or it is of no use, and no harm
        left = [(pack_id, refs) for pack_id, refs in packs if pack_id not in gone]
        if left:
            with suppress(ObjectExists):  # another collector does the same just now
                self.objects.put(_index_key([pack_id for pack_id, _ in left]), encode_index(left))
        self.objects.delete(key)


def _parts(names: Condemned) -> Iterator[Condemned]:
    """These names, as many as one list may hold at a time."""
    kinds = chain(
        (("pack", name) for name in sorted(names.packs)),
        (("segment", name) for name in sorted(names.segments)),
        (("retired", name) for name in sorted(names.retired)),
    )
    for part in batched(kinds, LIST_MAX):
        yield Condemned(
            frozenset(PackId(name) for kind, name in part if kind == "pack"),
            frozenset(SegmentId(name) for kind, name in part if kind == "segment"),
            frozenset(PackId(name) for kind, name in part if kind == "retired"),
        )


def _index_key(packs: Sequence[PackId]) -> str:
    """The same for all collectors that write the same, or the objects would be more each time that two do."""
    return INDEX + blake3("".join(packs).encode()).hexdigest(length=16)
