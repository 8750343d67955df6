"""`points`: restore points, read from the store itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import argument_names, datastore_vms_of, store_and_config_of
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say_json, say_table
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.times import time_text
from vmfs_stub.services.stored_vms import find_stored_vm

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.core.ids import VmId
    from vmfs_stub.store.points import PointSummary, StoredVm
    from vmfs_stub.store.store import Store

_HEADERS = ("VM", "POINT", "CREATED", "FILES", "SIZE", "HOST", "PINS")
_FORGOTTEN_FIELDS = ("vm", "vm_id", "point", "forgotten", "host", "why")
_FORGOTTEN_HEADERS = ("VM", "POINT", "FORGOTTEN", "BY HOST", "WHY")


def points(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(help="Name or id of a VM; all without.")] = None,
    forgotten: Annotated[
        bool, typer.Option("--forgotten", help="Instead, those that are forgotten and not removed yet, and why.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """List restore points, oldest first, and how many placeholders depend on each (PINS)."""
    found, config = store_and_config_of(ctx, store, key=key, passphrase=passphrase)
    if forgotten:
        _list_forgotten(found, None if vm is None else argument_names([vm])[0], json=json)
        return
    vms = found.vms() if vm is None else [find_stored_vm(found.vms(), argument_names([vm])[0])]
    pins, deleted = found.pin_counts(), _deleted(config, found, vms)
    rows = [(stored, point, pins.get((point.vm_id, point.point_id), 0)) for stored in vms for point in stored.points]
    if json:
        say_json([_json_row(stored, point, pin_count, deleted[stored.vm_id]) for stored, point, pin_count in rows])
        return
    table = [
        (
            (stored.name or stored.vm_id) + (" (deleted)" if deleted[stored.vm_id] else ""),
            point.point_id,
            time_text(point.created_s) if point.damaged is None else "DAMAGED",
            str(point.file_count),
            bytes_text(point.size_bytes),
            point.host,
            str(pin_count),
        )
        for stored, point, pin_count in rows
    ]
    say_table(_HEADERS, table, right=frozenset({3, 4, 6}))


def _list_forgotten(store: Store, name: str | None, *, json: bool) -> None:
    names = {vm.vm_id: vm.name for vm in store.vms()}  # a VM of which nothing else is left has none
    rows = [
        (names.get(vm_id, ""), vm_id, point_id, mark.forgotten_s, mark.host, mark.why)
        if mark is not None
        else (names.get(vm_id, ""), vm_id, point_id, None, "", "its mark cannot be read")
        for vm_id, point_id, mark in store.forgotten()
        if name in (None, vm_id, names.get(vm_id))
    ]
    if json:
        say_json([dict(zip(_FORGOTTEN_FIELDS, row, strict=True)) for row in rows])
        return
    table = [(vm or vm_id, point, time_text(at), host, why) for vm, vm_id, point, at, host, why in rows]
    say_table(_FORGOTTEN_HEADERS, table)


def _deleted(config: Config | None, store: Store, vms: Sequence[StoredVm]) -> dict[VmId, bool | None]:
    """Whether each VM was deleted from the configured datastore; None where that is not known."""
    from vmfs_stub.store.claims import newest_claim

    try:
        here = None if config is None else datastore_vms_of(config)
    except VmfsStubError:  # such as for whoever may not look into the backing directory, and may well list points
        here = None
    claim_of = partial(newest_claim, store.objects)
    return {vm.vm_id: None if here is None else here.has_deleted(vm, claim_of) for vm in vms}


def _json_row(stored: StoredVm, point: PointSummary, pin_count: int, deleted: bool | None) -> dict[str, object]:
    return {
        "vm": stored.name,
        "vm_id": stored.vm_id,
        "point": point.point_id,
        "created": point.created_s,
        "host": point.host,
        "files": point.file_count,
        "size_bytes": point.size_bytes,
        "damaged": point.damaged,
        "pins": pin_count,
        "deleted": deleted,
    }
