"""Two directories to compare: one of a mount, and one of the filesystem that the mount stands on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plain_comparison import Scenario

from tests.e2e.live_datastore import LiveDatastore


@dataclass(frozen=True, slots=True)
class Places:
    """``mounted`` is a directory of the mount, ``plain`` one of the filesystem that the mount stands on."""

    mounted: Path
    plain: Path
    datastore: LiveDatastore

    def results(self, name: str, scenario: Scenario) -> tuple[object, object]:
        """What a scenario sees in a fresh directory of the mount, and in a plain one."""
        found = []
        for place in (self.mounted, self.plain):
            top = place / name
            top.mkdir()
            top.chmod(0o755)
            found.append(scenario(top))
        return found[0], found[1]

    def assert_no_bugs(self) -> None:
        """The daemon answered nothing because of a programming error."""
        assert "programming error" not in self.datastore.log()
