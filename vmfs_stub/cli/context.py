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
    import typer

    from vmfs_stub.config import Config
    from vmfs_stub.control.client import ControlClient
    from vmfs_stub.services.datastore_vms import DatastoreVms
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


def open_store_of(ctx: typer.Context, url: str | None) -> Store:
    """The store at ``url``, for which no configuration is needed, else the configured one; raises as `open_store`."""
    return store_and_config_of(ctx, url)[0]


def store_and_config_of(ctx: typer.Context, url: str | None) -> tuple[Store, Config | None]:
    """The same, with the configuration where it is needed; raises as `open_store`."""
    from vmfs_stub.store.objects_url import StoreAt

    if url is not None:
        return open_store(StoreAt(url)), None
    config = load_config_of(ctx)
    return open_store(StoreAt.of(config.store)), config


def datastore_vms_of(config: Config) -> DatastoreVms:
    """The VMs in the configured backing directory; raises PrimaryIOError, Unsupported when they cannot be told."""
    from vmfs_stub.services.datastore_vms import read_datastore_vms

    datastore = config.datastore
    return read_datastore_vms(datastore.backing, host=socket.gethostname(), name=datastore.name)


def open_store(at: StoreAt) -> Store:
    """The secondary store there; raises StoreError, ConfigError, UnknownFormat."""
    from vmfs_stub.core.errors import ObjectMissing
    from vmfs_stub.store.objects_url import open_objects
    from vmfs_stub.store.store import Store

    try:
        return Store.open(open_objects(at))
    except ObjectMissing as exc:
        # Not a word of `init`: in a disaster it would make an empty store in the place of one that is not mounted.
        raise ObjectMissing(
            f"there is no vmfs-stub store at {at.url}; is what belongs there mounted, and is the URL right?"
        ) from exc


def argument_names(names: list[str] | None) -> list[str]:
    """VM names as they are shown, so that what `ls` prints and what a shell completes both name the VM."""
    from vmfs_stub.core.names import printable

    return [printable(name) for name in names or []]
