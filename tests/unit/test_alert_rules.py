"""The alert rules that are shipped parse, name metrics that exist, and fire when they should and not before.

The expressions are evaluated here as far as the rules need it: a metric, the `increase` of a counter, a quotient, each
against a number.  What is not understood fails the test.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import vmfs_stub

RULES = Path(vmfs_stub.__file__).parents[1] / "share/vmfs-stub/alerts.yml"
COMPARISONS = {">": operator.gt, "<": operator.lt, "==": operator.eq}
_METRIC = r'(?P<name>[a-z_]+)(?:\{(?P<labels>[a-z]+="[^"]*")\})?'

Samples = Mapping[str, float]
"""Values by metric, with its label where a rule asks for one; of a counter, by how much it has grown."""

QUIET: Samples = {
    'up{job="vmfs-stub"}': 1,
    "vmfs_stub_healthy": 1,
    'vmfs_stub_findings{severity="problem"}': 0,
    "vmfs_stub_last_backup_age_seconds": 25 * 3600,
    "vmfs_stub_vm_point_age_seconds": 49 * 3600,
    "vmfs_stub_vms_without_point": 0,
    "vmfs_stub_store_up": 1,
    "vmfs_stub_store_errors_total": 2,
    "vmfs_stub_recall_waits_failed_total": 0,
    "vmfs_stub_recall_wait_seconds_bucket": 0.4,
    "vmfs_stub_primary_full_in_days": 30,
    "vmfs_stub_primary_free_bytes": 20,
    "vmfs_stub_primary_size_bytes": 100,
    "vmfs_stub_mover_starts_total": 1,
    "vmfs_stub_request_bugs_total": 0,
}
"""As on a host where all is well: one backup each night, of all VMs but one that was skipped once."""


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def value(expression: str, samples: Samples) -> float | None:
    """Of one side of a comparison; None where a metric has no sample, so that nothing fires."""
    if " / " in expression:
        above, below = (value(part, samples) for part in expression.split(" / "))
        return None if above is None or not below else above / below
    for function in (r"increase\((.*)\[\d+[mh]\]\)", r"histogram_quantile\([0-9.]+, rate\((.*)\[\d+m\]\)\)", r"(.*)"):
        inner = re.fullmatch(function, expression)
        if inner is not None and re.fullmatch(_METRIC, inner[1]):
            return samples.get(inner[1])
    raise AssertionError(f"the test does not understand {expression!r}")


def fires(expression: str, samples: Samples) -> bool:
    left, sign, right = re.fullmatch(r"(.+) (>|<|==) ([0-9.]+)", expression).groups()  # type: ignore[union-attr]
    found = value(left, samples)
    return found is not None and bool(COMPARISONS[sign](found, float(right)))


def firing(samples: Samples) -> set[str]:
    return {rule["alert"] for rule in rules() if fires(rule["expr"], samples)}


def metrics_named() -> set[str]:
    return set(re.findall(r"vmfs_stub_[a-z_]+", " ".join(rule["expr"] for rule in rules())))


def test_every_rule_says_what_and_how_grave() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))


def test_nothing_fires_where_all_is_well() -> None:
    assert set(QUIET) - {'up{job="vmfs-stub"}', 'vmfs_stub_findings{severity="problem"}'} == metrics_named() - {
        "vmfs_stub_findings"
    }
    assert firing(QUIET) == set()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({'up{job="vmfs-stub"}': 0}, "VmfsStubDown"),
        ({"vmfs_stub_healthy": 0}, "VmfsStubUnhealthy"),
        ({'vmfs_stub_findings{severity="problem"}': 1}, "VmfsStubFindings"),
        ({"vmfs_stub_last_backup_age_seconds": 31 * 3600}, "VmfsStubBackupTooOld"),
        ({"vmfs_stub_vm_point_age_seconds": 73 * 3600}, "VmfsStubVmBackupTooOld"),
        ({"vmfs_stub_vms_without_point": 1}, "VmfsStubVmWithoutBackup"),
        ({"vmfs_stub_store_up": 0}, "VmfsStubStoreDown"),
        ({"vmfs_stub_store_errors_total": 6}, "VmfsStubStoreErrors"),
        ({"vmfs_stub_recall_waits_failed_total": 1}, "VmfsStubRecallsFailing"),
        ({"vmfs_stub_recall_wait_seconds_bucket": 12}, "VmfsStubRecallsSlow"),
        ({"vmfs_stub_primary_full_in_days": 3}, "VmfsStubPrimaryFullSoon"),
        ({"vmfs_stub_primary_free_bytes": 2}, "VmfsStubPrimaryNearlyFull"),
        ({"vmfs_stub_mover_starts_total": 4}, "VmfsStubMoverRestarts"),
        ({"vmfs_stub_request_bugs_total": 1}, "VmfsStubBug"),
    ],
)
def test_each_fires_for_its_reason(changed: Samples, expected: str) -> None:
    assert firing({**QUIET, **changed}) == {expected}


def test_each_rule_is_tested() -> None:
    cases = test_each_fires_for_its_reason.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {expected for _, expected in cases} == {rule["alert"] for rule in rules()}


def test_what_has_no_sample_fires_nothing() -> None:
    """A filesystem that is not filling has no day on which it is full."""
    samples = {name: value for name, value in QUIET.items() if name != "vmfs_stub_primary_full_in_days"}
    assert firing(samples) == set()
