"""Changes that damage and malice make: of bytes, of length fields, of JSON.  Every choice comes from one seeded source.

Must not know any format: a target says where its JSON lies and how its checksums are made right again.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

SIZE_MAX = 256 * 1024
"""No input grows beyond this."""
GROWN_PLACES_MAX = 5_000
"""A JSON document of more values than this is not made longer: the limit of memory is for what reads the input."""

_WIDTHS = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
_DEPTHS = (10, 400, 1_500, 20_000)
_DIGITS = (19, 20, 400, 5_000)

_RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "-1", "1e-320", "0.5", "18446744073709551616")
_PLAIN_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, -(2**63), 2**64, [], {}, [[]], {"": None}, "",
    "\0", "\ud800", "\udc80", "\x1b[2J", "a" * 300, "é" * 200, "0" * 32, "0" * 64, "A" * 32, "0" * 31 + "\n",
)  # fmt: skip
_PATHS = (
    "..", ".", "/", "//", "../x", "../../../tmp/x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a\0b", "..\0",
    "x/" * 40 + "y", "a/" * 2_047 + "a", "\udcff", "C:\\x", "~", "-rf",
)  # fmt: skip


class Mutator:
    """Mutates inputs; ``tokens`` are pieces of the target's language that are put in as they are."""

    def __init__(self, chance: random.Random, tokens: Sequence[bytes] = ()) -> None:
        self._chance = chance
        self._tokens = tokens
        self._raw: dict[str, str] = {}
        self._may_grow = True

    def bytes_of(self, data: bytes, other: bytes | None) -> bytes:
        """``data`` after one to four changes; ``other`` is what pieces are taken from, None for none."""
        actions: list[Callable[[bytes], bytes]] = [
            self._flip, self._flip, self._length_field, self._length_field, self._cut, self._remove, self._repeat,
            self._overwrite, self._insert,
        ]  # fmt: skip
        if other is not None:
            actions += [lambda data: self._splice(data, other)] * 2
        if self._tokens:
            actions += [self._token] * 4
        for _ in range(self._chance.choice((1, 1, 1, 2, 3, 4))):
            data = self._chance.choice(actions)(data)
        return data[:SIZE_MAX]

    def json_of(self, text: bytes) -> bytes:
        """JSON text after one to three changes of its structure; of its bytes where it is no JSON, or too deep."""
        try:
            tree = json.loads(text)
            self._raw.clear()
            self._may_grow = True  # once: lists in lists would grow by fifty times fifty
            for _ in range(self._chance.choice((1, 1, 1, 2, 3))):
                tree = self._json_change(tree)
            made = json.dumps(tree, separators=(",", ":"))
        except (ValueError, RecursionError):
            return self.bytes_of(text, None)
        for mark, raw in self._raw.items():
            made = made.replace(json.dumps(mark), raw)
        return made.encode("ascii")

    # Bytes

    def _at(self, data: bytes) -> int:
        return self._chance.randrange(len(data)) if data else 0

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return data
        changed = bytearray(data)
        for _ in range(self._chance.choice((1, 1, 2, 8))):
            changed[self._at(data)] ^= 1 << self._chance.randrange(8)
        return bytes(changed)

    def _length_field(self, data: bytes) -> bytes:
        width = self._chance.choice((1, 2, 4, 4, 8))
        # Fields lie near both ends of what the formats call a header or a trailer.
        span = self._chance.choice((64, 256, len(data)))
        place = self._chance.randrange(max(1, min(span, len(data) - width + 1)))
        at = place if self._chance.random() < 0.6 else max(0, len(data) - width - place)
        if at + width > len(data):
            return data
        top = 1 << 8 * width
        (old,) = struct.unpack_from(_WIDTHS[width], data, at)
        value = self._chance.choice(
            (0, 1, top - 1, top >> 1, (top >> 1) - 1, old + 1, old - 1, old * 2, len(data), 60_000, 1 << 20, 1 << 28)
        )
        return data[:at] + struct.pack(_WIDTHS[width], value % top) + data[at + width :]

    def _cut(self, data: bytes) -> bytes:
        return data[: self._at(data)] if self._chance.random() < 0.7 else data[self._at(data) :]

    def _piece(self, data: bytes) -> tuple[int, int]:
        start = self._at(data)
        return start, min(len(data), start + self._chance.choice((1, 2, 8, 60, 64, 512, 4096)))

    def _remove(self, data: bytes) -> bytes:
        start, end = self._piece(data)
        return data[:start] + data[end:]

    def _repeat(self, data: bytes) -> bytes:
        start, end = self._piece(data)
        if start == end:
            return data
        count = self._chance.choice((1, 1, 2, 10, 300, 5_000))
        return data[:end] + data[start:end] * min(count, SIZE_MAX // (end - start)) + data[end:]

    def _overwrite(self, data: bytes) -> bytes:
        start, end = self._piece(data)
        fill = self._chance.choice((bytes(end - start), b"\xff" * (end - start), self._chance.randbytes(end - start)))
        return data[:start] + fill + data[end:]

    def _insert(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + self._chance.randbytes(self._chance.choice((1, 4, 60))) + data[at:]

    def _token(self, data: bytes) -> bytes:
        token = self._chance.choice(self._tokens)
        at = self._at(data)
        if self._chance.random() < 0.3:
            token *= self._chance.choice(_DEPTHS)
        end = at + self._chance.choice((0, 0, 1, len(token)))
        return (data[:at] + token + data[end:])[:SIZE_MAX]

    def _splice(self, data: bytes, other: bytes) -> bytes:
        if self._chance.random() < 0.5:
            return data[: self._at(data)] + other[self._at(other) :]
        start, end = self._piece(other)
        at = self._at(data)
        return data[:at] + other[start:end] + data[at + end - start :]

    # JSON

    def _json_change(self, tree: Any) -> Any:
        places = list(_places(tree))
        count = len(places)
        if not places:
            return self._value()
        if self._chance.random() < 0.5:  # each name as often as any other, however many objects have it
            name = self._chance.choice(sorted({key for _, key in places if isinstance(key, str)} or {""}))
            places = [place for place in places if place[1] == name] or places
        holder, key = self._chance.choice(places)
        old, is_own_kind = holder[key], self._chance.random() < 0.7
        if isinstance(old, str) and is_own_kind:
            holder[key] = self._text(old)
        elif isinstance(old, int) and is_own_kind:
            holder[key] = old + self._chance.choice((-1, 1, 4096, -(2**40), 2**40, 2**63))
        elif isinstance(old, list) and is_own_kind and self._may_grow and count <= GROWN_PLACES_MAX:
            holder[key] = old * self._chance.choice((2, 50))
            self._may_grow = False
        else:
            self._change_any(places, holder, key)
        return tree

    def _change_any(self, places: list[tuple[Any, Any]], holder: Any, key: Any) -> None:
        action = self._chance.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            name = self._chance.choice((self._text(key), self._text(key), "", "extra", "\udcff"))
            holder[name] = holder.pop(key) if self._chance.random() < 0.5 else holder[key]
        elif action == 1:
            holder.insert(key, holder[key])
        elif action == 2:
            other, other_key = self._chance.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            holder[key] = self._value()

    def _text(self, text: str) -> str:
        at = self._chance.randrange(len(text) + 1)
        head, tail = text[:at], text[at:]
        if self._chance.random() < 0.5:
            return self._chance.choice((*_PATHS, f"../{text}", f"/{text}", f"{head}/../../{tail}", f"{text}/.."))
        put_in = self._chance.choice(("/", "\0", "\ud8ff", "\udc80", "\n", "\x1b", "é", "\ud8ff"))
        return self._chance.choice((head + put_in + tail, text + put_in, head, text.upper(), text * 20, text[::-1]))

    def _value(self) -> Any:
        kind = self._chance.randrange(10)
        if kind < 5:
            return copy.deepcopy(self._chance.choice(_PLAIN_VALUES))  # a later change may be one of its inside
        if kind < 7:
            return self._chance.choice(_PATHS)
        if kind < 8:
            return self._marked(self._chance.choice(_RAW_VALUES))
        if kind < 9:
            opening, closing = self._chance.choice((("[", "]"), ('{"a":', "}")))
            depth = self._chance.choice(_DEPTHS)
            return self._marked(opening * depth + "1" + closing * depth)
        return self._marked("7" * self._chance.choice(_DIGITS))

    def _marked(self, raw: str) -> str:
        """A text that stands for JSON which ``json.dumps`` would not write."""
        mark = f"raw {len(self._raw)}"
        self._raw[mark] = raw
        return mark


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) below ``tree``."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys: Sequence[Any] = (
            list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        )
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found
