"""What the head of a disk image says of itself: its format, and which images it is based on.

Pure.  A head may be hostile: whoever runs in a guest can write any bytes to the start of a raw disk, one that names
another VM's disk as its base among them.  So a disk that is declared raw is never asked (`is_asked`); of all others a
head that cannot be understood has a ``problem``, and is never taken for one without a base.  Format of qcow2:
docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 64 << 10
"""How much of an image has to be read: QEMU puts all that is asked here into the first cluster, at its start."""

_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
"""Version 2: magic, version, base's name (offset, length), cluster bits, size, encryption, then tables, snapshots."""
_FIXED_3 = struct.Struct(">QQQII")
"""What version 3 adds: incompatible, compatible and automatically cleared features, refcount order, header length."""
_EXTENSION = struct.Struct(">II")
_EXTENSION_END = 0
_EXTENSION_DATA_FILE = 0x44415441
_FEATURE_DATA_FILE = 1 << 2
_CLUSTER_BITS = range(9, 22)
_NAME_BYTES_MAX = 1023
_ENCRYPTIONS = range(3)
"""None, AES, LUKS: what is encrypted is the data, not the head."""
_JSON = "json:"
_RAW_ENDINGS = (".raw", ".iso")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a head says.  ``format`` is raw unless the head is that of a format known here.

    ``base`` is the name of the image that this one is based on, as it is written there (see `local_names`); None when
    there is none.  ``data_file`` is the file that has the data instead of this one, "" when its name is not told.
    ``problem`` says why the head cannot be understood.
    """

    format: str = "raw"
    base: str | None = None
    data_file: str | None = None
    problem: str = ""


RAW: Final = ImageHeader()


def is_asked(name: str, declared: Collection[str]) -> bool:
    """Whether the head of a file is to be read for its base; ``declared`` are the formats that domains give it.

    A disk that domains say is raw, and nothing else, is raw: the hypervisor does not look at its head either.  One
    that no domain has may be anything, unless its name says raw: a base too many only stays resident.
    """
    if declared:
        return any(format_ != "raw" for format_ in declared)
    return not name.lower().endswith(_RAW_ENDINGS)


def read_header(head: bytes) -> ImageHeader:
    """What the first bytes of an image, at most HEAD_BYTES, say; never fails, whatever they are."""
    if head.startswith(_MAGIC):
        return _qcow2(head)
    if head.startswith(b"QED\0"):
        return ImageHeader(format="qed", problem="its format is QED, of which the base is not read")
    is_vmdk = head.startswith((b"KDMV", b"COWD", b"# Disk DescriptorFile"))
    if is_vmdk and b"parentFileNameHint" in head:
        return ImageHeader(format="vmdk", problem="it is a VMDK with a base, which is not read")
    return RAW


def _qcow2(head: bytes) -> ImageHeader:
    try:
        return _qcow2_checked(head)
    except ValueError as exc:
        return ImageHeader(format="qcow2", problem=f"its head is that of a qcow2 image and cannot be understood: {exc}")


def _qcow2_checked(head: bytes) -> ImageHeader:
    """Raises ValueError."""
    if len(head) < _FIXED.size:
        raise ValueError("it is cut short")
    _, version, name_at, name_bytes, cluster_bits, _, crypt, *_ = _FIXED.unpack_from(head)
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if cluster_bits not in _CLUSTER_BITS:
        raise ValueError(f"clusters of 2^{cluster_bits} bytes")
    if crypt not in _ENCRYPTIONS:
        raise ValueError(f"encryption {crypt}")
    features, length = _features(head, version, 1 << cluster_bits)
    extensions = dict(_extensions(head[: 1 << cluster_bits], length, name_at))
    has_data_file = bool(features & _FEATURE_DATA_FILE)
    base = _name(head, name_at, name_bytes, 1 << cluster_bits)
    return ImageHeader(
        format="qcow2",
        base=base,
        data_file=_text(extensions.get(_EXTENSION_DATA_FILE, b"")) if has_data_file else None,
    )


def _features(head: bytes, version: int, cluster_bytes: int) -> tuple[int, int]:
    """The incompatible features, and the length of the fixed part."""
    if version == 2:
        return 0, _FIXED.size
    if len(head) < _FIXED.size + _FIXED_3.size:
        raise ValueError("it is cut short")
    features, _, _, _, length = _FIXED_3.unpack_from(head, _FIXED.size)
    if not _FIXED.size + _FIXED_3.size <= length <= cluster_bytes:
        raise ValueError(f"a length of {length} bytes")
    return features, length


def _extensions(head: bytes, start: int, name_at: int) -> Iterator[tuple[int, bytes]]:
    """Type and contents of each extension; they end where the base's name begins, at the latest."""
    end = min(len(head), name_at or len(head))
    while start + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, start)
        start += _EXTENSION.size
        if kind == _EXTENSION_END:
            return
        if length > end - start:
            raise ValueError("an extension is longer than the head")
        yield kind, head[start : start + length]
        start += (length + 7) & ~7


def _name(head: bytes, at: int, length: int, cluster_bytes: int) -> str | None:
    if at == 0 or length == 0:
        return None
    if length > _NAME_BYTES_MAX or at + length > cluster_bytes:
        raise ValueError("the name of its base lies outside its first cluster, or is too long")
    if at + length > len(head):
        raise ValueError("the name of its base lies too far from its start")
    return _text(head[at : at + length]) or None


def _text(raw: bytes) -> str:
    """A name as the hypervisor takes it: up to the first NUL, in the file system's own bytes."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def local_names(base: str) -> tuple[str, ...]:
    """The files of this host that the name of a base stands for, as paths; none when it lies on the network.

    A name may be a path, a path behind ``file:``, or ``json:`` with an object that names one or more files; what else
    has a protocol is no file here.  Raises ValueError when it cannot be understood.
    """
    if base.startswith(_JSON):
        try:
            described = json.loads(base.removeprefix(_JSON))
        except (ValueError, RecursionError) as exc:
            raise ValueError("the name of its base is no JSON") from exc
        return tuple(_json_names(described))
    protocol, colon, rest = base.partition(":")
    if not colon or "/" in protocol:
        return (base,)
    return (rest,) if protocol == "file" and rest else ()


def _json_names(described: object) -> Iterator[str]:
    """Everything that is called a file's name, at any depth."""
    if isinstance(described, list):
        for each in described:
            yield from _json_names(each)
    elif isinstance(described, dict):
        for key, value in described.items():
            if isinstance(value, dict | list):
                yield from _json_names(value)
            elif isinstance(value, str) and (key == "filename" or key.endswith(".filename")) and value:
                yield value.removeprefix("file:")
            elif isinstance(value, str) and key in ("backing", "file") and value:
                raise ValueError("its base is named by a node of another program")
