"""The real daemon killed a few times under use; ``scripts/soak kills`` does it hundreds of times.

The soak is itself put to the test: a daemon that is wrong only after a kill must be found out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faulty_daemon import KILL_FAULTS

from scripts.lab import kill_end
from scripts.lab.datastore import datastore_in
from scripts.lab.failure import LabError
from scripts.lab.soak_kills import SETTINGS, Kills

DAEMON = Path(__file__).with_name("faulty_daemon.py")
KILLS = 7
SEED = 1


def test_a_few_kills(base: Path) -> None:
    with datastore_in(base, SETTINGS) as datastore, Kills(datastore, SEED) as running:
        said = running.run(KILLS)
    print(said)
    assert running.kills >= KILLS
    found = re.search(r"(\d+) operations .*, (\d+) reads beside them", said)
    assert found is not None
    assert min(int(found[1]), int(found[2])) > 100, said
    assert "disks compared whole" in said


FOUND = {
    "bits_die_with_the_daemon": (1, 20, "WRONG BYTES|acknowledged are not there"),
    "start_leaves_lone_maps": (4677, 5, r"left behind: .*\.map"),
    "start_leaves_orphans": (26160, 8, "left behind: .*/orphans/"),
}
"""For each fault a seed most of whose first kills come where it shows, how many of them, and what is said of it."""


@pytest.mark.parametrize("fault", KILL_FAULTS)
def test_a_faulty_daemon_is_found_out(base: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_end, "SETTLE_DEADLINE_S", 3.0)
    seed, kills_max, wanted = FOUND[fault]
    with (
        datastore_in(base, SETTINGS) as datastore,
        Kills(datastore, seed, program=(DAEMON, fault)) as running,
        pytest.raises(LabError) as found,
    ):
        running.run(kills_max)
    said = str(found.value)
    print(said)
    where, what = said.splitlines()[:2]
    assert re.search(wanted, what), f"{where} {what}"
    assert f"kills, seed {seed}, life " in where
    assert "the last operations:" in said
    assert sorted(path.name for path in (base / "memory").iterdir()) == ["four", "one", "three", "two"]
