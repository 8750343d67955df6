"""`archive`: back up, and make placeholders now."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.job_progress import follow_job


def archive(ctx: typer.Context, vms: Annotated[list[str], typer.Argument(metavar="VM", help="Names or ids.")]) -> None:
    """Back up VMs and make placeholders of them now.

    A VM that is in use, or must not be archived, stays as it is, and stops none of the others.
    """
    client = client_of(load_config_of(ctx))
    follow_job(client, client.start_archive(argument_names(vms)))
