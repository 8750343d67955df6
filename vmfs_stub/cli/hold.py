"""`hold` and `unhold`: whether new recalls of the datastore are accepted."""

from __future__ import annotations

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.output import say


def hold(ctx: typer.Context) -> None:
    """Refuse new recalls of this datastore until `unhold`.

    A guest's read of what is absent gets an I/O error meanwhile, too.
    """
    client_of(load_config_of(ctx)).hold()
    say("new recalls are refused, so that reads of what is absent fail; `vmfs-stub unhold` allows them again")


def unhold(ctx: typer.Context) -> None:
    """Allow recalls again."""
    client_of(load_config_of(ctx)).unhold()
    say("recalls are allowed")
