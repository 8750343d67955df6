"""`jobs`: which jobs there were and are, what they did, and ending or pausing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.job_progress import outcome_text
from vmfs_stub.cli.output import bytes_text, say, say_json, say_table
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.times import time_text

if TYPE_CHECKING:
    from vmfs_stub.control.messages import JobInfo

SHOWN_MAX = 30
"""Of the list for people; `--json` has all that are remembered."""


def jobs(
    ctx: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Its id; all without.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End JOB where it is.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Start no backup job, and no further VM of one.")] = False,
    unpause: Annotated[bool, typer.Option("--unpause", help="Let backup jobs go on.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show jobs, those of earlier daemons too, and what JOB did to each VM; cancel one; pause backup jobs.

    A job that is cancelled leaves each VM as it was, or finished.  A pause lasts until it is taken back.
    """
    from vmfs_stub.core.ids import JobId

    if cancel + pause + unpause > 1 or (cancel and job is None) or ((pause or unpause) and job is not None):
        raise ConfigError("give a JOB to --cancel, and no more than one of --cancel, --pause and --unpause")
    client = client_of(load_config_of(ctx))
    if pause or unpause:
        client.pause_jobs(paused=pause)
        say("backup jobs are paused; `vmfs-stub jobs --unpause` lets them go on" if pause else "backup jobs go on")
    elif cancel:
        client.cancel_job(JobId(job or ""))
        info = client.wait_job(JobId(job or ""), lambda _: None)
        say(f"the {info.kind} job {info.id} is {info.state}")
    elif job is not None:
        info = client.job(JobId(job))
        if json:
            say_json(info.model_dump(mode="json"))
        else:
            _say_job(info)
    else:
        found = client.jobs()
        if json:
            say_json([each.model_dump(mode="json") for each in found])
        else:
            _say_jobs(found)


def _say_jobs(found: list[JobInfo]) -> None:
    rows = []
    for job in found[:SHOWN_MAX]:
        took = "" if job.ended is None else f"{job.ended - job.started:.0f} s"
        rows.append((job.id, job.kind, job.state, time_text(job.started), took, _names(job)))
    say_table(("JOB", "KIND", "STATE", "STARTED", "TOOK", "VMS"), rows)


def _names(job: JobInfo) -> str:
    shown = ", ".join(job.vms[:3]) or "all"
    return f"{shown} and {len(job.vms) - 3} more" if len(job.vms) > 3 else shown


def _say_job(info: JobInfo) -> None:
    from vmfs_stub.control.messages import JobReport

    ended = "" if info.ended is None else f", ended {time_text(info.ended)}"
    say(f"{info.kind} job {info.id}: {info.state}, started {time_text(info.started)}{ended}")
    if info.state == "running":
        progress = info.progress
        say(f"{progress.doing}: {bytes_text(progress.done_bytes)} of {bytes_text(progress.total_bytes)}")
    if info.error is not None:
        say(f"error: {info.error.message}")
    for vm in JobReport.model_validate(info.result or {}).vms:
        more = vm.model_extra or {}
        read, took = more.get("read_bytes"), more.get("seconds")
        numbers = [f"{bytes_text(read)} read" if isinstance(read, int) else ""]
        numbers.append(f"{took:.1f} s" if isinstance(took, int | float) else "")
        say("  ".join(filter(None, (outcome_text(vm), ", ".join(filter(None, numbers))))))
