"""`scripts/soak sites`: says how many calls went wrong, and names the one after which a VM was not whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SOAK = """
from dataclasses import replace
from scripts.lab import soak, soak_sites
from tests.fault.site_faults import BY_NAME
soak_sites.SCENARIOS = [replace(BY_NAME["archive_again"], again=False)]
"""
PLANTED = """
from vmfs_stub.primary import placeholder
placeholder._end_replaced = lambda *args, **kwargs: None
soak_sites.spoilings = lambda calls, every: [soak_sites.Spoiling("archive.record_sync", 1, "error")]
"""
MAIN = """
soak.main()
"""


def run(program: str, *arguments: str, tmp: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", program, "sites", "--seed", "3", *arguments],
        cwd=ROOT,
        env={"TMPDIR": str(tmp), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_few_calls_go_wrong(tmp_path: Path) -> None:
    code, said = run(SOAK + MAIN, "--operations", "5", tmp=tmp_path)
    assert code == 0, said
    assert "5 of " in said
    assert "the VM was whole after each" in said
    assert list(tmp_path.iterdir()) == []


def test_the_parts_are_all_of_it(tmp_path: Path) -> None:
    said = [run(SOAK + MAIN, "--operations", "1", "--part", part, tmp=tmp_path)[1] for part in ("1/1", "1/2", "2/2")]
    whole, *halves = (int(found[1]) for found in map(re.compile(r"1 of (\d+) calls").search, said) if found)
    assert len(halves) == 2
    assert sum(halves) == whole > 0


def test_what_is_planted_is_found_and_named(tmp_path: Path) -> None:
    code, said = run(SOAK + PLANTED + MAIN, tmp=tmp_path)
    assert code == 1, said
    assert "soak sites, seed 3, step 0" in said
    assert "archive_again archive.record_sync:1:error" in said
    assert "NotWhole" in said
