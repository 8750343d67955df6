"""Names of the objects on secondary storage, and which error their damage raises.

Purpose: every key is built here, and taken apart here where more is asked for than its last part.  A key never comes
from data unchecked: ids are validated before they become part of a key, so a hostile manifest cannot name an object
outside its own kind.
"""

from __future__ import annotations

import re
from typing import Final

from vmfs_stub.core.errors import (
    ConfigError,
    CorruptManifest,
    CorruptPack,
    CorruptSegment,
    CorruptStoreObject,
    IntegrityError,
)
from vmfs_stub.core.ids import PackId, PlaceholderId, PointId, SegmentId, VmId, WriterId

STORE_KEY: Final = "vmfs-store.json"
REPLICA_KEY: Final = "vmfs-replica"
PACKS: Final = "packs/"
SEGMENTS: Final = "segments/"
MANIFESTS: Final = "manifests/"
INDEX: Final = "index/"
PINS: Final = "pins/"
UNPINNED: Final = "unpinned/"
FORGOTTEN: Final = "forgotten/"
CLAIMS: Final = "claims/"
CONDEMNED: Final = "condemned/"
LEASES: Final = "leases/"
DEAD: Final = "dead/"
QUARANTINED: Final = "quarantined/"
MOVED: Final = "moved/"
PROBES: Final = "doctor-probe/"
KEYS: Final = "keys/"
VERSIONS: Final = "versions/"
PENDING_SUFFIX: Final = ".pending"

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,199}){0,7}\Z")
_PREFIX = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,199}/){0,7}\Z")
_ID = re.compile(r"[0-9a-f]{32}\Z")
_SEGMENT_ID = re.compile(r"[0-9a-f]{80}\Z")
_EPOCH = re.compile(r"[0-9]{12}\Z")
_WRITER_ID = re.compile(r"[0-9a-f]{16}\Z")
_HASH_DIGITS: Final = 64


