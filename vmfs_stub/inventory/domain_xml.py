"""Reads the XML of a libvirt domain (https://libvirt.org/formatdomain.html), as far as backups and archives need it.

What a domain's owner may write into it is not to be trusted: the text is bounded, document types are refused, which
are what entities need, and nothing in it is an error but what is no domain at all.  Elements and attributes that are
not known are left alone.  Pure but for what callers pass in.

Two namespaces of a domain's <metadata> are ours.  In `SETTINGS` an operator says how the VM is to be treated:

    virsh metadata NAME https://vmfs-stub/domain/1 --key vmfs --config --live \\
        --set '<domain><protected/><group>web</group><target-seconds>30</target-seconds></domain>'

`NOTE` has what we say of a VM that is archived.  They are two, since libvirt replaces all of a namespace at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.sax.saxutils import quoteattr

from vmfs_stub.core.errors import UnknownFormat
from vmfs_stub.inventory.domain import ArchiveNote, DomainDisk

SETTINGS: Final = "https://vmfs-stub/domain/1"
NOTE: Final = "https://vmfs-stub/archive/1"
NOTE_KEY: Final = "vmfs-archive"
"""The prefix that our notes have in the XML."""
XML_CHARS_MAX: Final = 4 << 20
_CHAIN_MAX: Final = 200
"""QEMU itself refuses longer chains of backing images."""
_SETTINGS_MAX: Final = 64
_TEXT_MAX: Final = 1024
_UUID: Final = re.compile(r"[0-9a-f]{32}")

VolumePath = Callable[[str, str], Path | None]
"""Where the volume of that pool and name lies; None when that is no file, or nobody knows."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a domain's XML says; the fields are those of `Domain`.  ``problems`` are those that the XML shows."""

    uuid: str
    name: str
    disks: tuple[DomainDisk, ...]
    nvram: Path | None
    metadata: dict[str, str]
    note: ArchiveNote | None
    problems: tuple[str, ...]


def parse_domain(
    xml: str,
    *,
    volume_path: VolumePath = lambda pool, name: None,
) -> Definition:
    """What the XML of a domain says.

    Raises UnknownFormat for what is no domain's XML.
    """
    root = _root(xml)
    uuid = (root.findtext("uuid") or "").replace("-", "").strip().lower()
    name = root.findtext("name") or ""
    if root.tag != "domain" or _UUID.fullmatch(uuid) is None or not name:
        raise UnknownFormat("the XML of a domain has no <domain> with name and uuid")
    disks = tuple(_disk(element, volume_path) for element in root.iterfind("devices/disk"))
    return Definition(
        uuid=uuid,
        name=name,
        disks=disks,
        nvram=_nvram(root),
        metadata=_settings(root),
        note=_note(root),
        problems=(*_disk_problems(root, disks), *_device_problems(root)),
    )


def note_xml(note: ArchiveNote) -> str:
    """The element that says so, for libvirt to put into `NOTE`."""
    values = {
        "archived": repr(note.archived_s),
        "size-bytes": str(note.size_bytes),
        "expected-seconds": repr(note.expected_s),
        "datastore": note.datastore,
    }
    return f"<archived {' '.join(f'{key}={quoteattr(value)}' for key, value in values.items())}/>"


def _root(xml: str) -> Element:
    if len(xml) > XML_CHARS_MAX:
        raise UnknownFormat(f"the XML of a domain is longer than {XML_CHARS_MAX} characters")
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise UnknownFormat("the XML of a domain has a document type, which libvirt never writes")
    try:
        # Given as a string, whatever it says of its encoding does not count.
        return ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, UnicodeError) as exc:
        raise UnknownFormat(f"the XML of a domain cannot be read: {exc}") from exc


# Disks


def _disk(element: Element, volume_path: VolumePath) -> DomainDisk:
    driver, source = _child(element, "driver"), _child(element, "source")
    device = element.get("device", "disk")
    kind = element.get("type", "file")
    policies = (driver.get("error_policy"), driver.get("rerror_policy") or driver.get("error_policy"))
    return DomainDisk(
        target=_child(element, "target").get("dev", "?"),
        device=device,
        kind=kind,
        path=_path(kind, source, volume_path),
        format=driver.get("type", "raw"),
        is_read_only=element.find("readonly") is not None or device == "cdrom",
        is_shared=element.find("shareable") is not None,
        # libvirt takes the policy of writes for that of reads when it has none.
        stops_on_error=policies == ("stop", "stop"),
        backing=tuple(_chain(element)),
    )


