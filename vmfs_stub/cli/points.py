"""`points`: restore points, read from the store itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import argument_names, open_store_of
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say_json, say_table, time_text
from vmfs_stub.cli.stored_vms import find_stored_vm

if TYPE_CHECKING:
    from vmfs_stub.store.store import PointSummary, StoredVm

_HEADERS = ("VM", "POINT", "CREATED", "FILES", "SIZE", "HOST")


def points(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(help="Name or id of a VM; all without.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """List restore points, oldest first."""
    found = open_store_of(ctx, store, key=key, passphrase=passphrase)
    vms = found.vms() if vm is None else [find_stored_vm(found.vms(), argument_names([vm])[0])]
    rows = [(stored, point) for stored in vms for point in stored.points]
    if json:
        say_json([_json_row(stored, point) for stored, point in rows])
        return
    table = [
        (
            stored.name or stored.vm_id,
            point.point_id,
            time_text(point.created_s) if point.damaged is None else "DAMAGED",
            str(point.file_count),
            bytes_text(point.size_bytes),
            point.host,
        )
        for stored, point in rows
    ]
    say_table(_HEADERS, table, right=frozenset({3, 4}))


def _json_row(stored: StoredVm, point: PointSummary) -> dict[str, object]:
    return {
        "vm": stored.name,
        "vm_id": stored.vm_id,
        "point": point.point_id,
        "created": point.created_s,
        "host": point.host,
        "files": point.file_count,
        "size_bytes": point.size_bytes,
        "damaged": point.damaged,
    }
