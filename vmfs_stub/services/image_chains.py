"""Finds out which image is based on which: from domains, and from the heads of images.

A head is read without waking anybody: nothing is recalled, and no job gives up (`Disks.head`).  That of a placeholder
is resident as a rule; where it is not, the restore point has it.  What was read is kept for as long as the file's inode
does not change.  What cannot be read is a problem of that image, never an error of the whole.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import PrimaryIOError, VmfsStubError
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.domain import Domain, DomainDisk
from vmfs_stub.inventory.identity import read_vm_id
from vmfs_stub.inventory.image_header import HEAD_BYTES, RAW, ImageHeader, is_asked, local_names, read_header
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

SETTLED_NS: Final = 2_000_000_000
"""A file that changed so lately may change again without its times telling: what was read of it is not kept."""
NVRAM_TARGET: Final = "nvram"
"""As what the NVRAM of a domain counts among its disks."""
_IMAGE_BYTES_MIN = 512
"""Of a qcow2 image: its first cluster."""


@dataclass(frozen=True, slots=True)
class BaseOf:
    """What one image of a VM is based on, as it was when its VM was backed up.

    ``disk`` is relative to the VM; ``named`` is the base as the image or a domain names it, ``place`` where that leads:
    below the backing directory, or an absolute path outside.  The rest says which base it was, as far as it is in this
    datastore: whose it is, its size in bytes and time of change, and the restore point it is a placeholder of.
    """

    disk: str
    named: str
    place: str
    vm_id: VmId | None = None
    size: int | None = None
    mtime_ns: int | None = None
    point_id: PointId | None = None


@dataclass(slots=True)
class _Known:
    """The header of a file whose inode had these times and size."""

    ctime_ns: int
    size: int
    header: ImageHeader


class ImageChains:
    """The chains of one datastore's images; ``reading`` is the store, or the store with its replica."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        disks: Disks,
        reading: Store,
        backing: Path,
        paths: DatastorePaths,
    ) -> None:
        self._files = files
        self._threads = threads
        self._disks = disks
        self._reading = reading
        self._backing = backing
        self._paths = paths
        self._headers: dict[int, _Known] = {}

    async def look(self, vms: Sequence[Vm], domains: Sequence[Domain]) -> Chains:
        """The chains of all images of a datastore, of which these are all VMs, and all domains of this host.

        Paths are followed anew, also for whoever asks next.  Raises PrimaryIOError when it cannot be told where the
        disks of a domain are.
        """
        files = [file for vm in vms for file in vm.files]
        places = {file.ino: file.path for file in reversed(files)}
        first_names = {file.path: places[file.ino] for file in files}
        uses: dict[str, list[DiskUse]] = {}
        for place, each in (await self._threads.files(self._uses_anew, domains)).items():
            uses.setdefault(first_names.get(place, place), []).extend(each)
        named, problems = await self._named([file for file in files if places[file.ino] == file.path], uses)
        bases: dict[str, set[str]] = {}
        for overlay, base in [*await self._threads.files(self._told, uses), *await self._located(named, problems)]:
            bases.setdefault(first_names.get(overlay, overlay), set()).add(first_names.get(base, base))
        for ino in self._headers.keys() - places.keys():
            del self._headers[ino]
        resident = {place for ino, place in places.items() if self._disks.placeholders.get(ino) is None}
        open_ = {places[disk.ino] for disk in self._disks.open_disks() if disk.ino in places}
        return Chains(bases, uses, resident, open_, problems, places)

    def place_of(self, path: Path) -> str | None:
        """The place of a path that a domain names; None when it cannot be told.  Blocking."""
        return self._place(str(path))

    def is_outside(self, path: Path) -> bool:
        """Whether a path that a domain names leads out of this datastore for certain.  Blocking."""
        place = self._place(str(path))
        return place is not None and place.startswith("/")

    async def bases_of(self, vm: Vm, domains: Sequence[Domain]) -> list[BaseOf]:
        """What the images of one VM are based on directly, but for bases that cannot be told.  Raises as `look`."""
        uses = await self._threads.files(self._uses, domains)
        named, _ = await self._named(vm.files, uses)
        return await self._threads.files(self._identified, vm, named, uses)

    # What domains say

    def _uses_anew(self, domains: Sequence[Domain]) -> dict[str, list[DiskUse]]:
        self._paths.forget()
        return self._uses(domains)

    def _uses(self, domains: Sequence[Domain]) -> dict[str, list[DiskUse]]:
        """By place, whose disk an image is."""
        uses: dict[str, list[DiskUse]] = {}
        for domain in domains:
            for disk in (*domain.disks, *_nvram_of(domain)):
                if disk.path is not None:
                    uses.setdefault(self._place_of_disk(disk.path), []).append(DiskUse(domain, disk))
        return uses

    def _told(self, uses: Mapping[str, Sequence[DiskUse]]) -> list[tuple[str, str]]:
        """Overlays and their bases as domains name them."""
        found = []
        for place, each in uses.items():
            for use in each:
                overlay = place
                for path in use.disk.backing:
                    base = self._place_of_disk(path)
                    found.append((overlay, base))
                    overlay = base
        return found

    def _place_of_disk(self, path: Path) -> str:
        """Raises PrimaryIOError."""
        try:
            return self._paths.locate(str(path))
        except (OSError, ValueError) as exc:
            raise PrimaryIOError(
                f"where the disk {printable(str(path))} of a domain lies cannot be told: {exc}"
            ) from exc

    def _place(self, path: str) -> str | None:
        try:
            return self._paths.locate(path)
        except (OSError, ValueError) as exc:
            log.warning("%s: where it leads cannot be told: %s", printable(path), exc)
            return None

    # What heads say

    async def _named(
        self, files: Sequence[VmFile], uses: Mapping[str, Sequence[DiskUse]]
    ) -> tuple[list[tuple[VmFile, str, list[str]]], dict[str, str]]:
        """For each base that an image names: the image, the name, and the absolute paths that it may stand for.

        And by place, what is wrong with images.
        """
        found: list[tuple[VmFile, str, list[str]]] = []
        problems: dict[str, str] = {}
        asked = [file for file in files if self._is_asked(file, uses.get(file.path, ()))]
        headers = await self._threads.files(self._known_headers, asked)
        for file in asked:
            of = uses.get(file.path, ())
            try:
                header = headers.get(file.path) or await self._header(file)
                names = [name for name in (header.base, header.data_file) if name]
                found += [(file, name, self._paths_of(file, name, of)) for name in names]
            except (VmfsStubError, OSError, ValueError) as exc:
                problems[file.path] = f"what it is based on cannot be told: {exc}"
                continue
            if header.problem:
                problems[file.path] = f"what it is based on cannot be told: {header.problem}"
            elif header.data_file is not None:
                problems[file.path] = "its data is in another file, which would have to be archived with it"
        return found, problems

    def _is_asked(self, file: VmFile, uses: Sequence[DiskUse]) -> bool:
        return file.size >= _IMAGE_BYTES_MIN and is_asked(file.path, {use.disk.format for use in uses})

    def _known_headers(self, files: Sequence[VmFile]) -> dict[str, ImageHeader]:
        """By path those that were read before, of files that have not changed since: most, and in one go."""
        found = {}
        for file in files:
            if file.ino in self._headers:
                with suppress(OSError):
                    path_fd = self._open(file.path)
                    try:
                        known = self._known_header(os.fstat(path_fd))
                    finally:
                        os.close(path_fd)
                    found.update({} if known is None else {file.path: known})
        return found

    def _known_header(self, st: os.stat_result) -> ImageHeader | None:
        known = self._headers.get(st.st_ino)
        return (
            known.header if known is not None and (known.ctime_ns, known.size) == (st.st_ctime_ns, st.st_size) else None
        )

    def _paths_of(self, file: VmFile, name: str, uses: Iterable[DiskUse]) -> list[str]:
        """The absolute paths that the name of a base may stand for.

        A hypervisor takes it to be relative to the directory by which it knows the overlay, perhaps that of a link.
        Raises ValueError.
        """
        known = [str(self._backing / file.path), *(str(use.disk.path) for use in uses)]
        directories = list(dict.fromkeys(path.rpartition("/")[0] for path in known))
        return [
            path
            for local in local_names(name)
            for path in ([local] if local.startswith("/") else [f"{each}/{local}" for each in directories])
        ]

    async def _header(self, file: VmFile) -> ImageHeader:
        """Raises VmfsStubError, OSError."""
        path_fd = await self._threads.files(self._open, file.path)
        try:
            st = os.fstat(path_fd)
            head = await self._disks.head(path_fd, HEAD_BYTES)
        finally:
            os.close(path_fd)
        header = RAW if head == b"" else read_header(await self._stored_head(st.st_ino) if head is None else head)
        if time.time_ns() - st.st_ctime_ns > SETTLED_NS:
            self._headers[st.st_ino] = _Known(st.st_ctime_ns, st.st_size, header)
        else:
            self._headers.pop(st.st_ino, None)
        return header

    async def _stored_head(self, ino: int) -> bytes:
        """The head of a placeholder of which not even the first block is here; nothing is kept of it on primary.

        Raises StoreError, IntegrityError, NotFound.
        """
        known = self._disks.placeholders.get(ino)
        if known is None or known.record is None:
            raise known.problem if known is not None and known.problem is not None else OSError("it has just changed")
        record = known.record
        point = await self._threads.background(self._reading.open_point, record.vm_id, record.point_id)
        (ref,) = await self._threads.background(point.chunks(record.file_index).locate, 0, 1)
        if ref is None:
            return bytes(HEAD_BYTES)
        (chunk,) = await self._threads.background(self._reading.fetch, [ref])
        return chunk[:HEAD_BYTES]

    def _open(self, path: str) -> int:
        backing = self._files.call("chain.backing", os.open, self._backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return self._files.call("chain.look", open_beneath, backing, path)
        finally:
            os.close(backing)

    # Where they lead

    async def _located(
        self, named: Sequence[tuple[VmFile, str, list[str]]], problems: dict[str, str]
    ) -> list[tuple[str, str]]:
        """Overlays and their bases as heads name them, by place."""
        found = []
        for file, name, paths in named:
            places = [await self._threads.files(self._place, path) for path in paths]
            found += [(file.path, place) for place in places if place is not None]
            if None in places:
                problems[file.path] = f"where its base {printable(name)} lies cannot be told"
        return found

    def _identified(
        self, vm: Vm, named: Sequence[tuple[VmFile, str, list[str]]], uses: Mapping[str, Sequence[DiskUse]]
    ) -> list[BaseOf]:
        own = {file.path: file for file in vm.files}
        told = {(own[overlay], base): base for overlay, base in self._told(uses) if overlay in own}
        for file, name, paths in named:
            told.update({(file, place): name for place in map(self._place, paths) if place is not None})
        found = [self._identity(file, name, place) for (file, place), name in told.items()]
        return sorted(found, key=lambda base: (base.disk, base.place))

    def _identity(self, file: VmFile, name: str, place: str) -> BaseOf:
        base = BaseOf(file.relative, name, place)
        if place.startswith("/"):
            return base
        with suppress(OSError, VmfsStubError):
            path_fd = self._open(place)
            try:
                st = os.fstat(path_fd)
            finally:
                os.close(path_fd)
            top_fd = self._open(place.split("/", 1)[0])
            try:
                vm_id = read_vm_id(top_fd, files=self._files)
            finally:
                os.close(top_fd)
            known = self._disks.placeholders.get(st.st_ino)
            mtime_ns = st.st_mtime_ns if known is None else known.mtime_ns
            point_id = None if known is None or known.record is None else known.record.point_id
            return BaseOf(file.relative, name, place, vm_id, st.st_size, mtime_ns, point_id)
        return base


def _nvram_of(domain: Domain) -> list[DomainDisk]:
    return [] if domain.nvram is None else [DomainDisk(NVRAM_TARGET, NVRAM_TARGET, "file", domain.nvram, "raw")]
