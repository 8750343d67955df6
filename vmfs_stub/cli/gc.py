"""`gc`: removes from the store what no restore point and no running backup needs."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import cache_path_of, replicated, store_and_config_of
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say, say_json, warn
from vmfs_stub.core.errors import StoreError

if TYPE_CHECKING:
    from vmfs_stub.config import Config
    from vmfs_stub.store.collector import Collected
    from vmfs_stub.store.fallback import ReplicatedStore
    from vmfs_stub.store.mirrored_deletes import MirroredDeletes
    from vmfs_stub.store.objects import ObjectStore
    from vmfs_stub.store.repacking import Repacking


def gc(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed, and how much.")] = False,
    repack: Annotated[
        bool, typer.Option(help="Copy what is needed of packs that are mostly garbage, so that they can go.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Remove forgotten restore points, and data that nothing needs.

    What goes from the store goes from its replica, too.  Backups and recalls of any host may go on meanwhile.  No
    other command but `store remove-key` needs permission to delete from the store.
    """
    from vmfs_stub.config import StoreConfig
    from vmfs_stub.store.collector import Collector
    from vmfs_stub.store.reachability import Reachability
    from vmfs_stub.store.repacking import Repacking

    found, config = store_and_config_of(ctx, store, key=key, passphrase=passphrase)
    settings = StoreConfig(url=store or "-") if config is None else config.store
    cache = cache_path_of(config, lambda config: config.reachability_path)
    objects: ObjectStore = found.objects
    mirrored: MirroredDeletes | None = None
    repacking: Repacking | None = Repacking(found)
    with ExitStack() as stack:
        if config is not None and (both := replicated(config, found)) is not None:
            mirrored, repacking = _in_both(both, config, stack)
            objects = mirrored
        reachability = Reachability(cache, found.id, found.objects, sealing=found.sealing)
        stack.enter_context(closing(reachability))
        collector = Collector(
            objects,
            reachability,
            lag_s=settings.listing_lag_s,
            sleep=time.sleep,
            say=warn,
            repacking=repacking if repack else None,
        )
        collected = collector.survey() if dry_run else collector.run()
    if mirrored is not None and mirrored.problem is not None:
        warn(f"warning: {mirrored.left} objects stay in the replica: {mirrored.problem}")
        if repack and repacking is None:
            warn(
                "warning: packs that are mostly garbage stay, since their replica could not have what is needed of them"
            )
    if json:
        say_json(dataclasses.asdict(collected))
        return
    say(_told(collected, "would be removed" if dry_run else "were removed"))
    if collected.repacked or collected.copied_bytes:
        copied = f"{bytes_text(collected.copied_bytes)} {'would be' if dry_run else 'were'} copied"
        say(f"{collected.repacked} of these packs are mostly garbage; since such packs are still needed, {copied}")
    if collected.waiting_points:
        say(f"{collected.waiting_points} forgotten restore points stay until no placeholder depends on them")


def _in_both(both: ReplicatedStore, config: Config, stack: ExitStack) -> tuple[MirroredDeletes, Repacking | None]:
    """What deletes in the replica, too, and what copies into it, too; nothing can be copied when it is away."""
    from vmfs_stub.store.mirrored_deletes import MirroredDeletes
    from vmfs_stub.store.read_back import ReadBack
    from vmfs_stub.store.repacking import Repacking
    from vmfs_stub.store.replica import Replication, check_replica

    store, replica = both.plain, both.replica
    mirrored = MirroredDeletes(store.objects, replica.stored)
    try:
        check_replica(replica.stored, store.description)
    except StoreError as exc:
        mirrored.problem = exc
        return mirrored, None
    path = cache_path_of(config, lambda config: config.read_back_path)
    read_back = stack.enter_context(closing(ReadBack(path, store.id, config.replica.url)))
    return mirrored, Repacking(store, mirror=Replication(store, replica, read_back).copy_moves)


def _told(collected: Collected, what: str) -> str:
    return (
        f"{collected.points} restore points, {collected.packs} packs and {collected.segments} segments of "
        f"{bytes_text(collected.bytes)} {what}"
    )
