"""How small private structures are written on primary: magic, version, length, JSON body, checksum.

JSON, because an operator with nothing but getfattr or a hex viewer can still read it; a checksum over all of it,
because nothing that is damaged may be believed.  Used for the placeholder record and the residency maps' headers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import xxhash

_HEAD = struct.Struct("<8sHHI")
_DIGEST_SIZE = 16
BODY_SIZE_MAX = 64 * 1024


class Damaged(Exception):
    """The bytes are not an undamaged envelope; the caller says of what."""


class NewerVersion(Exception):
    """The envelope was written in a format that this program does not know."""


def seal(magic: bytes, version: int, body: Mapping[str, Any]) -> bytes:
    """The envelope around ``body`` (JSON values); ``magic`` is 8 bytes."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    head = _HEAD.pack(magic, version, 0, len(text)) + text
    return head + xxhash.xxh3_128_digest(head)


def unseal(raw: bytes, *, magic: bytes, version: int) -> dict[str, Any]:
    """The body of an envelope; bytes behind it are ignored.  Raises Damaged, NewerVersion."""
    if len(raw) < _HEAD.size:
        raise Damaged("too short")
    found, found_version, _, length = _HEAD.unpack_from(raw)
    end = _HEAD.size + length
    if found != magic or length > BODY_SIZE_MAX or len(raw) < end + _DIGEST_SIZE:
        raise Damaged("not of this kind, or cut short")
    if xxhash.xxh3_128_digest(raw[:end]) != raw[end : end + _DIGEST_SIZE]:
        raise Damaged("its checksum does not match")
    if found_version != version:
        raise NewerVersion(f"format version {found_version}, this program knows {version}")
    try:
        body = json.loads(raw[_HEAD.size : end])
    except ValueError as exc:
        raise Damaged("its body cannot be parsed") from exc
    if not isinstance(body, dict):
        raise Damaged("its body is of another kind")
    return body
