"""Where in a TOML text each key and value stands, so that an error can name line and column.

The standard library's parser tells of values only.  This reads a text that it has accepted, and so decides nothing of
what is valid: of another text it may say anything, but ends.  Linear in the size of the text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

Part = int | str
"""A key, or the number of an array's element."""

_SKIPPED: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK: Final = re.compile(r"[ \t]*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRINGS: Final = (
    re.compile(r'"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*"{3,5}'),
    re.compile(r"'''(?:[^']|'{1,2}(?!'))*'{3,5}"),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)
_SCALAR: Final = re.compile(r"[^,\]}#\r\n]*[^,\]}#\s]")


@dataclass(frozen=True, slots=True)
class Place:
    """Line and column, both from 1; a column counts characters."""

    line: int
    column: int


@dataclass(slots=True)
class _Node:
    """A key with its value, or an element of an array; offsets are characters of the text, None for what is implied."""

    key: int | None = None
    value: int | None = None
    below: dict[Part, _Node] = field(default_factory=dict)

    def at(self, part: Part) -> _Node:
        return self.below.setdefault(part, _Node())

    @property
    def newest(self) -> _Node:
        """The table that keys are put into: of an array of tables the last."""
        return self.below[len(self.below) - 1] if 0 in self.below else self


class TomlPlaces:
    """Places of everything in ``text``, which is valid TOML."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._root = _Node()
        with suppress(_Unexpected, RecursionError):  # what was found until then is better than nothing
            self._read()

    def of(self, path: Sequence[Part], *, value: bool = False) -> Place | None:
        """Where the last of ``path`` that is written down stands: its key, or its ``value``.

        A table's value is where it is first named.  None when nothing of the path is written down.
        """
        node, found = self._root, None
        for number, part in enumerate(path, start=1):
            below = node.below.get(part)
            if below is None:
                break
            node = below
            first, second = node.key, node.value
            if value and number == len(path):
                first, second = second, first
            found = next((offset for offset in (first, second) if offset is not None), found)
        return None if found is None else self._place(found)

    def _place(self, offset: int) -> Place:
        before = self._text.rfind("\n", 0, offset) + 1
        return Place(self._text.count("\n", 0, before) + 1, offset - before + 1)

    # Reading

    def _read(self) -> None:
        table = self._root
        self._skip(_SKIPPED)
        while self._at < len(self._text):
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)
            self._skip(_SKIPPED)

    def _header(self) -> _Node:
        """Read ``[a.b]`` or ``[[a.b]]``; returns the table that it begins."""
        is_array = self._text.startswith("[[", self._at)
        begin = self._at
        self._at += 2 if is_array else 1
        node = self._root
        parts = self._key()
        for part, offset in parts[:-1]:
            node = _named(node.at(part), offset).newest
        part, offset = parts[-1]
        node = _named(node.at(part), offset)
        if is_array:
            node = node.at(len(node.below))
            node.value = begin
        self._expect("]]" if is_array else "]")
        return node

    def _pair(self, table: _Node) -> None:
        """Read ``key = value`` into a table."""
        node = table
        for part, offset in self._key():
            node = _named(node.at(part), offset)
        self._expect("=")
        self._skip(_BLANK)
        self._value(node)

    def _key(self) -> list[tuple[str, int]]:
        """Read a key: its parts, and where each stands."""
        parts = []
        while True:
            self._skip(_BLANK)
            begin = self._at
            if self._text.startswith(('"', "'"), begin):
                parts.append((_unquoted(self._string()), begin))
            elif (match := _BARE_KEY.match(self._text, begin)) is not None:
                self._at = match.end()
                parts.append((match[0], begin))
            else:
                raise _Unexpected
            self._skip(_BLANK)
            if not self._text.startswith(".", self._at):
                return parts
            self._at += 1

    def _value(self, node: _Node) -> None:
        node.value = self._at
        first = self._text[self._at : self._at + 1]
        if first in ('"', "'"):
            self._string()
        elif first == "[":
            self._elements(node)
        elif first == "{":
            self._inline_table(node)
        elif (match := _SCALAR.match(self._text, self._at)) is not None:
            self._at = match.end()
        else:
            raise _Unexpected

    def _elements(self, node: _Node) -> None:
        self._at += 1
        number = 0
        while True:
            self._skip(_SKIPPED)
            if self._text.startswith("]", self._at):
                self._at += 1
                return
            self._value(node.at(number))
            number += 1
            self._skip(_SKIPPED)
            if self._text.startswith(",", self._at):
                self._at += 1

    def _inline_table(self, node: _Node) -> None:
        self._at += 1
        while True:
            self._skip(_SKIPPED)
            if self._text.startswith("}", self._at):
                self._at += 1
                return
            self._pair(node)
            self._skip(_SKIPPED)
            if self._text.startswith(",", self._at):
                self._at += 1

    def _string(self) -> str:
        for pattern in _STRINGS:
            match = pattern.match(self._text, self._at)
            if match is not None:
                self._at = match.end()
                return match[0]
        raise _Unexpected

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _expect(self, text: str) -> None:
        self._skip(_BLANK)
        if not self._text.startswith(text, self._at):
            raise _Unexpected
        self._at += len(text)


class _Unexpected(Exception):
    """This is no TOML, or more of it than is known here."""


def _named(node: _Node, offset: int) -> _Node:
    if node.key is None:
        node.key = offset
    return node


def _unquoted(text: str) -> str:
    """The key that is written as the string ``text``."""
    if "\\" not in text:
        return text[1:-1]
    try:
        (key,) = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        raise _Unexpected from None
    return key
