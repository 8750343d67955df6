"""Manifests: what one restore point consists of.

A manifest is a checked document, immutable, under ``manifests/<vm id>/<point id>``; while its job has not committed it
lies beside that under ``….pending``, where only garbage collection looks.  It holds everything needed to write the VM
out again: names, owners, modes, times, extended attributes, and for each file its segments in order.

Paths come from a store that others can write: each is checked to be relative, plain and below its VM, and no entry may
lie under something that is not a directory.  This module must not know how manifests are transported.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from vmfs_stub.core.chunking import chunk_count
from vmfs_stub.core.errors import ConfigError, CorruptManifest, PointNotFound
from vmfs_stub.core.ids import PointId, SegmentId, VmId
from vmfs_stub.store import documents
from vmfs_stub.store.documents import Fields
from vmfs_stub.store.format import FEATURES_KNOWN, MANIFEST_SIZE_MAX, MANIFEST_VERSION, SEGMENT_CHUNKS, check_chunk_size
from vmfs_stub.store.keys import is_segment_id

MANIFEST_FORMAT = "vmfs-stub manifest"
VOID_FORMAT = "vmfs-stub void manifest"
_VOID_START = f'{{"format":"{VOID_FORMAT}"'.encode()
PATH_LENGTH_MAX = 4095
NAME_LENGTH_MAX = 255
PATH_PARTS_MAX = 256
"""No VM is so deep; what makes and removes trees recurses."""
TIME_NS_END = 2**63 * 1_000_000_000
"""A file's time is below this and not below its negative: seconds have 64 bits, so nanoseconds need more."""


class FileKind(Enum):
    """What an entry of a manifest is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file, directory or symlink of a restore point.

    ``path`` is relative to the VM, in the file system's own bytes (surrogateescape); ``size`` in bytes; ``segments``
    in order, None for 4,096 chunks of zeros; ``target`` only for a symlink.
    """

    path: str
    kind: FileKind
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    atime_ns: int
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    segments: tuple[SegmentId | None, ...] = ()
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One restore point; ``created_s`` is Unix time, ``metadata`` free texts such as the domain's XML.

    ``top`` is the directory that holds ``files``, with its name as path; None for a VM that is one file.
    """

    vm_id: VmId
    point_id: PointId
    vm_name: str
    created_s: float
    host: str
    chunk_size: int
    files: tuple[StoredFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    top: StoredFile | None = None

    @property
    def size(self) -> int:
        """Logical bytes of all files."""
        return sum(stored.size for stored in self.files)


def segment_count(size: int, chunk_size: int) -> int:
    """Number of segments of a file of ``size`` bytes."""
    return -(-chunk_count(size, chunk_size) // SEGMENT_CHUNKS)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest."""
    top = {} if manifest.top is None else {"top": _file_body(manifest.top)}
    return documents.encode(
        MANIFEST_FORMAT,
        MANIFEST_VERSION,
        {
            **top,
            "vm_id": manifest.vm_id,
            "point_id": manifest.point_id,
            "vm_name": manifest.vm_name,
            "created_s": manifest.created_s,
            "host": manifest.host,
            "chunk_size": manifest.chunk_size,
            "metadata": dict(manifest.metadata),
            "files": [_file_body(stored) for stored in manifest.files],
        },
    )


def decode_manifest(data: bytes, key: str) -> Manifest:
    """Parse the manifest that was read from ``key``.

    Raises: PointNotFound when it is void; CorruptManifest; UnknownFormat.
    """
    if data.startswith(_VOID_START):
        documents.decode(data, key, VOID_FORMAT, version=MANIFEST_VERSION, features=FEATURES_KNOWN)
        msg = f"{key}: there is no such restore point: the backup that was to make it never ended"
        raise PointNotFound(msg)
    fields = documents.decode(data, key, MANIFEST_FORMAT, version=MANIFEST_VERSION, features=FEATURES_KNOWN)
    chunk_size = fields.integer("chunk_size")
    try:
        check_chunk_size(chunk_size)
    except ConfigError as exc:
        raise fields.error("chunk_size", f"is wrong: {exc}") from exc
    files = tuple(_decode_file(item, chunk_size) for item in fields.objects("files"))
    _check_tree(files, key)
    told = fields.object_or_none("top")
    top = None if told is None else _decode_file(told, chunk_size)
    _check_top(top, key)
    return Manifest(
        vm_id=VmId(fields.hex_id("vm_id")),
        point_id=PointId(fields.hex_id("point_id")),
        vm_name=fields.text("vm_name"),
        created_s=fields.number("created_s"),
        host=fields.text("host"),
        chunk_size=chunk_size,
        files=files,
        metadata=fields.mapping("metadata"),
        top=top,
    )


VOID_SIZE_MAX: Final = 256
"""Bytes of a void manifest, sealed or not: what is larger is none."""


def encode_void(nonce: str) -> bytes:
    """A manifest of no restore point, put in the place of one that is never to be committed."""
    return documents.encode(VOID_FORMAT, MANIFEST_VERSION, {"nonce": nonce})


