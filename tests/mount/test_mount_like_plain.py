"""Each operation through the mount does what it does in a plain directory."""

from __future__ import annotations

import pytest
from plain_mount import PlainMount
from plain_scenarios import SCENARIOS, directories


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_in_a_plain_directory(mounted: PlainMount, name: str) -> None:
    results = []
    for place in (mounted.mountpoint, mounted.plain):
        top = place / name
        top.mkdir()
        top.chmod(0o755)
        results.append(SCENARIOS[name](top))
    assert results[0] == results[1]
    assert mounted.command("bugs") == {}


def test_the_comparison_notices_a_difference(mounted: PlainMount) -> None:
    top = mounted.mountpoint / "differs"
    top.mkdir()
    before = directories(top)
    (top / "more").mkdir()
    assert directories(top) != before
