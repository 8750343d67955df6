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
    "record": 750, "vm-identity": 1_000, "top-mode": 1_000, "durable-map": 750, "volatile-map": 500,
    "serving-mark": 750, "datastore-id": 750, "placeholder": 500, "changed-record": 750,
    "changed-map": 500, "frame": 1_000, "pack": 750, "segment": 500, "index-object": 1_000, "description": 1_000,
    "pin": 750, "forgotten": 750, "lease": 1_000, "condemned": 750, "manifest": 1_000, "restore": 750,
    "quarantine": 750, "moved": 750, "claim": 750,
    "config": 300, "fuse-init": 1_000, "control-request": 100, "control-reply": 500,
    "catalog": 200, "chunk-index": 150, "domain-xml": 2_500,
    "image-header": 1_000, "associated": 750,
    "sealed-frame": 1_000, "sealed-object": 1_000, "key-document": 750, "seen-store": 750,
}  # fmt: skip
"""Inputs of each: about one second's worth."""


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