def check_manifest(manifest: Manifest, key: str) -> None:
    """Refuse to write what no reader would accept.

    Raises: CorruptManifest.
    """
    _check_tree(manifest.files, key)
    _check_top(manifest.top, key)
    for stored in manifest.files:
        expected = segment_count(stored.size, manifest.chunk_size)
        if len(stored.segments) != expected:
            msg = f"{key}: {stored.path!r} has {len(stored.segments)} segments where {expected} belong"
            raise CorruptManifest(msg)


def encode_checked(manifest: Manifest, key: str) -> bytes:
    """The bytes of a manifest, which are seen to give the same manifest again.

    A placeholder's bytes can be had by its manifest only: what no reader would accept must not be depended on.
    Raises: CorruptManifest.
    """
    check_manifest(manifest, key)
    data = encode_manifest(manifest)
    if len(data) > MANIFEST_SIZE_MAX:
        msg = f"{key}: would have {len(data)} bytes, more than a manifest may: too many files, or too long attributes"
        raise CorruptManifest(msg)
    if decode_manifest(data, key) != manifest:
        msg = f"{key}: would be read as something else than what was to be written"
        raise CorruptManifest(msg)
    return data


def _file_body(stored: StoredFile) -> dict[str, object]:
    body: dict[str, object] = {
        "path": stored.path,
        "kind": stored.kind.value,
        "size": stored.size,
        "mode": stored.mode,
        "uid": stored.uid,
        "gid": stored.gid,
        "mtime_ns": stored.mtime_ns,
        "atime_ns": stored.atime_ns,
    }
    if stored.xattrs:
        body["xattrs"] = {name: base64.b64encode(value).decode("ascii") for name, value in stored.xattrs.items()}
    if stored.segments:
        body["segments"] = list(stored.segments)
    if stored.target is not None:
        body["target"] = stored.target
    return body


def _decode_file(fields: Fields, chunk_size: int) -> StoredFile:
    try:
        kind = FileKind(fields.text("kind"))
    except ValueError as exc:
        raise fields.error("kind", "is not a kind of file") from exc
    size = fields.integer("size")
    segments = tuple(_segment_id(fields, text) for text in fields.texts_or_none("segments"))
    if len(segments) != segment_count(size, chunk_size):
        raise fields.error("segments", f"does not have the number of segments of a file of {size} bytes")
    target = fields.text_or_none("target")
    if (kind is FileKind.SYMLINK) != (target is not None) or (kind is not FileKind.FILE and size):
        raise fields.error("kind", "does not fit size and target")
    if target is not None and not 0 < _os_length(target) <= PATH_LENGTH_MAX:
        raise fields.error("target", "is not a symlink's target")
    xattrs = fields.binary_mapping("xattrs")
    if not all(0 < _os_length(name) <= NAME_LENGTH_MAX for name in xattrs):
        raise fields.error("xattrs", "holds something that is not the name of an attribute")
    return StoredFile(
        path=fields.text("path"),
        kind=kind,
        size=size,
        mode=fields.integer("mode", high=0o7777),
        uid=fields.integer("uid", high=2**32 - 1),
        gid=fields.integer("gid", high=2**32 - 1),
        mtime_ns=fields.integer("mtime_ns", low=-TIME_NS_END, high=TIME_NS_END - 1),
        atime_ns=fields.integer("atime_ns", low=-TIME_NS_END, high=TIME_NS_END - 1),
        xattrs=xattrs,
        segments=segments,
        target=target,
    )


def _segment_id(fields: Fields, text: str | None) -> SegmentId | None:
    if text is None:
        return None
    if not is_segment_id(text):
        raise fields.error("segments", "holds something that is not a segment id")
    return SegmentId(text)


def _check_tree(files: tuple[StoredFile, ...], key: str) -> None:
    """Every path is plain, named once, and lies under nothing that is not a directory."""
    kinds: dict[str, FileKind] = {}
    for stored in files:
        parts = stored.path.split("/")
        if (
            len(stored.path) > PATH_LENGTH_MAX
            or len(parts) > PATH_PARTS_MAX
            or not _os_length(stored.path)
            or any(part in ("", ".", "..") or _os_length(part) > NAME_LENGTH_MAX for part in parts)
            or stored.path in kinds
        ):
            msg = f"{key}: {stored.path!r} is not a path that a VM's file can have, or is there twice"
            raise CorruptManifest(msg)
        kinds[stored.path] = stored.kind
    above = ""
    for path in sorted(kinds, key=by_folder):
        if above and path.startswith(f"{above}/"):
            msg = f"{key}: {path!r} lies under {above!r}, which is not a directory"
            raise CorruptManifest(msg)
        above = "" if kinds[path] is FileKind.DIRECTORY else path


def _check_top(top: StoredFile | None, key: str) -> None:
    """It is a directory, and its path a plain name."""
    if top is not None:
        _check_tree((top,), key)
        if top.kind is not FileKind.DIRECTORY or "/" in top.path:
            msg = f"{key}: {top.path!r} is not the name of a VM's directory"
            raise CorruptManifest(msg)


def by_folder(path: str) -> str:
    """Sort key that puts whatever lies under a path right behind it."""
    return path.replace("/", "\0")


def _os_length(name: str) -> int:
    """Length of a name in the file system's bytes; 0 for one that has no such form, or an end within."""
    try:
        return 0 if "\0" in name else len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return 0
