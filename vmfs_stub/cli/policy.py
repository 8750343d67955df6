"""`policy`: what a backup job would make placeholders of now, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.output import bytes_text, say_json, say_table

_HEADERS = ("VM", "STATE", "DECISION", "RULE", "FREES", "SECONDS", "REASON")


def policy(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """Show what the policy would do now with each VM, by which rule and numbers; changes nothing.

    SECONDS is how long the VM is predicted to take from its start until it is usable.
    """
    rows = client_of(load_config_of(ctx)).policy()
    if json:
        say_json([row.model_dump(mode="json") for row in rows])
        return
    table = [
        (
            row.vm,
            row.state,
            "archive" if row.archives else "keep",
            row.rule or "-",
            bytes_text(row.frees_bytes),
            f"{row.usable_s:.0f}",
            row.reason,
        )
        for row in rows
    ]
    say_table(_HEADERS, table, right=frozenset({4, 5}))
