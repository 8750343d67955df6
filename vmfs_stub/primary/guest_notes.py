"""Notes of what a job does to a guest and has to undo, so that no guest stays so because a daemon was killed.

A note is an empty file ``<datastore id>.<VM id>.<domain's UUID>.<ms since the epoch>`` in a directory for what is done
(stop, freeze): it counts when it is there, and has no bytes to be damaged.  One of another datastore (a copied
directory) says nothing.  It is durable before the guest is asked; when it may go is its owner's to say.
Blocking; the owner makes one call at a time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.ids import DatastoreId, VmId
from vmfs_stub.primary.files import FileCalls, sync_directory

_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class GuestNote:
    """A guest (``uuid``: its domain) of which it was to be asked at ``asked_ms``, milliseconds since the epoch."""

    vm_id: VmId
    uuid: str
    asked_ms: int


class GuestNotes:
    """The notes of one datastore of one thing that is done to guests."""

    def __init__(self, files: FileCalls, directory: Path, datastore_id: DatastoreId) -> None:
        """Looks what is noted.  Raises OSError."""
        self._files = files
        self._directory = directory
        self._datastore_id = datastore_id
        self._notes: set[GuestNote] = set()
        for name in files.call("guests.list", os.listdir, directory):
            found = _NAME.fullmatch(name)
            if found is not None and found[1] == datastore_id:
                self._notes.add(GuestNote(VmId(found[2]), found[3], int(found[4])))

    def all(self) -> list[GuestNote]:
        """The oldest first; in memory."""
        return sorted(self._notes, key=lambda note: (note.asked_ms, note.uuid))

    def add(self, note: GuestNote) -> None:
        """Note it durably.  Raises OSError: the note may be there then."""
        self._notes.add(note)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(self._files.call("guests.note", os.open, self._path(note), flags, 0o600))
        self._files.call("guests.note_sync", sync_directory, self._directory)

    def remove(self, note: GuestNote) -> None:
        """It is over, durably.  Raises OSError: it may be there still."""
        self._files.call("guests.clear", self._path(note).unlink, missing_ok=True)
        self._files.call("guests.clear_sync", sync_directory, self._directory)
        self._notes.discard(note)

    def _path(self, note: GuestNote) -> Path:
        return self._directory / f"{self._datastore_id}.{note.vm_id}.{note.uuid}.{note.asked_ms}"
