"""`reload`: a running daemon reads its configuration again."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.output import say, say_json


def reload(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="A list of the keys that changed, for programs.")] = False,
) -> None:
    """Let the daemon read its configuration file again.

    It takes all of it or, where something is wrong or cannot change while it runs, nothing; it names the line then.
    """
    changed = client_of(load_config_of(ctx)).reload()
    if json:
        say_json(changed)
        return
    for key in changed:
        say(f"changed: {key}")
    if not changed:
        say("nothing has changed")
