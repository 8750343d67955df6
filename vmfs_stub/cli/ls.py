"""`ls`: the disks of this datastore."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.output import bytes_text, say_json, say_table
from vmfs_stub.core.times import time_text

_HEADERS = ("VM", "DISK", "STATE", "SIZE", "RESIDENT", "POINTS", "LAST ACCESS", "PROTECTED")


def ls(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(help="Name or id of a VM; all without.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """List disks: state, size, what is resident, restore points, last access, protection."""
    client = client_of(load_config_of(ctx))
    rows = client.list_disks(argument_names([vm])[0] if vm is not None else None)
    if json:
        say_json([row.model_dump(mode="json") for row in rows])
        return
    table = [
        (
            row.vm,
            row.disk,
            row.state,
            bytes_text(row.size_bytes),
            bytes_text(row.resident_bytes),
            str(row.restore_points),
            time_text(row.last_access),
            "yes" if row.protected else "-",
        )
        for row in rows
    ]
    say_table(_HEADERS, table, right=frozenset({3, 4, 5}))
