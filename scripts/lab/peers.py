"""Public backup tools as the bench uses them: restic and borg, each with a local repository in a directory of its own.

No encryption where there is a choice (restic always encrypts), and what else of them is chosen is in ``settings``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.lab.datastore import COMMAND_DEADLINE_S
from scripts.lab.failure import run

_REPOSITORY: Final = "repository"


@dataclass(frozen=True, slots=True)
class Peer:
    """One tool with its settings; its commands are words for which ``{point}``, ``{source}`` are filled in."""

    name: str
    settings: str
    init: Sequence[str]
    back_up: Sequence[str]
    restore: Sequence[str]
    version: Sequence[str]


def _restic(name: str, compression: str) -> Peer:
    words = ["restic", "--quiet", "--compression", compression]
    return Peer(
        name,
        f"restic, --compression {compression}, encrypted as always",
        [*words, "init", "--repository-version", "2"],
        [*words, "backup", "--tag", "{point}", "{source}"],
        [*words, "restore", "latest", "--target", "."],
        ["restic", "version"],
    )


PEERS: Final = (
    _restic("restic", "auto"),
    _restic("restic-off", "off"),
    Peer(
        "borg",
        "borg, lz4, not encrypted",
        ["borg", "init", "--encryption", "none"],
        ["borg", "create", "--compression", "lz4", "::{point}", "{source}"],
        ["borg", "extract", "--sparse", "::{point}"],
        ["borg", "--version"],
    ),
)


class Repository:
    """A repository of a peer in ``home``, a new directory; all that the peer keeps lies in there."""

    def __init__(self, peer: Peer, home: Path) -> None:
        self._peer = peer
        self._home = home
        self._point = ""
        self._points = 0
        home.mkdir()
        self._run(peer.init)

    def back_up(self, source: Path) -> None:
        """Make a restore point of a file; durable on return."""
        self._points += 1
        self._point = f"point{self._points}"
        self._run(self._peer.back_up, source)
        run(["sync", "--file-system", self._home], deadline_s=COMMAND_DEADLINE_S)

    def restore(self, target: Path) -> None:
        """Write the last restore point out into a directory; durable on return."""
        self._run(self._peer.restore, cwd=target)
        run(["sync", "--file-system", target], deadline_s=COMMAND_DEADLINE_S)

    def warm(self) -> None:
        """Have the program itself in the page cache."""
        self._run(self._peer.version)

    def _run(self, words: Sequence[str], source: Path | None = None, *, cwd: Path | None = None) -> None:
        command = [word.format(point=self._point, source=source) for word in words]
        run(command, deadline_s=COMMAND_DEADLINE_S, env=os.environ | self._environment(), cwd=cwd)

    def _environment(self) -> Mapping[str, str]:
        where = str(self._home / _REPOSITORY)
        return {
            "RESTIC_REPOSITORY": where,
            "RESTIC_PASSWORD": "of the bench",
            "RESTIC_CACHE_DIR": str(self._home / "cache"),
            "BORG_REPO": where,
            "BORG_BASE_DIR": str(self._home),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
