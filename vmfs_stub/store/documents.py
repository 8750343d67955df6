"""Checked documents: the JSON objects of a store (manifests, pins, claims, lists, marks that say more, …).

A document is two lines of JSON: the canonical body, then ``{"blake3": <digest of the first line>}``.  So any JSON
tool reads it, and every flipped bit is found.  The body always has ``format``, ``version`` and ``required``.

Everything read is hostile until proven otherwise: types and bounds are checked field by field, and each failure names
the object.  This module must not know what the documents are about.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from vmfs_stub.core.errors import IntegrityError, UnknownFormat
from vmfs_stub.store.keys import damage, is_id

Json = Mapping[str, object]
INT64_MAX = 2**63 - 1


def encode(document_format: str, version: int, body: Json) -> bytes:
    """The bytes of a document; equal bodies give equal bytes."""
    line = json.dumps(
        {"format": document_format, "version": version, "required": [], **body},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    ).encode("ascii")
    return line + b'\n{"blake3":"' + blake3(line).hexdigest().encode("ascii") + b'"}\n'


def decode(
    data: bytes, key: str, document_format: str, *, version: int, features: frozenset[str] = frozenset()
) -> Fields:
    """Parse a document that was read from ``key``.

    ``version`` is the newest that is known; older ones are for the caller to tell apart.  Raises: the integrity error
    of that key when it is damaged; UnknownFormat when it is whole but of another kind, of a newer version, or needs a
    feature that is not in ``features``.
    """
    fields = Fields(_body(data, key), key)
    if fields.text("format") != document_format:
        msg = f"{key}: is not a {document_format!r} document"
        raise UnknownFormat(msg)
    found = fields.integer("version")
    unknown = sorted(set(fields.texts("required")) - features)
    if not 1 <= found <= version or unknown:
        needs = f"version {found}" + (f" with {', '.join(unknown)}" if unknown else "")
        msg = f"{key}: {document_format} {needs} is not known to this version; use a newer vmfs-stub"
        raise UnknownFormat(msg)
    return fields


def _body(data: bytes, key: str) -> Json:
    line, _, rest = data.partition(b"\n")
    if rest != b'{"blake3":"' + blake3(line).hexdigest().encode("ascii") + b'"}\n':
        msg = f"{key}: checksum does not match: the object is damaged or cut short"
        raise damage(key)(msg)
    try:
        body = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        msg = f"{key}: is not valid JSON"
        raise damage(key)(msg) from exc
    if not isinstance(body, dict):
        msg = f"{key}: is not a JSON object"
        raise damage(key)(msg)
    return body


def _no_constant(name: str) -> object:
    raise ValueError(name)


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to a parsed JSON object; every getter raises the integrity error of ``key``."""

    values: Json
    key: str

    def error(self, name: str, problem: str) -> IntegrityError:
        """The error for a bad field, to be raised by the caller."""
        return damage(self.key)(f"{self.key}: field {name!r} {problem}")

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.error(name, "is not a text")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A string, or None when absent or null."""
        return None if self.values.get(name) is None else self.text(name)

    def hex_id(self, name: str) -> str:
        """An id of 32 hex digits."""
        value = self.text(name)
        if not is_id(value):
            raise self.error(name, "is not an id")
        return value

    def integer(self, name: str, *, low: int = 0, high: int = INT64_MAX) -> int:
        """An integer from ``low`` to ``high``, both included."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"is not an integer from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """A finite number that is not negative."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
            raise self.error(name, "is not a number")
        return float(value)

    def texts(self, name: str) -> list[str]:
        """A list of strings; absent is empty."""
        texts: list[str] = []
        for value in self._list(name):
            if not isinstance(value, str):
                raise self.error(name, "holds something that is not a text")
            texts.append(value)
        return texts

    def integers(self, name: str, *, low: int = 0, high: int = INT64_MAX) -> list[int]:
        """A list of integers from ``low`` to ``high``, both included; absent is empty."""
        integers: list[int] = []
        for value in self._list(name):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise self.error(name, f"holds something that is not an integer from {low} to {high}")
            integers.append(value)
        return integers

    def texts_or_none(self, name: str) -> list[str | None]:
        """A list of strings and nulls; absent is empty."""
        texts: list[str | None] = []
        for value in self._list(name):
            if value is not None and not isinstance(value, str):
                raise self.error(name, "holds something that is neither a text nor null")
            texts.append(value)
        return texts

    def objects(self, name: str) -> list[Fields]:
        """A list of JSON objects; absent is empty."""
        found: list[Fields] = []
        for value in self._list(name):
            if not isinstance(value, dict):
                raise self.error(name, "holds something that is not an object")
            found.append(Fields(value, self.key))
        return found

    def object_or_none(self, name: str) -> Fields | None:
        """A JSON object, or None when absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "is not an object")
        return None if value is None else Fields(value, self.key)

    def mapping(self, name: str) -> dict[str, str]:
        """An object whose values are strings; absent is empty."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "is not an object")
        for item in value.values():
            if not isinstance(item, str):
                raise self.error(name, "holds something that is not a text")
        return dict(value)

    def binary_mapping(self, name: str) -> dict[str, bytes]:
        """An object whose values are base64; absent is empty."""
        try:
            return {key: base64.b64decode(text, validate=True) for key, text in self.mapping(name).items()}
        except (binascii.Error, ValueError) as exc:
            raise self.error(name, "holds something that is not base64") from exc

    def binary(self, name: str, *, size: int) -> bytes:
        """Bytes in base64, of just that size."""
        try:
            value = base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError) as exc:
            raise self.error(name, "is not base64") from exc
        if len(value) != size:
            raise self.error(name, f"does not have {size} bytes")
        return value

    def _list(self, name: str) -> list[object]:
        value = self.values.get(name, [])
        if not isinstance(value, list):
            raise self.error(name, "is not a list")
        return value
