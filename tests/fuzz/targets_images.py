"""Heads of disk images, which guests may have written, and small files from a store that others can write."""

from __future__ import annotations

import json
import struct
from typing import ClassVar

from tests.fuzz.target import Bound, Edit, Target, check_types, require
from vmfs_stub.core.errors import CorruptManifest
from vmfs_stub.inventory.image_header import HEAD_BYTES, local_names, read_header
from vmfs_stub.store.associated_files import FILE_BYTES_MAX, AssociatedFile, decode_associated, encode_associated


def qcow2_head(base: bytes, *, version: int = 3, extensions: bytes = b"") -> bytes:
    """The head of an image that is based on ``base``."""
    length = 72 if version == 2 else 104
    at = length + len(extensions) + 8
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, at, len(base), 16, 1 << 30, 0, 1, 3 << 16, 1 << 16, 1, 0, 0
    )
    more = b"" if version == 2 else struct.pack(">QQQII", 0, 0, 0, 4, 104)
    return fixed + more + extensions + bytes(8) + base


class ImageHeaderTarget(Target):
    """The head of an image: read without an error, and never one without a base when it may have one."""

    name = "image-header"
    permitted = ()
    bound = Bound(per_byte=100)
    tokens: ClassVar = (
        b"QFI\xfb", b"QED\0", b"KDMV", b"parentFileNameHint", b"json:", b'json:{"file":{"filename":"x"}}', b"file:",
        b"nbd://", b"\xe2\x79\x2a\xca", b"DATA", b"\0" * 8, b"\xff" * 8, b"../" * 100, b"[" * 900,
        b"\0\0\0\0\0\0\0\x04", b"json:" + b'{"a":' * 150,
    )  # fmt: skip

    def seeds(self) -> list[bytes]:
        format_ = struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2")
        data = struct.pack(">II8s", 0x44415441, 8, b"data.raw")
        named = b"json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "/a/b"}}).encode()
        with_data = bytearray(qcow2_head(b"base.img", extensions=data))
        with_data[79] = 4
        return [
            qcow2_head(b"base.img", version=2),
            qcow2_head(b"/a/base.qcow2", extensions=format_),
            qcow2_head(named),
            bytes(with_data),
        ]

    def call(self, data: bytes) -> object:
        found = read_header(data[:HEAD_BYTES])
        check_types(found)
        require(found.base != "", "an empty name")
        if data.startswith(b"QFI\xfb"):
            require(found.format == "qcow2", "a qcow2 image that is none")
        if data.startswith(b"QFI\xfb") and len(data) >= 24 and not found.problem:
            at, length = struct.unpack_from(">QI", data, 8)
            has_base = bool(at and length) and data[at : at + 1] != b"\0"
            require(has_base == (found.base is not None), "a base that is missed, or made up")
        if found.base is not None:
            require("\0" not in found.base and len(found.base) <= 1023, "a name that is none")
            try:
                names = local_names(found.base)
            except ValueError:
                return found
            require(all(isinstance(name, str) and name for name in names), "a path that is none")
        return found


class AssociatedTarget(Target):
    """What a restore point has of NVRAM and TPM state: names are plain, and nothing is larger than it may be."""

    name = "associated"
    permitted = (CorruptManifest,)
    bound = Bound(base_bytes=2 << 20, per_byte=1500, cpu_s=3.0)
    tokens: ClassVar = (
        b"..",
        b"/",
        b"//",
        b"\\u0000",
        b"\\ud800",
        b'"nvram"',
        b'"tpm"',
        b"-1",
        b"4095",
        b"eJwDAAAAAAE=",
    )

    def seeds(self) -> list[bytes]:
        nvram = AssociatedFile("nvram", "/var/lib/libvirt/qemu/nvram/vm_VARS.fd", 0o600, b"\xff" * 4096)
        tpm = AssociatedFile("tpm", "/var/lib/libvirt/swtpm/u/tpm2/tpm2-00.permall", 0o600, b"state")
        return [encode_associated(files).encode() for files in ([], [nvram], [nvram, tpm])]

    def call(self, data: bytes) -> object:
        found = decode_associated(data.decode("utf-8", "surrogateescape"), "manifests/x")
        for file in found:
            check_types(file)
            parts = file.name.split("/")
            require(
                len(parts) <= 2 and not {"", ".", ".."} & set(parts) and "\0" not in file.name, "a path that leads out"
            )
            require(len(file.data) <= FILE_BYTES_MAX, "more than it may be")
        require(len({file.name for file in found}) == len(found), "a name twice")
        return found

    def edit_json(self, data: bytes, edit: Edit) -> bytes | None:
        return edit(data)
