"""Every key and value of a TOML text is found where it was written, however it was written."""

from __future__ import annotations

import time
import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmfs_stub.core import toml_places
from vmfs_stub.core.toml_places import Part, Place, TomlPlaces

Path = tuple[Part, ...]

SCALARS = (
    "1", "-0x1F", "1.5e3", "true", "nan", "1979-05-27T07:32:00Z", "1979-05-27 07:32:00", "07:32:00", '""', "''",
    '"a # ]"', "'}, \\'", '"\\" = \\\\"', '"""\nx = 1 # "" \\""" ] """', "'''\n[t]\n'' '''", '"""""a"""""',
)  # fmt: skip
KEYS = ("a", "b-1", "7", '"a.b"', "'c d'", '"\\u0041\\"]"', '"é"', '""', "true", "'#'")
BLANKS = ("", " ", "\t ", "  ")
BREAKS = ("", " ", "\n", '  # ] } "\n', "\n\n\t")


@dataclass
class Writer:
    """A document that grows, and where what stands in it."""

    draw: st.DrawFn
    text: str = ""
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)

    def place(self) -> Place:
        return Place(self.text.count("\n") + 1, len(self.text) - self.text.rfind("\n"))

    def put(self, text: str) -> None:
        self.text += text

    def any_of(self, *choices: str) -> None:
        self.put(self.draw(st.sampled_from(choices)))

    def key(self, path: Path, count: int) -> Path:
        """A key of several parts, none of which is there below ``path``; returns the whole path."""
        for number in range(count):
            written = self.draw(st.sampled_from(KEYS))
            (name,) = tomllib.loads(f"{written} = 0")
            if number == 0:
                while (*path, name) in self.keys:
                    name += "x"
                    written = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
            else:
                self.put(".")
                self.any_of(*BLANKS)
            path = (*path, name)
            self.keys.setdefault(path, self.place())
            self.put(written)
            self.any_of(*BLANKS)
        return path

    def pair(self, path: Path, depth: int) -> None:
        whole = self.key(path, self.draw(st.integers(1, 2)))
        self.put("=")
        self.any_of(*BLANKS)
        self.value(whole, depth)

    def value(self, path: Path, depth: int) -> None:
        self.values[path] = self.place()
        kind = self.draw(st.sampled_from(("scalar", "scalar", "array", "table")) if depth else st.just("scalar"))
        if kind == "scalar":
            self.any_of(*SCALARS)
        elif kind == "array":
            self.put("[")
            count = self.draw(st.integers(0, 3))
            for number in range(count):
                self.any_of(*BREAKS)
                self.value((*path, number), depth - 1)
                self.any_of(*BREAKS)
                if number < count - 1:
                    self.put(",")
            self.any_of(*BREAKS, *([","] if count else []))
            self.put("]")
        else:
            self.put("{")
            count = self.draw(st.integers(0, 3))
            for number in range(count):
                self.any_of(*BLANKS)
                self.pair(path, depth - 1)
                self.any_of(*BLANKS)
                if number < count - 1:
                    self.put(",")
            self.put("}")

    def pairs(self, path: Path) -> None:
        for _ in range(self.draw(st.integers(0, 3))):
            self.any_of("", "\n", "# [x]\n", "  ")
            self.pair(path, 3)
            self.any_of("\n", " # c = 1\n", "\t\n")


@st.composite
def documents(draw: st.DrawFn) -> Writer:
    writer = Writer(draw)
    writer.pairs(())
    arrays: dict[Path, int] = {}
    for _ in range(draw(st.integers(0, 4))):
        writer.any_of("", "  ", "\n# ]\n")
        begin = writer.place()
        if arrays and draw(st.booleans()):
            path = draw(st.sampled_from(sorted(arrays, key=repr)))
            writer.put("[[ " + ".".join(f'"{part}"' for part in path) + "]]\n")
        elif draw(st.booleans()):
            writer.put("[[")
            path = writer.key((), 1)
            writer.put("]] # c\n")
            arrays[path] = 0
        else:
            writer.put("[")
            path = writer.key((), draw(st.integers(1, 2)))
            writer.put("]\n")
            writer.pairs(path)
            continue
        element = (*path, arrays[path])
        writer.values[element] = begin
        arrays[path] += 1
        writer.pairs(element)
    return writer


@settings(max_examples=300, deadline=None)
@given(documents())
def test_everything_is_found_where_it_was_written(writer: Writer) -> None:
    try:
        document = tomllib.loads(writer.text)
    except tomllib.TOMLDecodeError:
        return  # two dotted keys that begin alike
    places = TomlPlaces(writer.text)
    for path, place in writer.keys.items():
        assert places.of(path) == place, (path, writer.text)
    for path, place in writer.values.items():
        assert places.of(path, value=True) == place, (path, writer.text)
    for path in paths_of(document):
        assert path in writer.keys or path in writer.values, (path, writer.text)
        assert places.of((*path, "not there")) == places.of(path)


def paths_of(value: Any, path: Path = ()) -> list[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for part, below in items for each in [(*path, part), *paths_of(below, (*path, part))]]


def test_most_documents_are_valid() -> None:
    """Or the test above would say little."""
    counts = {True: 0, False: 0}

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(documents())
    def count(writer: Writer) -> None:
        try:
            tomllib.loads(writer.text)
            counts[True] += len(writer.values) > 3
        except tomllib.TOMLDecodeError:
            counts[False] += 1

    count()
    assert counts[True] > counts[False]


def test_nothing_is_found_of_what_is_not_there() -> None:
    places = TomlPlaces("a = 1\r\n")
    assert places.of(()) is None
    assert places.of(("b", "c")) is None
    assert places.of(("a", 0, "x"), value=True) == Place(1, 1)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.='\"[]{}#,\n \\1-", max_size=40))
@example('"\\1"')
def test_what_is_no_toml_does_no_harm(text: str) -> None:
    TomlPlaces(text).of(("a",))


@pytest.mark.parametrize(
    "text",
    [
        "x" + ".y" * 100_000 + " = 1",
        "x = " + "[" * 100_000,
        'x = """' + '""' * 100_000,
        "x = [" + "1," * 100_000 + "]",
        "[[x]]\n" * 40_000,
        "#\n" * 120_000,
    ],
)
def test_it_takes_no_long_time(text: str) -> None:
    started_s = time.process_time()
    TomlPlaces(text)
    assert time.process_time() - started_s < 2


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the newest element of an array of tables, all would be of the first."""
    monkeypatch.setattr(toml_places._Node, "newest", property(lambda node: node.below.get(0, node)))
    text = "[[a]]\n[[a]]\n[a.b]\nc = 1\n"
    assert TomlPlaces(text).of(("a", 1, "b", "c")) != Place(4, 1)
