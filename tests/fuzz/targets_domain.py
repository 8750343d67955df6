"""What the owner of a libvirt domain can write into its XML."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.target import Bound, Target, check_types, require
from vmfs_stub.core.errors import UnknownFormat
from vmfs_stub.inventory.domain import ArchiveNote
from vmfs_stub.inventory.domain_xml import NOTE, SETTINGS, note_xml, parse_domain

_NOTE = note_xml(ArchiveNote(1_700_000_000.5, 9 << 30, 20.5, "vms")).replace(
    "<archived", f'<n:archived xmlns:n="{NOTE}"'
)
DOMAIN = f"""<domain type='kvm'><name>web</name><uuid>dc4fb86f-f8a3-4ec8-8fde-bb2f4bcbba2d</uuid>
<metadata><v:domain xmlns:v="{SETTINGS}"><v:protected/><v:group>x &amp; y</v:group></v:domain>{_NOTE}</metadata>
<os><type>hvm</type><nvram template='/t'>/var/lib/libvirt/images/web/nvram.fd</nvram></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' error_policy='stop' rerror_policy='stop'/>
<source file='/srv/vms/web/disk.qcow2'/><target dev='vda' bus='virtio'/><backingStore type='file'>
<format type='qcow2'/><source file='/srv/vms/base.qcow2'/><backingStore/></backingStore></disk>
<disk type='block' device='lun'><source dev='/dev/sda'/><target dev='sda'/><shareable/></disk>
<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdb'/><mirror type='file'/></disk>
<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>
<hostdev mode='subsystem' type='scsi'/><tpm model='tpm-crb'><backend type='emulator'/></tpm></devices></domain>"""


class DomainXmlTarget(Target):
    """A domain's XML, as libvirt hands it out."""

    name = "domain-xml"
    permitted = (UnknownFormat,)
    bound = Bound(base_bytes=4 << 20, per_byte=300)
    tokens = (
        b"<!DOCTYPE d [<!ENTITY e 'x'>]>", b"&e;", b"<![CDATA[", b"]]>", b"<!--", b"<?xml version='1.0' encoding='x'?>",
        b"<backingStore>", b"<source file='/x'/>", b"<source file='x'/>", b"<disk>", b"</disk>", b"&#0;",
        b"<shareable/>", b"<tpm/>",
        b"xmlns='", b"\xff\xfe", b"<a>" * 500, b"='", b"type='volume'", b"<nvram/>", b"1e999", b"nan", b"-1",
    )  # fmt: skip

    def seeds(self) -> list[bytes]:
        small = "<domain><name>a</name><uuid>dc4fb86ff8a34ec88fdebb2f4bcbba2d</uuid></domain>"
        return [DOMAIN.encode(), small.encode()]

    def call(self, data: bytes) -> object:
        text = data.decode("utf-8", "replace")
        found = parse_domain(text, volume_path=lambda pool, name: Path("/pool") / "volume")
        check_types(found)
        require("<!DOCTYPE" not in text, "a document type was read")
        paths = [disk.path for disk in found.disks if disk.path] + [
            each for disk in found.disks for each in disk.backing
        ]
        require(all(path.is_absolute() and "\0" not in str(path) for path in paths), "a path that is not absolute")
        require(len(found.metadata) <= 64 and all(len(value) <= 1024 for value in found.metadata.values()), "metadata")
        if found.note is not None:
            require(0 <= found.note.archived_s < 2**63 and found.note.size_bytes >= 0, "a note out of all bounds")
        return found
