"""`doctor`: checks the host; each finding comes with its remedy."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from vmfs_stub.cli.context import load_config_of
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.output import say, say_json


def doctor(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """Check this host and the configuration; exit code 8 when a problem is found."""
    from vmfs_stub.cli.host_checks import examine

    findings = examine(load_config_of(ctx))
    if json:
        say_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.severity:<8} {finding.subject}: {finding.message}")
            if finding.severity != "ok" and finding.remedy:
                say(f"{'':<8} remedy: {finding.remedy}")
    if any(finding.severity == "problem" for finding in findings):
        raise typer.Exit(ExitCode.UNHEALTHY)
