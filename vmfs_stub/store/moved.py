"""Moved frames: where frames of a pack that is damaged, or was repacked, can be read instead.

A pack never changes, and neither do the segments that refer to it.  So a frame that is repaired, or saved from a pack
that is mostly garbage, is written into another pack, and a checked document under ``moved/<pack id>/<id>`` says so.
A pack may have several: each repair and each repacking adds one.
Readers look for them only when a frame cannot be read where it should be, and believe nothing they say: what is found
there must be what the segment's reference expects.  Garbage collection keeps what they name as long as the pack they
are about is needed, there or not.  This module must not know why a frame was moved.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptFrame, CorruptPack, CorruptStoreObject, ObjectMissing, UnknownFormat
from vmfs_stub.core.ids import PackId
from vmfs_stub.store import documents
from vmfs_stub.store.format import (
    DOCUMENT_SIZE_MAX,
    FEATURES_KNOWN,
    FRAME_LENGTH_MAX,
    MOVED_VERSION,
    PACK_FRAMES_MAX,
    PACK_SIZE_MAX,
)
from vmfs_stub.store.keys import moved_key, moved_of, pack_key
from vmfs_stub.store.objects import CacheDropping, ObjectStore, drop_cache, exists

log = logging.getLogger(__name__)

MOVED_FORMAT: Final = "vmfs-stub moved"
HOPS_MAX: Final = 3
"""How often a frame may have moved: a bound for a reader, whatever documents say of each other."""
PLACES_MAX: Final = 16
"""Places of one frame that a reader tries, for the same reason; a pack that is not there is none."""
DOCUMENTS_MAX: Final = 64
"""Documents about one pack that a reader looks at."""
KNOWN_S: Final = 10.0
"""How long a look for documents counts, found or not: the frames of a pack are asked for one after another."""
KNOWN_MAX: Final = 64
UNREADABLE: Final = (ObjectMissing, CorruptPack, CorruptFrame)
"""What is wrong with a frame that may be found elsewhere."""


@dataclass(frozen=True, slots=True, order=True)
class Move:
    """The frame at ``old_offset`` of the pack that a document is about is at ``offset`` of ``pack_id`` now (bytes)."""

    old_offset: int
    pack_id: PackId
    offset: int
    length: int

    def applied_to(self, ref: FrameRef) -> FrameRef:
        """The reference to that frame as it is where it has moved."""
        return ref._replace(pack_id=self.pack_id, offset=self.offset, length=self.length)


Documents: TypeAlias = dict[str, list[Move]]
"""What documents about one pack say, by their keys."""


def offsets_of(documents: Documents) -> set[int]:
    """Where in the pack the frames were, in bytes, that these documents are about."""
    return {move.old_offset for moves in documents.values() for move in moves}


def encode_moved(moves: Sequence[Move], pack_id: PackId, nonce: str) -> bytes:
    """The bytes of a document; ``nonce`` tells a retried put from somebody else's."""
    frames = [{"at": m.old_offset, "pack": m.pack_id, "offset": m.offset, "length": m.length} for m in moves]
    return documents.encode(MOVED_FORMAT, MOVED_VERSION, {"pack_id": pack_id, "frames": frames, "nonce": nonce})


def new_moved(moves: Sequence[Move], pack_id: PackId) -> tuple[str, bytes]:
    """A document and its name, which no other one has, nor had."""
    nonce = secrets.token_hex(16)
    return moved_key(pack_id, nonce), encode_moved(moves, pack_id, nonce)


def decode_moved(data: bytes, key: str) -> list[Move]:
    """Parse the document that was read from ``key``.

    Raises: CorruptStoreObject; UnknownFormat.
    """
    fields = documents.decode(data, key, MOVED_FORMAT, version=MOVED_VERSION, features=FEATURES_KNOWN)
    if not key.startswith(moved_of(PackId(fields.hex_id("pack_id")))):
        raise fields.error("pack_id", "is that of another pack")
    moves = [
        Move(
            frame.integer("at", high=PACK_SIZE_MAX),
            PackId(frame.hex_id("pack")),
            frame.integer("offset", high=PACK_SIZE_MAX),
            frame.integer("length", low=1, high=FRAME_LENGTH_MAX),
        )
        for frame in fields.objects("frames")
    ]
    if len(moves) > PACK_FRAMES_MAX:
        raise fields.error("frames", "holds more than a pack may")
    return moves


