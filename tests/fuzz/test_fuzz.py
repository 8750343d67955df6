"""Every target for a short while, from a fixed seed; `scripts/soak fuzz` runs them for longer, from others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.registry import TARGETS

ROOT = Path(__file__).parents[2]
COUNTS: Mapping[str, int] = {
    "record": 1_500, "vm-identity": 2_000, "top-mode": 2_000, "durable-map": 1_500, "volatile-map": 1_000,
    "serving-mark": 1_500, "datastore-id": 1_500, "placeholder": 1_000, "changed-record": 1_500,
    "changed-map": 1_000, "frame": 2_000, "pack": 1_500, "segment": 1_000, "index-object": 2_000, "description": 2_000,
    "pin": 1_500, "forgotten": 1_500, "lease": 2_000, "condemned": 1_500, "manifest": 2_000, "restore": 1_500,
    "quarantine": 1_500, "moved": 1_500, "claim": 1_500,
    "config": 600, "fuse-init": 2_000, "control-request": 200, "control-reply": 1_000,
    "catalog": 400, "chunk-index": 300, "domain-xml": 5_000,
    "image-header": 2_000, "associated": 1_500,
    "sealed-frame": 2_000, "sealed-object": 2_000, "key-document": 1_500, "seen-store": 1_500,
}  # fmt: skip
"""Inputs of each: about two seconds' worth."""


@pytest.fixture(scope="module")
def results() -> Mapping[str, Mapping[str, Any]]:
    """Of all targets: each runs in a process of its own, forked from one that has no threads."""
    command = [sys.executable, "-m", "tests.fuzz.campaign", "--seed", "1"]
    command += [f"{name}:{count}" for name, count in COUNTS.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["target"]: result for result in found}


def test_every_target_has_its_turn() -> None:
    assert set(COUNTS) == set(TARGETS)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_breaks(results: Mapping[str, Mapping[str, Any]], name: str) -> None:
    result = results[name]
    assert [(finding["signature"], finding["detail"], finding["data"]) for finding in result["findings"]] == []
    assert result["executions"] == COUNTS[name]
    assert 0 < result["accepted"] <= result["executions"]
    assert result["corpus"] > 3
