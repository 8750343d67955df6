"""The examples in docs/SEMANTICS.md are true."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_mount import PlainMount

PAGE = Path(__file__).parents[2] / "docs" / "SEMANTICS.md"


def examples(text: str) -> Iterator[list[tuple[str, str]]]:
    """The commands of each console block, each with what it prints."""
    for block in text.split("```console\n")[1:]:
        commands: list[tuple[str, str]] = []
        for line in block.partition("```")[0].splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], ""))
            else:
                command, output = commands[-1]
                commands[-1] = (command, f"{output}{line}\n")
        yield commands


def printed(command: str, directory: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        ["sh", "-c", command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    ).stdout


BLOCKS = list(examples(PAGE.read_text()))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples(mounted: PlainMount, number: int) -> None:
    top = mounted.mountpoint / f"examples{number}"
    top.mkdir()
    for command, output in BLOCKS[number]:
        assert printed(command, top) == output, command


def test_a_wrong_example_would_be_noticed(mounted: PlainMount) -> None:
    ((command, output),) = next(examples("```console\n$ echo a\nb\n```\n"))
    assert printed(command, mounted.mountpoint) != output
