"""`store upgrade`: raises the version of a store's format, so that what newer programs write may be written.

It cannot be taken back: programs that do not know the version refuse the store from then on.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vmfs_stub.cli.context import place_of
from vmfs_stub.cli.key_options import StoreOption
from vmfs_stub.cli.output import say
from vmfs_stub.core.errors import ConfigError


def upgrade(
    ctx: typer.Context,
    to: Annotated[
        int | None, typer.Option(metavar="N", help="The version to raise it to; else the newest that is known here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it is at, and would be raised to.")] = False,
    store: StoreOption = None,
) -> None:
    """Raise the version of the store; needs no key.  Update the program on all hosts first."""
    from vmfs_stub.store import format as store_format
    from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, FEATURE_ENCRYPTION, decode_description
    from vmfs_stub.store.keys import STORE_KEY
    from vmfs_stub.store.versions import raise_version, version_of

    objects, newest = place_of(ctx, store, key=None, passphrase=None).objects, store_format.STORE_VERSION
    if to is not None and to > newest:
        raise ConfigError(f"--to {to}: this program knows versions up to {newest}; use a newer one")
    description = decode_description(objects.get(STORE_KEY, size_max=DOCUMENT_SIZE_MAX))
    version, wanted = version_of(objects, description), newest if to is None else to
    if wanted < version:
        raise ConfigError(f"--to {wanted}: the store is at version {version}, and versions are never lowered")
    features = f", and requires {FEATURE_ENCRYPTION}" if description.is_encrypted else ""
    name = f"store {description.store_id}"
    if version == wanted:
        what = "the newest this program knows" if version == newest else f"and this program knows up to {newest}"
        say(f"{name} is at version {version}, {what}{features}")
    elif dry_run:
        say(f"{name} is at version {version}{features}; it would be raised to {wanted}")
    else:
        say(f"{name} was raised from version {version} to {raise_version(objects, description, wanted)}{features}")
