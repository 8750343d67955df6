"""How small private structures are written on primary: magic, version, length, JSON body, checksum.

JSON, because an operator with nothing but getfattr or a hex viewer can still read it; a checksum over all of it,
because nothing that is damaged may be believed.  Used for the placeholder record and the residency maps' headers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import xxhash

_HEAD = struct.Struct("<8sHHI")
_DIGEST_SIZE = 16
BODY_SIZE_MAX = 64 * 1024
INT64_MAX = 2**63 - 1
UINT64_MAX = 2**64 - 1
TIME_NS_MIN = -(2**63)
FILE_TIME_NS_END = 2**63 * 1_000_000_000
"""Times of files have 64 bits of seconds."""
_TEXT_MAX = 255
_ID = re.compile(r"[0-9a-f]{32}")


class Damaged(Exception):
    """The bytes are not an undamaged envelope; the caller says of what."""


class NewerVersion(Exception):
    """The envelope was written in a format that this program does not know."""


def seal(magic: bytes, version: int, body: Mapping[str, Any]) -> bytes:
    """The envelope around ``body`` (JSON values); ``magic`` is 8 bytes."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    head = _HEAD.pack(magic, version, 0, len(text)) + text
    return head + xxhash.xxh3_128_digest(head)


def unseal(raw: bytes, *, magic: bytes, version: int) -> dict[str, object]:
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
        body = json.loads(raw[_HEAD.size : end].decode())
    except (ValueError, RecursionError) as exc:
        raise Damaged("its body cannot be parsed") from exc
    if not isinstance(body, dict):
        raise Damaged("its body is of another kind")
    return body


def sealed_size(raw: bytes) -> int:
    """How many bytes the envelope takes that ``raw`` begins with; `unseal` has found it undamaged."""
    length: int = _HEAD.unpack_from(raw)[3]
    return _HEAD.size + length + _DIGEST_SIZE


class Body:
    """Typed access to a parsed body: each field is taken once, and all of them must be.

    A checksum proves that the bytes are those that were written, not who wrote them: types and bounds are checked all
    the same, since ids become names of files.  Every method raises Damaged.
    """

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise Damaged("its body is of another kind")
        self._left: dict[str, object] = dict(values)

    def text(self, name: str) -> str:
        """A string of at most 255 characters."""
        value = self._taken(name)
        if not isinstance(value, str) or len(value) > _TEXT_MAX:
            raise Damaged(f"{name} is not a text")
        return value

    def identifier(self, name: str) -> str:
        """An id of 32 lower-case hex digits."""
        value = self._taken(name)
        if not isinstance(value, str) or _ID.fullmatch(value) is None:
            raise Damaged(f"{name} is not an id")
        return value

    def identifier_or_none(self, name: str) -> str | None:
        """An id, or None when null."""
        if self._left.get(name, "") is None:
            del self._left[name]
            return None
        return self.identifier(name)

    def integer(self, name: str, *, low: int = 0, high: int = INT64_MAX) -> int:
        """An integer from ``low`` to ``high``, both included."""
        value = self._taken(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Damaged(f"{name} is not an integer from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._taken(name)
        if not isinstance(value, bool):
            raise Damaged(f"{name} is not true or false")
        return value

    def body(self, name: str) -> Body:
        """An object within, to be finished by itself."""
        return Body(self._taken(name))

    def body_or_none(self, name: str) -> Body | None:
        """An object within, or None when null."""
        value = self._taken(name)
        return None if value is None else Body(value)

    def finish(self) -> None:
        """Refuse what was not taken."""
        if self._left:
            raise Damaged(f"{min(self._left)!r} is not a field of it")

    def _taken(self, name: str) -> object:
        if name not in self._left:
            raise Damaged(f"{name} is missing")
        return self._left.pop(name)
