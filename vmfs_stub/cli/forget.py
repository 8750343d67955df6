"""`forget`: restore points that are not wanted any more, by name or by the rules of the configuration."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import argument_names, datastore_vms_of, store_and_config_of
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import say_json, say_table
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.times import time_text
from vmfs_stub.services.stored_vms import find_stored_vm, named_points

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.services.retention import Verdict
    from vmfs_stub.store.points import StoredVm
    from vmfs_stub.store.store import Store

    Judged = tuple[StoredVm, Verdict]

BY_HAND = "by hand"
_HEADERS = ("VM", "POINT", "CREATED", "OUTCOME", "WHY")


def forget(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="VM@POINT", help="Restore points; with --by-rules, VMs, or all of this datastore."),
    ] = None,
    by_rules: Annotated[
        bool,
        typer.Option(
            "--by-rules",
            help="Forget what [retention] does not keep, of VMs in the backing directory.  Of a VM that is no longer "
            "there all is forgotten when the newest is older than keep_deleted_days; when it was deleted is not known.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be forgotten.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Have restore points removed by the next garbage collection; this cannot be taken back.

    Those that placeholders depend on are kept.
    """
    from vmfs_stub.services.retention import carry_out, problem_of

    if not names and not by_rules:
        raise ConfigError("name restore points, as VM@POINT, or use --by-rules")
    found, config = store_and_config_of(ctx, store, key=key, passphrase=passphrase)
    if by_rules and config is None:
        raise ConfigError("the rules are in the configuration: use --by-rules without --store")
    vms, asked = found.vms(), argument_names(names)
    judged = list(_named(vms, asked) if config is None or not by_rules else _by_rules(config, found, vms, asked))
    done: list[Judged] = []
    try:
        for vm, verdict in judged:
            done.append((vm, carry_out(found, verdict, host=socket.gethostname(), dry_run=dry_run)))
    finally:
        _show(done, dry_run=dry_run, json=json)
    verdicts = [verdict for _, verdict in done]
    problem = problem_of(verdicts) if by_rules else next(filter(None, (verdict.error for verdict in verdicts)), None)
    if problem is not None:
        raise problem


def _named(vms: Sequence[StoredVm], names: Sequence[str]) -> Iterator[Judged]:
    """The points of these names, each once; raises before the first when one of them is not there."""
    from vmfs_stub.services.retention import Verdict

    for name in dict.fromkeys(names):
        point = named_points(vms, name).only
        if point is None:
            raise ConfigError(f"which restore point of {name} is not said: name it as {name}@POINT")
        yield find_stored_vm(vms, point.vm_id), Verdict(point, False, BY_HAND)


def _by_rules(config: Config, store: Store, vms: Sequence[StoredVm], names: Sequence[str]) -> Iterator[Judged]:
    """What the configuration says of the points of the named VMs, or of all VMs that this datastore has or had."""
    from vmfs_stub.services import retention
    from vmfs_stub.store.claims import newest_claim

    here, now_s, days = datastore_vms_of(config), time.time(), config.retention.keep_deleted_days
    for vm in [find_stored_vm(vms, name) for name in dict.fromkeys(names)] if names else vms:
        is_deleted = here.has_deleted(vm, partial(newest_claim, store.objects))
        if is_deleted is None and not names:
            continue
        if is_deleted is None:
            verdicts = retention.keep_all(vm.points, "not a VM of this datastore")
        elif not is_deleted:
            verdicts = retention.by_rules(vm.points, config.retention.rules, now_s=now_s)
        elif days is None:
            verdicts = retention.keep_all(vm.points, "deleted, and keep_deleted_days is not set")
        else:
            verdicts = retention.by_age(vm.points, days, now_s=now_s)
        yield from ((vm, verdict) for verdict in verdicts)


def _show(done: Sequence[Judged], *, dry_run: bool, json: bool) -> None:
    if json:
        say_json([_json_row(vm, verdict) for vm, verdict in done])
        return
    forgotten = "would be forgotten" if dry_run else "forgotten"
    table = [
        (
            vm.name or vm.vm_id,
            verdict.point.point_id,
            time_text(verdict.point.created_s) if verdict.point.damaged is None else "DAMAGED",
            "kept" if verdict.is_kept else forgotten,
            verdict.why,
        )
        for vm, verdict in done
    ]
    say_table(_HEADERS, table)


def _json_row(vm: StoredVm, verdict: Verdict) -> dict[str, object]:
    return {
        "vm": vm.name,
        "vm_id": vm.vm_id,
        "point": verdict.point.point_id,
        "created": verdict.point.created_s,
        "kept": verdict.is_kept,
        "why": verdict.why,
    }
