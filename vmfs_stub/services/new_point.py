"""The restore point that a backup of one VM makes: its files, and what it says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.backup_report import ArchiveSettings, BackupReport
from vmfs_stub.services.mover import PointFile, PointOrder
from vmfs_stub.services.stored_files import OtherEntries, stored_file
from vmfs_stub.store.manifest import StoredFile
from vmfs_stub.store.pins import Pin


class CopiedFile(Protocol):
    """A file that was copied, and what it looked like; ``names`` are relative to the VM."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def st(self) -> os.stat_result: ...

    @property
    def mtime_ns(self) -> int: ...

    @property
    def xattrs(self) -> Mapping[str, bytes]: ...


def point_files(others: OtherEntries, copied: Sequence[CopiedFile]) -> list[PointFile]:
    """All files of the point, those that were copied last: the first names of all of them, then further ones.

    So the number of a file among the regular ones is that of its copy; other names of it are files of their own.
    """
    regular = [
        PointFile(stored_file(each.names[position], each.st, mtime_ns=each.mtime_ns, xattrs=each.xattrs), copy)
        for position in range(max((len(each.names) for each in copied), default=0))
        for copy, each in enumerate(copied)
        if position < len(each.names)
    ]
    return [*map(PointFile, others.stored), *regular]


def point_order(
    vm: Vm,
    report: BackupReport,
    settings: ArchiveSettings,
    *,
    metadata: Mapping[str, str],
    top: StoredFile | None,
    pins: Sequence[Pin] = (),
) -> PointOrder:
    """What the point says of itself; ``metadata`` is what belongs to the VM beside its files."""
    return PointOrder(
        vm_id=vm.id,
        point_id=report.point_id,
        vm_name=vm.name,
        host=settings.host,
        metadata={
            **metadata,
            "inventory": "directory",
            "path": vm.entry,
            "datastore": settings.datastore,
            "consistency": report.consistency,
        },
        pins=pins,
        top=top,
    )
