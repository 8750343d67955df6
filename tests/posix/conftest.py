"""One datastore with the real daemon for all tests of a module, and a directory of the same filesystem beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from plain_comparison import Scenario

from tests.e2e.live_datastore import QUIET, LiveDatastore, remove_base


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


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    base = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    base.chmod(0o755)  # other users may enter
    datastore = LiveDatastore(base)
    try:
        datastore.init(QUIET)
        datastore.start()
        made = Places(datastore.mountpoint / "vm", base / "plain", datastore)
        made.mounted.mkdir()
        made.plain.mkdir()
        yield made
        made.assert_no_bugs()
    finally:
        datastore.tear_down()
        remove_base(base)
