"""Makes restore points for tests, in the way that a backup job does."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.key_sources import KeyKind, KeySource
from vmfs_stub.store.keys import manifest_key
from vmfs_stub.store.manifest import FileKind, Manifest, StoredFile, encode_manifest
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.store import Store

KEY_SOURCE = KeySource(KeyKind.KEY_FILE, "key file test", secrets.token_bytes(32))
"""Opens the encrypted stores of tests."""


def new_id() -> str:
    return secrets.token_hex(16)


def write_chunks(writer: BackupWriter, data: bytes, *, batch_chunks: int = 8) -> list[FrameRef | None]:
    """Encode, append and put ``data``; leaves the last pack open."""
    entries: list[FrameRef | None] = []
    step = batch_chunks * writer.chunk_size
    for start in range(0, len(data), step):
        done = writer.append(writer.encode(data[start : start + step]))
        entries.extend(done.entries)
        for pack in done.sealed:
            writer.put_pack(pack)
    return entries


def finish(writer: BackupWriter) -> None:
    last = writer.finish()
    if last is not None:
        writer.put_pack(last)


def stored_file(path: str, size: int, segments: Sequence[object] = (), **changes: object) -> StoredFile:
    fields: dict[str, object] = {
        "path": path,
        "kind": FileKind.FILE,
        "size": size,
        "mode": 0o640,
        "uid": 0,
        "gid": 0,
        "mtime_ns": 1_700_000_000_123_456_789,
        "atime_ns": 1_600_000_000_987_654_321,
        "segments": tuple(segments),
    }
    return StoredFile(**{**fields, **changes})  # type: ignore[arg-type]


def put_point(
    store: Store,
    *,
    vm_id: str,
    point_id: str | None = None,
    name: str = "web1",
    created_s: float,
    host: str = "host1",
    datastore: str = "vms",
) -> PointId:
    """A committed restore point without files, made at any time and anywhere."""
    made = PointId(point_id or new_id())
    metadata = {"datastore": datastore} if datastore else {}
    manifest = Manifest(VmId(vm_id), made, name, created_s, host, store.chunk_size, (), metadata)
    store.objects.put(manifest_key(VmId(vm_id), made), encode_manifest(manifest))
    return made


def back_up(
    store: Store,
    contents: Mapping[str, bytes],
    *,
    vm_name: str = "web1",
    vm_id: str | None = None,
    index: ChunkIndex | None = None,
    extra: Sequence[StoredFile] = (),
    pins: Sequence[Pin] = (),
) -> Manifest:
    """One committed restore point of the given files."""
    writer = store.begin_backup(index=index or ChunkIndex(None, store.id))
    tables = {path: write_chunks(writer, data) for path, data in contents.items()}
    finish(writer)
    files = [stored_file(path, len(contents[path]), writer.add_file(entries)) for path, entries in tables.items()]
    return writer.commit(
        vm_id=VmId(vm_id or new_id()),
        point_id=PointId(new_id()),
        vm_name=vm_name,
        host="host1",
        files=[*files, *extra],
        metadata={"domain": "<domain/>"},
        pins=pins,
    )
