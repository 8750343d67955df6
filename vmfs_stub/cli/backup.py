"""`backup`: new restore points."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.job_progress import follow_job


def backup(
    ctx: typer.Context,
    vms: Annotated[list[str] | None, typer.Argument(metavar="VM", help="VMs; all without.")] = None,
    no_archive: Annotated[
        bool, typer.Option("--no-archive", help="Make no placeholders, whatever the configuration says.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done to each, and why.")] = False,
) -> None:
    """Back up VMs, also those in use; idle ones become placeholders where the configuration allows it."""
    client = client_of(load_config_of(ctx))
    follow_job(client, client.start_backup(argument_names(vms), archive=not no_archive, rehearsal=dry_run))
