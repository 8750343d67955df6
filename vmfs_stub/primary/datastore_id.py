"""Which datastore this is, wherever its filesystem is mounted: an id in a small file of the private directory.

The claims of VMs name it.  A private directory that was copied with all else is another inode, and gets an id of its
own: two datastores must never pass for one.  Blocking.  Layout: docs/FORMAT.md.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from vmfs_stub.core.errors import CorruptRecord, UnknownFormat
from vmfs_stub.core.ids import DatastoreId
from vmfs_stub.core.names import DATASTORE_FILE
from vmfs_stub.primary.durable_map import NEW_SUFFIX
from vmfs_stub.primary.envelope import UINT64_MAX, Body, Damaged, NewerVersion, seal, unseal
from vmfs_stub.primary.files import FileCalls, read_fully, sync_directory, write_fully
from vmfs_stub.primary.identity import inode_generation

_MAGIC = b"VSTBDST\0"
_VERSION = 1
DATASTORE_FILE_SIZE_MAX = 4096

log = logging.getLogger(__name__)


def load_or_make_datastore_id(files: FileCalls, private_dir: Path) -> DatastoreId:
    """The id of the datastore whose private directory this is; makes one, durably, where there is none.

    Raises CorruptRecord, UnknownFormat: the claims of its VMs are not known then; OSError.
    """
    (ino, generation), found = _look(files, private_dir)
    if found is not None:
        datastore_id, known_ino, known_generation = found
        if (known_ino, known_generation) == (ino, generation):
            return datastore_id
        log.warning("%s was copied from another directory: this is a datastore of its own from now on", private_dir)
    made = DatastoreId(secrets.token_hex(16))
    _save(files, private_dir / DATASTORE_FILE, encode_datastore_id(made, ino=ino, generation=generation))
    return made


def load_datastore_id(files: FileCalls, private_dir: Path) -> DatastoreId | None:
    """The id, which is not made here; None where there is none, or only that of another directory.

    Raises as `load_or_make_datastore_id`.
    """
    identity, found = _look(files, private_dir)
    return found[0] if found is not None and found[1:] == identity else None


def _look(files: FileCalls, private_dir: Path) -> tuple[tuple[int, int], tuple[DatastoreId, int, int] | None]:
    """Inode number and generation of the directory, and what its file says."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = files.call("datastore.directory", os.open, private_dir, flags)
    try:
        identity = os.fstat(fd).st_ino, inode_generation(fd)
    finally:
        os.close(fd)
    return identity, _load(files, private_dir / DATASTORE_FILE)


def encode_datastore_id(datastore_id: DatastoreId, *, ino: int, generation: int) -> bytes:
    """The bytes of the file; inode number and generation are the private directory's."""
    return seal(_MAGIC, _VERSION, {"datastore_id": datastore_id, "ino": ino, "generation": generation})


def decode_datastore_id(raw: bytes) -> tuple[DatastoreId, int, int]:
    """Id, inode number and generation.  Raises Damaged, NewerVersion."""
    body = Body(unseal(raw, magic=_MAGIC, version=_VERSION))
    found = (
        DatastoreId(body.identifier("datastore_id")),
        body.integer("ino", high=UINT64_MAX),
        body.integer("generation", high=UINT64_MAX),
    )
    body.finish()
    return found


def _load(files: FileCalls, path: Path) -> tuple[DatastoreId, int, int] | None:
    try:
        fd = files.call("datastore.open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return decode_datastore_id(read_fully(files, "datastore.read", fd, DATASTORE_FILE_SIZE_MAX, 0))
    except Damaged as exc:
        raise CorruptRecord(
            f"{path}, which says which datastore this is, is damaged ({exc}); put it back from a copy, or delete it: "
            "then the datastore gets another id, and its archived VMs have to be taken over with `vmfs-stub adopt`"
        ) from exc
    except NewerVersion as exc:
        raise UnknownFormat(f"{path} is of {exc}") from exc
    finally:
        os.close(fd)


def _save(files: FileCalls, path: Path, data: bytes) -> None:
    new = path.with_name(path.name + NEW_SUFFIX)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = files.call("datastore.create", os.open, new, flags, 0o600)
    try:
        files.call("datastore.write", write_fully, fd, data, 0)
        files.call("datastore.sync", os.fsync, fd)
    finally:
        os.close(fd)
    files.call("datastore.create", os.rename, new, path)
    files.call("datastore.sync", sync_directory, path.parent)
