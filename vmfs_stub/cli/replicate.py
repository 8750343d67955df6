"""`replicate`: brings the replica up to date with the store."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import cache_path_of, load_config_of, open_store, replicated
from vmfs_stub.cli.output import bytes_text, say, say_json, warn
from vmfs_stub.core.errors import ConfigError

if TYPE_CHECKING:
    from vmfs_stub.services.replication import CaughtUp
    from vmfs_stub.store.replica import Replication


def replicate(
    ctx: typer.Context,
    create: Annotated[bool, typer.Option("--create", help="Make the replica where there is none yet.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all of it back, and replace what is damaged there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Copy to the replica what it lacks: restore points of all VMs, and who can open them.

    Daemons do so by themselves for the VMs of their datastores; this is for all of the store.
    """
    from vmfs_stub.store.objects_url import StoreAt, open_objects
    from vmfs_stub.store.read_back import ReadBack
    from vmfs_stub.store.replica import Replication, make_replica

    config = load_config_of(ctx)
    store = replicated(config, open_store(config))
    if store is None:
        raise ConfigError("no replica is configured: name one in [replica] url, or with `init --replica`")
    if create:
        place = StoreAt.of(config.store).replica(config.replica)
        assert place is not None
        if make_replica(store.plain, open_objects(place, create=True)) and not json:
            say(f"made the replica at {place.url}")
    path = cache_path_of(config, lambda config: config.read_back_path)
    with closing(ReadBack(path, store.id, config.replica.url)) as read_back:
        caught_up = _run(Replication(store.plain, store.replica, read_back, again=check))
    _tell(caught_up, check=check, as_json=json)
    if caught_up.failures:
        raise next(iter(caught_up.failures.values()))


def _run(run: Replication) -> CaughtUp:
    import trio

    from vmfs_stub.services.replication import catch_up
    from vmfs_stub.services.threads import Threads

    threads = Threads(files_max=1, store_max=1, compute_max=1, store_timeout_s=60, transfer_timeout_s=600)
    with closing(threads):
        return trio.run(partial(catch_up, threads, run))


def _tell(caught_up: CaughtUp, *, check: bool, as_json: bool) -> None:
    if as_json:
        failures = {vm_id: str(error) for vm_id, error in caught_up.failures.items()}
        say_json({"points": caught_up.points, "bytes": caught_up.bytes, "failures": failures})
        return
    for vm_id, error in caught_up.failures.items():
        warn(f"VM {vm_id}: {error}")
    what = "are in the replica and were read back" if check else "were brought into the replica"
    say(f"{caught_up.points} restore points {what}, {bytes_text(caught_up.bytes)} copied")
