"""`adopt`: placeholders here of VMs whose host is lost, from the store alone."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.job_progress import follow_job
from vmfs_stub.cli.output import say
from vmfs_stub.core.errors import ConfigError


def adopt(
    ctx: typer.Context,
    vms: Annotated[
        list[str] | None,
        typer.Argument(metavar="VM[@POINT]", help="VMs of the store: their newest state, or the point named."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every VM of the store that is not here.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take a VM from the host that has its newest state; with --accept-loss.")
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go without what was written since the restore point.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """Make placeholders here of VMs whose host is lost; the store alone is needed."""
    if bool(vms) == everything:
        raise ConfigError("name at least one VM, or give --all")
    client = client_of(load_config_of(ctx))
    started = client.start_adopt(argument_names(vms), everything=everything, force=force, accept_loss=accept_loss)
    report = follow_job(client, started, json=json)
    if not report.vms and not json:
        say("every VM of the store is here")
