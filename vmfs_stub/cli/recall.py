"""`recall`: bring whole VMs back."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.job_progress import follow_job
from vmfs_stub.cli.output import say


def recall(
    ctx: typer.Context,
    vms: Annotated[list[str], typer.Argument(metavar="VM", help="Names or ids.")],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start it, print the job's id, and return.")] = False,
) -> None:
    """Bring VMs back in full, so that they are ordinary files again."""
    client = client_of(load_config_of(ctx))
    job_id = client.start_recall(argument_names(vms))
    if no_wait:
        say(job_id)
        return
    follow_job(client, job_id)
