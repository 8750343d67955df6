"""Notes of the claims that a datastore holds, so that a restart needs no store to know them.

A note is an empty file ``<datastore id>.<store id>.<vm id>.<epoch>`` in the private directory: it counts when it is
there, and has no bytes to be damaged.  One of another datastore (a copied directory) or store says nothing here.
A missing note is no harm: the store is asked then.  One too many is, so that it goes, durably, before a claim is given
up.  Blocking; the owner makes one call at a time for a VM.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from vmfs_stub.core.ids import DatastoreId, StoreId, VmId
from vmfs_stub.primary.files import FileCalls, sync_directory

_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9]{12})")


class ClaimNotes:
    """The notes of one datastore."""

    def __init__(self, files: FileCalls, directory: Path, datastore_id: DatastoreId) -> None:
        """Looks what is noted.  Raises OSError."""
        self._files = files
        self._directory = directory
        self._datastore_id = datastore_id
        self._epochs: dict[tuple[StoreId, VmId], set[int]] = {}
        """Those of which a note may be there."""
        for name in files.call("claims.list", os.listdir, directory):
            found = _NAME.fullmatch(name)
            if found is not None and found[1] == datastore_id:
                self._epochs.setdefault((StoreId(found[2]), VmId(found[3])), set()).add(int(found[4]))

    def held(self, store_id: StoreId) -> dict[VmId, int]:
        """The claims in a store that are noted: VM → epoch."""
        return {vm_id: max(epochs) for (store, vm_id), epochs in self._epochs.items() if store == store_id}

    def add(self, store_id: StoreId, vm_id: VmId, epoch: int) -> None:
        """Note, durably, that this claim is held.  Raises OSError: the note may be there then."""
        self._epochs.setdefault((store_id, vm_id), set()).add(epoch)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(self._files.call("claims.note", os.open, self._path(store_id, vm_id, epoch), flags, 0o600))
        self._files.call("claims.note_sync", sync_directory, self._directory)

    def remove(self, store_id: StoreId, vm_id: VmId) -> None:
        """Note, durably, that no claim of this VM is held.  Raises OSError: a note may be there still."""
        for epoch in sorted(self._epochs.get((store_id, vm_id), ())):
            self._files.call("claims.clear", self._path(store_id, vm_id, epoch).unlink, missing_ok=True)
        self._files.call("claims.clear_sync", sync_directory, self._directory)
        self._epochs.pop((store_id, vm_id), None)

    def _path(self, store_id: StoreId, vm_id: VmId, epoch: int) -> Path:
        return self._directory / f"{self._datastore_id}.{store_id}.{vm_id}.{epoch:012d}"
