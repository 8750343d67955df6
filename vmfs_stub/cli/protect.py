"""`protect` and `unprotect`: whether a VM may be archived at all."""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.output import say

Vms = Annotated[list[str], typer.Argument(metavar="VM", help="Names or ids.")]


def protect(ctx: typer.Context, vms: Vms) -> None:
    """Never archive these VMs, neither by the policy nor by `archive`; what is archived already stays so."""
    client_of(load_config_of(ctx)).protect(argument_names(vms), protected=True)
    say(f"protected: {', '.join(argument_names(vms))}; `vmfs-stub unprotect` allows to archive them again")


def unprotect(ctx: typer.Context, vms: Vms) -> None:
    """Allow to archive these VMs again."""
    client_of(load_config_of(ctx)).protect(argument_names(vms), protected=False)
    say(f"no longer protected by `protect`: {', '.join(argument_names(vms))}")
