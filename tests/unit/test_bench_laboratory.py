"""The laboratory's own parts: settings in a configuration, sizes, clean directories, soaks that name their failure."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from scripts.lab import soak_seeds
from scripts.lab.datastore import allocated_bytes, pss_bytes, with_settings, working_directory
from scripts.lab.failure import LabError, run
from scripts.lab.soak_steps import run_steps

CONFIG = """\
# a comment
[first]
# key = 1
key = 2
[second]
other = "x"
"""


def test_settings_replace_what_is_there_and_add_what_is_not() -> None:
    changed = with_settings(CONFIG, {"first": {"key": 3, "new": False}, "second": {"key": "y"}, "third": {"z": 1.5}})
    assert tomllib.loads(changed) == {
        "first": {"key": 3, "new": False},
        "second": {"other": "x", "key": "y"},
        "third": {"z": 1.5},
    }
    assert "# a comment\n" in changed


def test_occupied_bytes_do_not_count_holes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"x" * 65536)
        file.flush()
        os.fsync(file.fileno())
    assert 65536 <= allocated_bytes(tmp_path / "sparse") <= allocated_bytes(tmp_path) < 1 << 20


def test_memory_of_a_process_is_known() -> None:
    assert 1 << 20 < pss_bytes(os.getpid()) < 4 << 30


def test_a_working_directory_is_gone_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(LabError), working_directory(tmp_path) as home:
        (home / "file").write_text("x")
        raise LabError("planted")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_command_says_what_it_printed() -> None:
    with pytest.raises(LabError, match=r"exit code 3:\nthe reason"):
        run(["sh", "-c", "echo the reason >&2; exit 3"], deadline_s=10)
    with pytest.raises(LabError, match="not done after"):
        run(["sleep", "60"], deadline_s=0.05)
    with pytest.raises(LabError, match="not installed"):
        run(["no-such-program"], deadline_s=10)


def test_a_soak_names_the_seed_and_step_that_failed() -> None:
    taken: list[str] = []

    def step() -> str:
        if len(taken) == 2:
            raise LabError("WRONG BYTES")
        taken.append("read")
        return "read"

    with pytest.raises(LabError, match=r"seed 7, step 2 \(after 'read'\): WRONG BYTES"):
        run_steps("planted", step, seed=7, duration_s=60)


def test_the_model_s_soak_names_the_seeds_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        soak_seeds, "_played", lambda _, seeds: ((seed, "torn" if seed == 12 else "") for seed in seeds)
    )
    with pytest.raises(LabError, match="1 of 3 seeds show something wrong: 12"):
        soak_seeds.play_seeds("model", print, 11, 3, say=said.append)
    assert said[0] == "model: seed 12:\ntorn"
    assert said[-1].startswith("model: 3 of 3 seeds")
    soak_seeds.play_seeds("model", print, 20, 3, say=said.append)


def test_a_soak_stops_when_its_time_is_over() -> None:
    assert run_steps("quiet", lambda: "nothing", seed=0, duration_s=0.01) > 0


def test_a_soak_stops_after_so_many_steps() -> None:
    assert run_steps("counted", lambda: "nothing", seed=0, steps_max=12) == 12