def check_key(key: str) -> str:
    """Return ``key`` when it is a relative path of plain names (no traversal, at most 8 deep).

    Raises: ConfigError.
    """
    if not _KEY.match(key):
        msg = f"{key!r} is not a valid object name"
        raise ConfigError(msg)
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` when it is empty or a folder name that ends with ``/``.

    Raises: ConfigError.
    """
    if not _PREFIX.match(prefix):
        msg = f"{prefix!r} is not a valid folder of objects"
        raise ConfigError(msg)
    return prefix


def is_id(text: str) -> bool:
    """Whether ``text`` is 32 lower-case hex digits."""
    return _ID.match(text) is not None


def is_segment_id(text: str) -> bool:
    """Whether ``text`` is 80 lower-case hex digits."""
    return _SEGMENT_ID.match(text) is not None


def is_writer_id(text: str) -> bool:
    """Whether ``text`` is 16 lower-case hex digits."""
    return _WRITER_ID.match(text) is not None


def writer_of(name: PackId | SegmentId) -> WriterId:
    """Who wrote a pack or a segment."""
    return WriterId(name[-16:])


def segment_id_of(digest: str, writer_id: WriterId) -> SegmentId:
    """The id of a segment whose bytes have this hash (64 hex digits)."""
    return SegmentId(digest + writer_id)


def segment_digest(segment_id: SegmentId) -> str:
    """The hash that a segment's bytes must have."""
    return segment_id[:_HASH_DIGITS]


def pack_key(pack_id: PackId) -> str:
    """Name of a pack; spread over 256 folders so that none of them grows very large."""
    return f"{PACKS}{pack_id[:2]}/{pack_id}"


def key_key(key_id: str) -> str:
    """Name of a wrapped copy of the store's key."""
    return f"{KEYS}{_checked(key_id)}"


def version_key(version: int) -> str:
    """Name of the mark that the store was raised to a version."""
    return f"{VERSIONS}{version}"


def segment_key(segment_id: SegmentId) -> str:
    """Name of a segment."""
    return f"{SEGMENTS}{segment_id[:2]}/{segment_id}"


def manifests_of(vm_id: VmId) -> str:
    """Folder of a VM's manifests."""
    return f"{MANIFESTS}{_checked(vm_id)}/"


def manifest_key(vm_id: VmId, point_id: PointId) -> str:
    """Name of a committed manifest."""
    return f"{manifests_of(vm_id)}{_checked(point_id)}"


def pending_key(vm_id: VmId, point_id: PointId, writer_id: WriterId) -> str:
    """Name of a manifest that its writer has not committed yet."""
    return f"{manifest_key(vm_id, point_id)}.{writer_id}{PENDING_SUFFIX}"


def committed_name(key: str) -> str:
    """The name that a manifest has, or will have when ``key`` is that of a pending one."""
    return key.partition(".")[0] if key.endswith(PENDING_SUFFIX) else key


def pending_writer(key: str) -> WriterId:
    """Who has put the pending manifest of that name."""
    return WriterId(key.removesuffix(PENDING_SUFFIX).rpartition(".")[2])


def is_manifest(key: str) -> bool:
    """Whether a key among them is that of a manifest, committed or pending; anything else is not ours."""
    _, vm_id, name = (*key.split("/"), "", "")[:3]
    point_id, _, rest = name.partition(".")
    is_ours = not rest or (rest.endswith(PENDING_SUFFIX) and is_writer_id(rest.removesuffix(PENDING_SUFFIX)))
    return key.count("/") == 2 and is_id(vm_id) and is_id(point_id) and is_ours and name.count(".") in (0, 2)


def point_of(key: str) -> tuple[VmId, PointId]:
    """The restore point that the name of a manifest, pin or mark begins with, which was not checked."""
    _, vm_id, point_id = (*key.split("/"), "", "")[:3]
    return VmId(vm_id), PointId(point_id.partition(".")[0])


def lease_key(writer_id: WriterId) -> str:
    """Name of a writer's lease."""
    return f"{LEASES}{writer_id}"


def dead_key(writer_id: WriterId) -> str:
    """Name of the mark that a writer was taken for dead, and commits nothing any more."""
    return f"{DEAD}{writer_id}"


def pins_of(vm_id: VmId, point_id: PointId) -> str:
    """Folder of a restore point's pins."""
    return f"{PINS}{_checked(vm_id)}/{_checked(point_id)}/"


def pin_key(vm_id: VmId, point_id: PointId, placeholder_id: PlaceholderId) -> str:
    """Name of a pin."""
    return f"{pins_of(vm_id, point_id)}{_checked(placeholder_id)}"


def unpinned_key(vm_id: VmId, point_id: PointId, placeholder_id: PlaceholderId) -> str:
    """Name of the mark that makes a pin void."""
    return UNPINNED + pin_key(vm_id, point_id, placeholder_id).removeprefix(PINS)


def forgotten_of(vm_id: VmId) -> str:
    """Folder of the marks of a VM's forgotten restore points."""
    return f"{FORGOTTEN}{_checked(vm_id)}/"


def forgotten_key(vm_id: VmId, point_id: PointId) -> str:
    """Name of the mark of a forgotten restore point."""
    return f"{forgotten_of(vm_id)}{_checked(point_id)}"


def claims_of(vm_id: VmId) -> str:
    """Folder of a VM's claims."""
    return f"{CLAIMS}{_checked(vm_id)}/"


def claim_key(vm_id: VmId, epoch: int) -> str:
    """Name of one of them; names sort as epochs do."""
    return f"{claims_of(vm_id)}{epoch:012d}"


def claim_named(key: str) -> tuple[VmId, int] | None:
    """VM and epoch of the claim that a key among them names; None for what is not ours."""
    vm_id, _, epoch = key.removeprefix(CLAIMS).partition("/")
    return (VmId(vm_id), int(epoch)) if is_id(vm_id) and _EPOCH.match(epoch) else None


def quarantine_key(pack_id: PackId) -> str:
    """Name of the mark of a damaged pack."""
    return f"{QUARANTINED}{pack_id}"


def moved_of(pack_id: PackId) -> str:
    """Folder of the documents that say where frames of a pack are now that have moved."""
    return f"{MOVED}{_checked(pack_id)}/"


def moved_key(pack_id: PackId, nonce: str) -> str:
    """Name of one of them."""
    return f"{moved_of(pack_id)}{_checked(nonce)}"


def noted_pack(key: str) -> PackId:
    """The pack that a mark of quarantine, or a moved document, is about by its name, which was not checked."""
    return PackId(key.split("/")[1])


def damage(key: str) -> type[IntegrityError]:
    """The error that says: the object ``key`` is not what was written."""
    if key.startswith(PACKS):
        return CorruptPack
    if key.startswith(SEGMENTS):
        return CorruptSegment
    if key.startswith(MANIFESTS):
        return CorruptManifest
    return CorruptStoreObject


def _checked(an_id: str) -> str:
    if not is_id(an_id):
        msg = f"{an_id!r} is not an id (32 hex digits)"
        raise ConfigError(msg)
    return an_id