class MovedFrames:
    """Finds frames that cannot be read where their references say; thread-safe.

    ``read`` fetches frames from the place that their references name, and from there only.
    """

    def __init__(
        self,
        objects: ObjectStore,
        read: Callable[[Sequence[FrameRef]], list[bytes]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._read = read
        self._clock = clock
        self._known: OrderedDict[PackId, tuple[float, Mapping[int, list[Move]]]] = OrderedDict()
        self._lock = threading.Lock()

    def has_moves(self, pack_id: PackId) -> bool:
        """Whether frames of this pack have moved.  Raises: StoreUnavailable, StoreDenied."""
        return bool(self._moves(pack_id))

    def look_again(self) -> None:
        """What was found so far does not count any more."""
        with self._lock:
            self._known.clear()

    def place(self, ref: FrameRef) -> FrameRef | None:
        """Where a document says that a frame is now; there may be others.  Raises: StoreUnavailable, StoreDenied."""
        moves = self._moves(ref.pack_id).get(ref.offset)
        return moves[0].applied_to(ref) if moves else None

    def fetch(self, ref: FrameRef, *, hops: int = HOPS_MAX) -> bytes | None:
        """The verified raw bytes of a frame from where it is now; None when it can be read nowhere.

        Raises: StoreUnavailable, StoreDenied.
        """
        tried = 0
        for move in self._moves(ref.pack_id).get(ref.offset, ()) if hops else ():
            if tried == PLACES_MAX:
                break
            moved = move.applied_to(ref)
            try:
                return self._read([moved])[0]
            except UNREADABLE as exc:
                raw = self.fetch(moved, hops=hops - 1)
                if raw is not None:
                    return raw
                # Packs of jobs that were taken for dead are gone, and many of them hide no other one.
                tried += not isinstance(exc, ObjectMissing)
        return None

    def _moves(self, pack_id: PackId) -> Mapping[int, list[Move]]:
        now = self._clock()
        with self._lock:
            looked_s, known = self._known.get(pack_id, (now - KNOWN_S, {}))
        if now < looked_s + KNOWN_S:
            return known
        found: dict[int, list[Move]] = {}
        for move in read_moves(self._objects, pack_id):
            found.setdefault(move.old_offset, []).append(move)
        with self._lock:
            self._known[pack_id] = (now, found)
            self._known.move_to_end(pack_id)
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        return found


def read_moves(objects: ObjectStore, pack_id: PackId) -> list[Move]:
    """What all readable documents about a pack say.  Raises: StoreUnavailable, StoreDenied."""
    return [move for moves in read_documents(objects, pack_id).values() for move in moves]


def read_documents(objects: ObjectStore, pack_id: PackId) -> Documents:
    """The readable documents about a pack.  Raises: StoreUnavailable, StoreDenied."""
    found: Documents = {}
    for info in islice(objects.list(moved_of(pack_id)), DOCUMENTS_MAX):
        try:
            found[info.key] = decode_moved(objects.get(info.key, size_max=DOCUMENT_SIZE_MAX), info.key)
        except ObjectMissing:
            continue  # deleted since the listing
        except (CorruptStoreObject, UnknownFormat) as exc:
            log.warning("where frames of pack %s were moved cannot be told: %s", pack_id, exc)
    return found


def drop_caches(objects: ObjectStore, pack_id: PackId) -> None:
    """Make the next reads of a pack's frames come from the medium, where they have moved, too.

    Raises: StoreUnavailable, StoreDenied.
    """
    drop_cache(objects, pack_key(pack_id))
    if isinstance(objects, CacheDropping) and not exists(objects, pack_key(pack_id)):
        for new_id in {move.pack_id for move in read_moves(objects, pack_id)}:
            drop_cache(objects, pack_key(new_id))