def _child(element: Element, name: str) -> Element:
    found = element.find(name)
    return Element(name) if found is None else found


def _path(kind: str, source: Element, volume_path: VolumePath) -> Path | None:
    if kind == "volume":
        return volume_path(source.get("pool", ""), source.get("volume", ""))
    return _absolute(source.get("file")) if kind == "file" else None


def _absolute(text: str | None) -> Path | None:
    return Path(text) if text and text.startswith("/") and "\0" not in text else None


def _chain(disk: Element) -> Iterator[Path]:
    element = disk.find("backingStore")
    for _ in range(_CHAIN_MAX):
        if element is None or element.find("source") is None:
            return
        path = _absolute(_child(element, "source").get("file"))
        if path is not None:
            yield path
        element = element.find("backingStore")


def _nvram(root: Element) -> Path | None:
    element = root.find("os/nvram")
    if element is None:
        return None
    return _absolute((element.text or "").strip()) or _absolute(_child(element, "source").get("file"))


# Ours


def _local(element: Element, *namespaces: str) -> str | None:
    """An element's name, if it is in one of these namespaces, "" being none; None if it is not."""
    namespace, _, name = element.tag[1:].partition("}") if element.tag.startswith("{") else ("", "", element.tag)
    return name if namespace in namespaces else None


def _settings(root: Element) -> dict[str, str]:
    found: dict[str, str] = {}
    for top in _child(root, "metadata"):
        if _local(top, SETTINGS) is None:
            continue
        for element in list(top) or [top]:
            name = _local(element, SETTINGS, "")
            if name and len(found) < _SETTINGS_MAX:
                found[name[:_TEXT_MAX]] = (element.text or "").strip()[:_TEXT_MAX] or "yes"
    return found


def _note(root: Element) -> ArchiveNote | None:
    for element in _child(root, "metadata"):
        if _local(element, NOTE) == "archived":
            return ArchiveNote(
                archived_s=_number(element.get("archived")),
                size_bytes=int(_number(element.get("size-bytes"))),
                expected_s=_number(element.get("expected-seconds")),
                datastore=element.get("datastore", "")[:_TEXT_MAX],
            )
    return None


def _number(text: str | None) -> float:
    """Of what somebody has changed by hand, nothing."""
    try:
        value = float((text or "0")[:64])
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and 0 <= value < 2**63 else 0.0


# Problems


def _disk_problems(root: Element, disks: tuple[DomainDisk, ...]) -> Iterator[str]:
    for element, disk in zip(root.iterfind("devices/disk"), disks, strict=True):
        if disk.is_shared:
            yield f"disk {disk.target} is shared with other domains (<shareable/>)"
        if disk.device == "lun" or disk.kind in ("block", "nvme"):
            yield f"disk {disk.target} is a device of the host ({disk.kind}), passed through"
        elif disk.path is None and not disk.is_read_only and disk.device == "disk":
            yield f"disk {disk.target} is no image file of this host that can be found ({disk.kind})"
        if element.find("mirror") is not None:
            yield f"disk {disk.target} has a block job running"
        if element.find("transient") is not None:
            yield f"disk {disk.target} forgets what is written to it (<transient/>)"


def _device_problems(root: Element) -> Iterator[str]:
    for element in root.iterfind("devices/hostdev"):
        kind = element.get("type", "")
        if kind.startswith("scsi"):
            yield f"a {kind} device of the host is passed through (<hostdev>)"
    for element in root.iterfind("devices/memory"):
        if element.get("model") in ("nvdimm", "virtio-pmem"):
            yield f"memory that lasts (<memory model='{element.get('model')}'>) lies in a file that is no disk"
    for element in root.iterfind("devices/tpm"):
        # That of an emulated one is in the restore point, and stays where it is.
        kind = _child(element, "backend").get("type", "passthrough")
        if kind != "emulator":
            yield f"its TPM is not of this domain alone ({kind}): its state cannot be archived"
