"""`scripts/soak fuzz`: says what it did, saves what it found, and runs that again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PLANTED = """
from tests.fuzz import targets_primary
from scripts.lab import soak
real = targets_primary.read_top_mode
targets_primary.read_top_mode = lambda fd: real(fd) if real(fd) != 0o755 else {}["planted"]
targets_primary.TopModeTarget.seeds = lambda self: [b"700", b"7755", b"1"]
soak.main()
"""


def run(*arguments: str, program: str = "from scripts.lab import soak; soak.main()", tmp: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={"TMPDIR": str(tmp), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_target_without_a_fault(tmp_path: Path) -> None:
    code, said = run("fuzz", "--target", "top-mode", "--seed", "3", "--minutes", "0.01", tmp=tmp_path)
    assert code == 0, said
    assert re.search(r"top-mode +[1-9][0-9]* inputs, +[1-9][0-9]*/s, .* 0 findings", said)


def test_a_finding_is_saved_and_comes_again(tmp_path: Path) -> None:
    code, said = run("fuzz", "--target", "top-mode", "--seed", "3", "--minutes", "0.03", program=PLANTED, tmp=tmp_path)
    assert code == 1, said
    assert "KeyError" in said
    found = re.search(r"again: scripts/soak (fuzz .*)", said)
    assert found is not None
    again = found[1].split()
    assert Path(again[-1]).read_bytes()
    code, said = run(*again, program=PLANTED, tmp=tmp_path)
    assert code == 1
    assert "KeyError: 'planted'" in said
    code, said = run(*again, tmp=tmp_path)
    assert code == 0
    assert "no rule is broken" in said


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    code, said = run("fuzz", "--target", "nothing", "--minutes", "0.01", tmp=tmp_path)
    assert code == 2
    assert "invalid choice: 'nothing'" in said
    code, said = run("fuzz", "--replay", "nowhere", tmp=tmp_path)
    assert code == 1
    assert "name the one --target" in said
    code, said = run("churn", "--target", "pin", tmp=tmp_path)
    assert code == 2
    assert "--target" in said
