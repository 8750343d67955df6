"""What belongs to a VM beside its own files, for its restore points: domain XML, NVRAM, TPM state, names of bases.

Whoever restores a VM on another host needs them; on this one they stay where they are, and an archive takes nothing of
them away.  So what cannot be had is a warning, and never fails a backup.  The same goes for the memory of a saved guest
where that is no file of the VM.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final
from xml.etree import ElementTree

from vmfs_stub.core.errors import HypervisorAway, PrimaryIOError
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.files import FileCalls, read_fully
from vmfs_stub.services.domains import LinkDomains
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.image_chains import BaseOf, ImageChains
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.associated_files import (
    ASSOCIATED,
    DOMAIN_XML,
    ENCODED_BYTES_MAX,
    FILE_BYTES_MAX,
    FILES_MAX,
    NVRAM,
    TPM,
    AssociatedFile,
    encode_associated,
)

BASES: Final = "bases"
"""Key of the metadata: what the VM's images are directly based on, a list of `BaseOf`."""
XML_BYTES_MAX: Final = 1 << 20
SWTPM: Final = Path("/var/lib/libvirt/swtpm")
"""Where libvirt keeps the state of emulated TPMs, in a directory of the domain's UUID each."""


@dataclass(frozen=True, slots=True)
class Associated:
    """Metadata for a restore point, and what is missing in it.

    ``images`` are those of the VM's domains and what they are based on, as far as domains tell; None when none did.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    images: frozenset[tuple[Path, ...]] | None = None

    def has_other_images(self, now: Associated) -> bool:
        """Whether the VM is known to consist of others by now: a snapshot was made, or one was folded back."""
        return None not in (self.images, now.images) and self.images != now.images


async def nothing_associated(vm: Vm) -> Associated:
    """For hosts without a hypervisor that tells of its domains."""
    return Associated()


class AssociatedFiles:
    """Collects what belongs to VMs; ``swtpm`` is where states of TPMs are."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        hypervisor: Hypervisor,
        chains: ImageChains,
        link: LinkDomains,
        managed_save: ManagedSave,
        swtpm: Path = SWTPM,
    ) -> None:
        self._files = files
        self._threads = threads
        self._hypervisor = hypervisor
        self._chains = chains
        self._link = link
        self._managed_save = managed_save
        self._swtpm = swtpm

    async def of(self, vm: Vm) -> Associated:
        """What belongs to ``vm`` now.  Call it before the VM's files are reserved."""
        warnings: list[str] = []
        try:
            domains = await self._hypervisor.domains()
        except HypervisorAway as exc:
            domains = ()
            warnings.append(f"the restore point is without the domain's definition: {exc}")
        own: Sequence[Domain] = ()
        bases: Sequence[BaseOf] = ()
        try:
            bases = await self._chains.bases_of(vm, domains)
            own = (await self._threads.files(self._link, [vm], domains)).of(vm.id)
        except PrimaryIOError as exc:
            warnings.append(f"the restore point may be without what belongs to the VM: {exc}")
        warnings += filter(None, (self._managed_save.missing(vm, domain) for domain in own))
        warnings += await self._threads.files(self._elsewhere, vm, own)
        metadata = dict(_definitions(own, warnings))
        if files := await self._threads.files(self._collected, own, warnings):
            metadata[ASSOCIATED] = encode_associated(files)
            if len(metadata[ASSOCIATED]) > ENCODED_BYTES_MAX:
                del metadata[ASSOCIATED]
                warnings.append("the restore point is without NVRAM and TPM state: they are too large")
        if bases:
            metadata[BASES] = json.dumps([asdict(base) for base in bases])
        return Associated(metadata, warnings, _images(own) if own else None)

    def _collected(self, domains: Sequence[Domain], warnings: list[str]) -> list[AssociatedFile]:
        found: dict[str, AssociatedFile] = {}
        for kind, path in [each for domain in domains for each in self._paths(domain, warnings)]:
            try:
                file = self._read(kind, path)
                if file is not None and (file.name in found or len(found) == FILES_MAX):
                    raise ValueError("there are too many, or two of the same name")
            except (OSError, ValueError) as exc:
                warnings.append(f"the restore point is without {printable(str(path))}: {exc}")
            else:
                found.update({} if file is None else {file.name: file})
        return list(found.values())

    def _paths(self, domain: Domain, warnings: list[str]) -> Iterator[tuple[str, Path]]:
        """Kind and path of each file of a domain that lies outside this datastore."""
        if domain.nvram is not None and self._chains.is_outside(domain.nvram):
            yield NVRAM, domain.nvram
        state = _tpm_state(domain, self._swtpm)
        if state is None or not self._chains.is_outside(state):
            return
        try:
            names = self._files.call("associated.list", os.listdir, state)
        except FileNotFoundError:
            return  # it has never run
        except NotADirectoryError:
            yield TPM, state
            return
        except OSError as exc:
            warnings.append(f"the restore point is without the TPM state in {state}: {exc.strerror}")
            return
        yield from ((TPM, state / name) for name in sorted(names) if not name.endswith(".lock") and name != ".lock")

    def _elsewhere(self, vm: Vm, domains: Sequence[Domain]) -> list[str]:
        """What to say of what is another VM's here: the daemon must not open what lies below its mount."""
        paths = [path for domain in domains for path in (domain.nvram, _tpm_state(domain, self._swtpm)) if path]
        own = {
            str(place) for file in vm.files for place in (PurePosixPath(file.path), *PurePosixPath(file.path).parents)
        }
        return [
            f"the restore point is without {printable(str(path))}: it is in this datastore, in a VM of its own"
            for path in paths
            if not self._chains.is_outside(path) and self._chains.place_of(path) not in own
        ]

    def _read(self, kind: str, path: Path) -> AssociatedFile | None:
        """One file; None when it is not there.  Raises OSError, and ValueError when it is too large, or is none."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = self._files.call("associated.open", os.open, path, flags)
        except FileNotFoundError:
            return None
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise ValueError("it is no regular file")
            if st.st_size > FILE_BYTES_MAX:
                raise ValueError(f"it has {st.st_size} bytes, more than are kept of such a file")
            data = read_fully(self._files, "associated.read", fd, st.st_size, 0)
        finally:
            os.close(fd)
        return AssociatedFile(kind, os.path.normpath(path), stat.S_IMODE(st.st_mode), data)


def _images(domains: Sequence[Domain]) -> frozenset[tuple[Path, ...]]:
    return frozenset((disk.path, *disk.backing) for domain in domains for disk in domain.disks if disk.path is not None)


def _definitions(domains: Sequence[Domain], warnings: list[str]) -> Iterator[tuple[str, str]]:
    """The metadata with the XML of each domain; a VM has one as a rule."""
    for number, domain in enumerate(domains):
        if len(domain.xml) > XML_BYTES_MAX:
            warnings.append(f"the restore point is without the definition of domain {domain.name}: it is too large")
        else:
            yield (f"{DOMAIN_XML}:{printable(domain.name)}" if number else DOMAIN_XML), domain.xml


def _tpm_state(domain: Domain, swtpm: Path) -> Path | None:
    """The directory, or the one file, with the state of a domain's emulated TPM; None when it has none."""
    try:
        backend = ElementTree.fromstring(domain.xml).find("./devices/tpm/backend[@type='emulator']")
    except ElementTree.ParseError:
        return None
    if backend is None:
        return None
    source = backend.find("source")
    if source is not None and source.get("path", "").startswith("/"):
        return Path(source.get("path", ""))
    version = "tpm1.2" if backend.get("version") == "1.2" else "tpm2"
    return swtpm / str(uuid.UUID(domain.uuid)) / version
