"""Following a job of the daemon to its end: a bar on a terminal, a line per step otherwise, and its report.

The job is the daemon's: whoever stops following stops nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from vmfs_stub.cli.exit_codes import ExitCode, exit_code_of
from vmfs_stub.cli.output import bytes_text, say, say_json, warn
from vmfs_stub.core.errors import Refused

if TYPE_CHECKING:
    from vmfs_stub.control.client import ControlClient
    from vmfs_stub.control.messages import JobInfo, JobReport, Progress, VmOutcome
    from vmfs_stub.core.ids import JobId

    Show = Callable[[Progress], None]


def follow_job(client: ControlClient, job_id: JobId, *, json: bool = False) -> JobReport:
    """Show the job until it ends, print and return its report, or raise what it failed with (or exit with its code).

    With ``json`` the report is one list, an object for each VM.
    """
    try:
        with progress_shown() as show:
            info = client.wait_job(job_id, lambda job: show(job.progress))
    except KeyboardInterrupt:
        warn(
            f"job {job_id} goes on in the daemon; `vmfs-stub jobs` shows it, `vmfs-stub jobs --cancel {job_id}` ends it"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    return _report(info, json=json)


def _report(info: JobInfo, *, json: bool) -> JobReport:
    from vmfs_stub.control.messages import JobReport, error_of

    report = JobReport.model_validate(info.result or {})
    if json:
        say_json([vm.model_dump(mode="json") for vm in report.vms])
    for vm in () if json else report.vms:
        if vm.error is None:
            say(outcome_text(vm))
        else:
            warn(outcome_text(vm))
    if info.state == "cancelled":
        raise Refused(f"the {info.kind} job {info.id} was cancelled")
    if info.state == "interrupted":
        raise Refused(f"the {info.kind} job {info.id} was interrupted: the daemon stopped")
    if info.error is None:
        return report
    error = error_of(info.error)
    if any(vm.error is not None for vm in report.vms):  # each was told above
        raise typer.Exit(exit_code_of(error))
    raise error


def outcome_text(vm: VmOutcome) -> str:
    """What became of a VM, in one line."""
    if vm.error is not None:
        return f"{vm.vm}: {vm.outcome}: {vm.error.message}"
    reason = (vm.model_extra or {}).get("reason") or ""
    said = "; ".join(filter(None, (vm.message, reason if reason not in vm.message else "")))
    return f"{vm.vm}: {vm.outcome}{f' ({said})' if said else ''}"


@contextmanager
def progress_shown() -> Iterator[Show]:
    """A function that shows progress while inside."""
    if not sys.stdout.isatty():
        yield _lines()
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(progress: Progress) -> None:
            total = progress.total_bytes or None
            bar.update(task, description=progress.doing, completed=progress.done_bytes, total=total)

        yield show


@contextmanager
def advance_shown(doing: str, *, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """For work of this process: a function that is told how many bytes were dealt with since it was last called."""
    from vmfs_stub.control.messages import Progress

    done = 0
    with progress_shown() as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(Progress(done_bytes=done, total_bytes=total_bytes, doing=doing))

        yield advance


def _lines() -> Show:
    """One line per step, on stderr: stdout is for the outcome.  The size is that of all steps together."""
    said = ""

    def show(progress: Progress) -> None:
        nonlocal said
        if progress.doing and progress.doing != said:
            said = progress.doing
            size = f" ({bytes_text(progress.total_bytes)} in all)" if progress.total_bytes else ""
            print(f"{said}{size}", file=sys.stderr, flush=True)

    return show
