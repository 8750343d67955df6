"""A domain's XML: what backups need of it, what keeps it from being archived, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmfs_stub.core.errors import UnknownFormat
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.domain_xml import NOTE, SETTINGS, XML_CHARS_MAX, Definition, note_xml, parse_domain

UUID = "dc4fb86f-f8a3-4ec8-8fde-bb2f4bcbba2d"


def parsed(inner: str = "", *, devices: str = "", **options: object) -> Definition:
    xml = f"<domain><name>web</name><uuid>{UUID}</uuid>{inner}<devices>{devices}</devices></domain>"
    return parse_domain(xml, **options)  # type: ignore[arg-type]


def disk(
    *, kind: str = "file", device: str = "disk", source: str = "file='/a'", driver: str = "", more: str = ""
) -> str:
    inner = f"<driver name='qemu' {driver}/><source {source}/><target dev='vda'/>{more}"
    return f"<disk type='{kind}' device='{device}'>{inner}</disk>"


def test_a_plain_disk() -> None:
    found = parsed(devices=disk(driver="type='qcow2' error_policy='stop' rerror_policy='stop'"))
    assert (found.uuid, found.name, found.problems) == (UUID.replace("-", ""), "web", ())
    (one,) = found.disks
    assert (one.target, one.device, one.kind, one.path, one.format) == ("vda", "disk", "file", Path("/a"), "qcow2")
    assert one.stops_on_error
    assert not one.is_read_only
    assert not one.is_shared


@pytest.mark.parametrize(
    ("driver", "stops"),
    [
        ("", False),
        ("error_policy='stop'", True),  # which then is that of reads, too
        ("rerror_policy='stop'", False),
        ("error_policy='stop' rerror_policy='report'", False),
        ("error_policy='enospace' rerror_policy='stop'", False),
        ("error_policy='stop' rerror_policy='stop'", True),
    ],
)
def test_error_policies(driver: str, stops: bool) -> None:
    assert parsed(devices=disk(driver=driver)).disks[0].stops_on_error is stops


def test_a_chain_of_images_in_order() -> None:
    inner = "<backingStore/>"
    for name in ("/base", "/middle"):
        inner = f"<backingStore type='file'><format type='qcow2'/><source file='{name}'/>{inner}</backingStore>"
    assert parsed(devices=disk(more=inner)).disks[0].backing == (Path("/middle"), Path("/base"))


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        (disk(more="<shareable/>"), "disk vda is shared"),
        (disk(kind="block", source="dev='/dev/sda'"), "disk vda is a device of the host (block)"),
        (disk(device="lun", kind="block", source="dev='/dev/sda'"), "passed through"),
        (disk(kind="network", source="protocol='rbd' name='p/v'"), "no image file of this host"),
        (disk(kind="volume", source="pool='p' volume='v'"), "no image file of this host"),
        (disk(source="file='relative.img'"), "no image file of this host"),
        (disk(more="<mirror type='file'/>"), "disk vda has a block job running"),
        (disk(more="<transient/>"), "forgets what is written"),
        ("<hostdev mode='subsystem' type='scsi'/>", "a scsi device of the host is passed through"),
        ("<memory model='nvdimm'/>", "nvdimm"),
        ("<tpm><backend type='passthrough'/></tpm>", "its TPM is not of this domain alone (passthrough)"),
    ],
)
def test_what_keeps_it_from_being_archived(devices: str, problem: str) -> None:
    (found,) = parsed(devices=devices).problems
    assert problem in found


@pytest.mark.parametrize(
    "devices",
    [
        disk(device="cdrom", source=""),
        disk(device="cdrom", kind="network", source="protocol='http' name='x'"),
        "<hostdev mode='subsystem' type='pci'/>",
        "<interface type='hostdev'/>",
        "<tpm><backend type='emulator'/></tpm>",
        "<tpm><backend type='emulator'><source type='dir' path='/elsewhere'/></backend></tpm>",
    ],
)
def test_what_does_not(devices: str) -> None:
    assert parsed(devices=devices).problems == ()


def test_a_volume_lies_where_its_pool_says() -> None:
    volume = disk(kind="volume", source="pool='p' volume='v'")
    found = parsed(devices=volume, volume_path=lambda pool, name: Path(f"/{pool}/{name}"))
    assert (found.disks[0].path, found.problems) == (Path("/p/v"), ())


@pytest.mark.parametrize(
    "nvram", ["<nvram>/n.fd</nvram>", "<nvram template='/t'> /n.fd\n</nvram>", "<nvram><source file='/n.fd'/></nvram>"]
)
def test_nvram(nvram: str) -> None:
    assert parsed(f"<os>{nvram}</os>").nvram == Path("/n.fd")
    assert parsed("<os><nvram/></os>").nvram is None


@pytest.mark.parametrize(
    "element",
    [
        f"<v:domain xmlns:v='{SETTINGS}'><v:protected/><v:group> x </v:group></v:domain>",
        f"<domain xmlns='{SETTINGS}'><protected/><group>x</group></domain>",
        f"<v:s xmlns:v='{SETTINGS}'><protected/><group>x</group><o:other xmlns:o='o'>y</o:other></v:s>",
    ],
)
def test_settings(element: str) -> None:
    assert parsed(f"<metadata>{element}</metadata>").metadata == {"protected": "yes", "group": "x"}


def test_settings_of_others_are_not_ours_and_a_single_one_needs_no_wrapping() -> None:
    other = "<o:domain xmlns:o='urn:other'><o:protected/></o:domain>"
    assert parsed(f"<metadata>{other}</metadata>").metadata == {}
    assert parsed(f"<metadata><p:protected xmlns:p='{SETTINGS}'/></metadata>").metadata == {"protected": "yes"}


def test_a_note_is_read_as_it_was_written() -> None:
    note = ArchiveNote(1_700_000_000.0, 9 << 30, 20.5, "a 'name' <of> \"some\" & kind")
    element = note_xml(note).replace("<archived", f"<n:archived xmlns:n='{NOTE}'")
    assert parsed(f"<metadata>{element}</metadata>").note == note
    spoilt = element.replace("1700000000.0", "nan").replace(str(9 << 30), "-1")
    found = parsed(f"<metadata>{spoilt}</metadata>").note
    assert found is not None
    assert (found.archived_s, found.size_bytes) == (0.0, 0)


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain/>",
        "<domain><name>x</name><uuid>no</uuid></domain>",
        f"<network><name>x</name><uuid>{UUID}</uuid></network>",
        f"<domain><name>x</name><uuid>{UUID}</uuid>",
        f"<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name><uuid>{UUID}</uuid></domain>",
        f"<domain><name>x</name><uuid>{UUID}</uuid><a>\0</a></domain>",
        f"<domain><name>x</name><uuid>{UUID}</uuid><a>\ud800</a></domain>",
        " " * (XML_CHARS_MAX + 1),
    ],
)
def test_what_is_no_domain_is_refused(xml: str) -> None:
    with pytest.raises(UnknownFormat):
        parse_domain(xml)


def domain_of(devices: str, *, below: str = "/mnt") -> Domain:
    found = parsed(devices=devices)
    return Domain(
        uuid=found.uuid,
        name=found.name,
        state=GuestState.OFF,
        state_since_s=None,
        is_persistent=True,
        autostarts=False,
        disks=found.disks,
        nvram=None,
        xml="",
        metadata={"protected": below},
        problems=found.problems,
    )


def test_disks_whose_guest_would_see_a_recall_that_fails() -> None:
    def lax(*words: str, **options: str) -> list[str]:
        found = domain_of(disk(source="file='/mnt/vm/d'", driver=" ".join(words), **options))
        return [each.target for each in found.disks if each.lacks_stop]

    assert lax() == lax("rerror_policy='stop'") == lax("error_policy='stop'", "rerror_policy='report'") == ["vda"]
    assert lax("error_policy='stop'") == lax("error_policy='stop'", "rerror_policy='stop'") == []
    assert lax(device="cdrom") == []


@pytest.mark.parametrize(
    ("value", "protects"), [("yes", True), ("no", False), ("False", False), ("0", False), ("x", True)]
)
def test_protected(value: str, protects: bool) -> None:
    assert domain_of("", below=value).is_protected is protects
