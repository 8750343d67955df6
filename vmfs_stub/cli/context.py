"""What every command needs: the configuration, the daemon's client, the store; each made only when asked for.

Heavy imports happen in here, inside the functions, so that `--help` stays quick.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmfs_stub.cli.output import warn

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer

    from vmfs_stub.config import Config
    from vmfs_stub.control.client import ControlClient
    from vmfs_stub.services.datastore_vms import DatastoreVms
    from vmfs_stub.store.fallback import ReplicatedStore
    from vmfs_stub.store.key_sources import KeySource
    from vmfs_stub.store.objects import ObjectStore
    from vmfs_stub.store.objects_url import StoreAt
    from vmfs_stub.store.store import Store


@dataclass(frozen=True, slots=True)
class Invocation:
    """The options given before the command."""

    config_option: Path | None


def config_path_of(ctx: typer.Context) -> Path:
    """The configuration file that the options and the environment name."""
    from vmfs_stub.config import config_path

    invocation: Invocation = ctx.obj
    return config_path(invocation.config_option)


def load_config_of(ctx: typer.Context) -> Config:
    """The configuration; its warnings go to stderr.  Raises ConfigError."""
    from vmfs_stub.config import load_config

    config = load_config(config_path_of(ctx))
    for warning in config.warnings:
        warn(f"warning: {warning}")
    return config


def client_of(config: Config) -> ControlClient:
    """A client of this datastore's daemon; whether one answers shows at the first call."""
    from vmfs_stub.control.client import ControlClient

    return ControlClient(
        config.socket_path, backing=config.datastore.backing, timeout_s=config.control.request_timeout_s
    )


def datastore_vms_of(config: Config) -> DatastoreVms:
    """The VMs in the configured backing directory; raises PrimaryIOError, Unsupported when they cannot be told."""
    from vmfs_stub.services.datastore_vms import read_datastore_vms
    from vmfs_stub.services.managed_save import ManagedSave

    datastore = config.datastore
    managed_save = ManagedSave.at(config.libvirt.save_dir, backing=datastore.backing, mountpoint=datastore.mountpoint)
    return read_datastore_vms(
        datastore.backing, host=socket.gethostname(), name=datastore.name, memory_dir=managed_save.memory_dir
    )


@dataclass(frozen=True, slots=True)
class Place:
    """A store that was named: where it is, what opens it if it is encrypted, and the configuration if that names it."""

    at: StoreAt
    source: KeySource | None
    objects: ObjectStore
    config: Config | None


def place_of(ctx: typer.Context, url: str | None, *, key: Path | None, passphrase: Path | None) -> Place:
    """The store at ``url``, for which no configuration is needed, else the configured one.

    Its key is the one that the options name, else, of the configured store, the configured one.  Raises ConfigError.
    """
    from vmfs_stub.store.key_sources import read_source, source_of
    from vmfs_stub.store.objects_url import StoreAt, open_objects

    source = read_source(key_file=key, passphrase_file=passphrase)
    if url is not None:
        at, config = StoreAt(url), None
    else:
        config = load_config_of(ctx)
        at, source = StoreAt.of(config.store), source or source_of(config.store)
    return Place(at, source, open_objects(at), config)


def store_and_config_of(
    ctx: typer.Context, url: str | None, *, key: Path | None = None, passphrase: Path | None = None
) -> tuple[Store, Config | None]:
    """The store that is named, see `place_of`, with the configuration if that names it; raises as `open_store`."""
    place = place_of(ctx, url, key=key, passphrase=passphrase)
    return _opened(place.objects, place.at.url, place.source), place.config


def has_maps(config: Config) -> bool:
    """Whether the datastore has maps of placeholders that are not over.  Raises OSError."""
    return config.maps_dir.exists() and any(config.maps_dir.iterdir())


def cache_path_of(config: Config | None, path_of: Callable[[Config], Path]) -> Path | None:
    """Where a command keeps what it learns of a store for the next time; None where there is no place for that.

    So it is without a configuration, and on a host that never mounted the datastore, or whose backing filesystem is not
    there.
    """
    return path_of(config) if config is not None and config.private_dir.is_dir() else None


def reading_store_of(
    ctx: typer.Context, url: str | None, *, key: Path | None = None, passphrase: Path | None = None
) -> Store:
    """The store that is named, to read restore points of: the configured one with its replica, if it has one.

    Raises as `open_store`.
    """
    store, config = store_and_config_of(ctx, url, key=key, passphrase=passphrase)
    return (None if config is None else replicated(config, store)) or store


def replicated(config: Config, store: Store) -> ReplicatedStore | None:
    """The configured store with its replica, if one is configured; no guest waits for what is read."""
    from vmfs_stub.store.fallback import ReplicatedStore
    from vmfs_stub.store.objects_url import StoreAt

    at = StoreAt.of(config.store)
    return ReplicatedStore.at(store, at.replica(config.replica), patience_s=at.transfer_timeout_s)


def open_store(config: Config) -> Store:
    """The configured store; raises StoreError, StoreKeyError, ConfigError, UnknownFormat."""
    from vmfs_stub.store.key_sources import source_of
    from vmfs_stub.store.objects_url import StoreAt, open_objects

    at = StoreAt.of(config.store)
    return _opened(open_objects(at), at.url, source_of(config.store))


def _opened(objects: ObjectStore, url: str, source: KeySource | None) -> Store:
    from vmfs_stub.core.errors import ObjectMissing
    from vmfs_stub.store.store import Store

    try:
        return Store.open(objects, source)
    except ObjectMissing as exc:
        # Not a word of `init`: in a disaster it would make an empty store in the place of one that is not mounted.
        raise ObjectMissing(
            f"there is no vmfs-stub store at {url}; is what belongs there mounted, and is the URL right?"
        ) from exc


def argument_names(names: list[str] | None) -> list[str]:
    """VM names as they are shown, so that what `ls` prints and what a shell completes both name the VM."""
    from vmfs_stub.core.names import printable

    return [printable(name) for name in names or []]
