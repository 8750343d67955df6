"""What reports of jobs say of each VM, while a job runs and after it; and jobs of earlier daemons."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vmfs_stub.catalog.catalog import JobRecord
from vmfs_stub.control.jobs import JobProgress, failure_info
from vmfs_stub.control.messages import JobInfo, JobKind, VmOutcome
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.times import time_text
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.adopt import AdoptReport, Wanted
from vmfs_stub.services.backup_job import Watch
from vmfs_stub.services.backup_turn import VmResult

log = logging.getLogger(__name__)


def names_of(scan: Scan) -> list[str]:
    """What a job says that it is about."""
    return [*(vm.name for vm in scan.vms), *(unread.name for unread in scan.unread)]


def watch_of(kind: JobKind, vms: Sequence[Vm], progress: JobProgress, outcomes: dict[VmId, VmOutcome]) -> Watch:
    """Shows how far a backup job is, and what it is at; collects what became of each VM."""
    done, total = 0, sum(vm.size_bytes for vm in vms)

    def advance(vm: Vm, count: int) -> None:
        nonlocal done
        done += count
        progress.update(done_bytes=min(done, total), total_bytes=total, doing=f"{kind} of {vm.name}")

    def end(result: VmResult) -> None:
        progress.add(outcome := outcome_of(result, kind=kind))
        outcomes[result.vm.id] = outcome

    return Watch(began=lambda vm: advance(vm, 0), advanced=advance, ended=end)


def outcome_of(result: VmResult, *, kind: JobKind = "backup") -> VmOutcome:
    """What a report says of a VM."""
    fields: dict[str, Any] = {} if result.report is None else asdict(result.report)
    for paths in ("placeholders", "left_out"):
        fields[paths] = [printable(path) for path in fields.get(paths, ())]
    if result.report is not None:
        fields["abandoned"] = printable(result.report.abandoned)
    decision = result.decision
    fields |= {
        "vm": result.vm.name,
        "vm_id": result.vm.id,
        "outcome": result.outcome,
        "message": result.message,
        "error": None if result.error is None else failure_info(f"{kind} of VM {result.vm.name}", result.error),
        "forgotten": result.forgotten,
        "seconds": round(result.seconds, 3),
        "reason": "" if decision is None else printable(decision.reason),
        "rule": None if decision is None or decision.rule is None else printable(decision.rule),
        "guest": result.guest,
    }
    return VmOutcome.model_validate(fields)


def job_of(record: JobRecord) -> JobInfo | None:
    """A job of an earlier daemon; None when what the catalog has of it makes no sense."""
    fields = {
        name: getattr(record, name) for name in ("id", "kind", "state", "caller_uid", "started", "ended", "error")
    }
    try:
        return JobInfo.model_validate({**fields, "vms": list(record.vms), "result": record.report})
    except ValueError as exc:
        log.warning("job %s is left out, since the catalog has it wrong: %s", printable(record.id), exc)
        return None


def not_forgotten(vm: Vm, error: Exception) -> str:
    """What a report says when retention could not be applied to a VM that was backed up."""
    failure = failure_info(f"forgetting restore points of VM {vm.name}", error)
    return f"not all restore points that are due could be forgotten: {failure.message}"


def adopted(wanted: Wanted, report: AdoptReport) -> VmOutcome:
    """What a report says of a VM that was adopted."""
    message = f"as it was at {time_text(report.created_s)}, restore point {report.point_id}"
    if report.warnings:
        more = len(report.warnings) - 1
        message += f"; {report.warnings[0]}{f' (and {more} more in the log)' if more else ''}"
    fields = {
        "vm": wanted.name,
        "outcome": "adopted",
        "message": message,
        "vm_id": wanted.vm.vm_id,
        "point_id": report.point_id,
        "placeholders": [printable(path) for path in report.placeholders],
    }
    return VmOutcome.model_validate(fields)
