"""Files that belong to a VM and lie elsewhere, in the metadata of its restore points: NVRAM, the state of a TPM.

They are small, and not of the VM's own directory: a restore point holds their bytes in its manifest, compressed, with
the path that they had.  A store is not believed: what is read is bounded, and a name is only ever a name.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.errors import CorruptManifest
from vmfs_stub.store.documents import Fields

DOMAIN_XML: Final = "domain_xml"
"""Key of the metadata: the domain's inactive definition.  Those of further domains have their name behind a colon."""
ASSOCIATED: Final = "associated"
"""Key of the metadata: what `encode_associated` made."""

FILE_BYTES_MAX: Final = 64 << 20
"""Of one file: the largest flash images of firmware; nearly all of it is the same byte."""
ENCODED_BYTES_MAX: Final = 4 << 20
"""Of all files of a VM together, compressed and as text: whoever lists restore points reads their manifests."""
FILES_MAX: Final = 64
NVRAM: Final = "nvram"
TPM: Final = "tpm"
_KINDS = (NVRAM, TPM)


@dataclass(frozen=True, slots=True)
class AssociatedFile:
    """One file: its kind (`NVRAM`, `TPM`), the absolute path that it had, its mode and bytes."""

    kind: str
    path: str
    mode: int
    data: bytes

    @property
    def name(self) -> str:
        """What it is called when it is written out: its name, that of TPM state within its directory."""
        parts = self.path.split("/")
        return "/".join(parts[-2:]) if self.kind == TPM else parts[-1]


def encode_associated(files: Sequence[AssociatedFile]) -> str:
    """The value of `ASSOCIATED`; may be longer than ENCODED_BYTES_MAX, and is not to be used then."""
    bodies = [
        {
            "kind": file.kind,
            "path": file.path,
            "mode": file.mode,
            "data": base64.b64encode(zlib.compress(file.data, 6)).decode("ascii"),
        }
        for file in files
    ]
    return json.dumps(bodies, separators=(",", ":"))


def decode_associated(text: str, key: str) -> tuple[AssociatedFile, ...]:
    """Parse the value of `ASSOCIATED` in the manifest ``key``.  Raises CorruptManifest."""
    if len(text) > ENCODED_BYTES_MAX:
        raise CorruptManifest(f"{key}: its associated files are too large")
    try:
        bodies = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptManifest(f"{key}: its associated files are no JSON") from exc
    found = tuple(_decode(each) for each in Fields({"files": bodies}, key).objects("files"))
    names = {file.name for file in found}
    if len(found) > FILES_MAX or len(names) < len(found) or any(name.split("/")[0] in names - {name} for name in names):
        raise CorruptManifest(f"{key}: its associated files are too many, or have the same names")
    return found


def _decode(fields: Fields) -> AssociatedFile:
    kind, path = fields.text("kind"), fields.text("path")
    parts = path.split("/")
    if kind not in _KINDS:
        raise fields.error("kind", "is not a kind of associated file")
    if len(parts) < 3 or parts[0] or any(not _is_name(part) for part in parts[1:]):
        raise fields.error("path", "is not a plain absolute path")
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(base64.b64decode(fields.text("data"), validate=True), FILE_BYTES_MAX)
    except (binascii.Error, ValueError, zlib.error) as exc:
        raise fields.error("data", "cannot be unpacked") from exc
    if not unpacking.eof:
        raise fields.error("data", "is cut short, or too large")
    return AssociatedFile(kind, path, fields.integer("mode", high=0o7777), data)


def _is_name(part: str) -> bool:
    try:
        return part not in ("", ".", "..") and "\0" not in part and len(part.encode("utf-8", "surrogateescape")) <= 255
    except UnicodeEncodeError:
        return False
