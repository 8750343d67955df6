"""`store keys`, `store add-key`, `store remove-key`: who can open an encrypted store.

The current key is the configured one, or that of ``--key`` or ``--passphrase``; all that is changed lies in the store.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.command_list import CommandList
from vmfs_stub.cli.context import Place, place_of, replicated
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import say, say_json, say_table, warn
from vmfs_stub.cli.store_upgrade import upgrade
from vmfs_stub.core.errors import ConfigError, IntegrityError, KeyMissing, Refused, StoreError, UnknownFormat
from vmfs_stub.core.times import time_text

if TYPE_CHECKING:
    from vmfs_stub.store.key_sources import KeySource
    from vmfs_stub.store.keyring import SeenStore

app = typer.Typer(
    cls=CommandList, no_args_is_help=True, help="The keys of an encrypted store, and the version of a store's format."
)
app.command("upgrade")(upgrade)
_HEADERS = ("KEY", "OPENED BY", "MADE", "USED HERE")


@app.command("keys")
def keys(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """List the keys of the store."""
    place = place_of(ctx, store, key=key, passphrase=passphrase)
    seen = _seen(place)
    for damage in seen.damaged:
        warn(f"warning: {damage}")
    used = seen.opened_by(place.source)
    rows = [(document, document.key_id == used) for document in seen.key_documents]
    if json:
        say_json(
            [
                {"key": row.key_id, "kind": row.kind.value, "created": row.created_s, "used": is_used}
                for row, is_used in rows
            ]
        )
        return
    say_table(
        _HEADERS,
        [(row.key_id, row.kind.value, time_text(row.created_s), "yes" if is_used else "") for row, is_used in rows],
    )


@app.command("add-key")
def add_key(
    ctx: typer.Context,
    new_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Key file; made if there is none.")] = None,
    new_passphrase: Annotated[Path | None, typer.Option(metavar="FILE", help="File that holds a passphrase.")] = None,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Let another key file or passphrase open the store."""
    from vmfs_stub.store import keyring

    place = place_of(ctx, store, key=key, passphrase=passphrase)
    seen = _seen(place)
    seen.unlock(place.source)  # before a key file is made
    new = key_to_be(key_file=new_key, passphrase_file=new_passphrase)
    if new is None:
        raise ConfigError("what is to open the store? name --new-key FILE or --new-passphrase FILE")
    document = keyring.add_key(place.objects, seen, _given(place), new)
    _bring_over(place)
    say(f"added {document.key_id}: {new.origin} opens the store, too; a daemon learns of it when it starts again")


@app.command("remove-key")
def remove_key(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="As `store keys` shows it; not the one in use.")],
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Let a key file or passphrase open the store no more."""
    from vmfs_stub.store import keyring

    place = place_of(ctx, store, key=key, passphrase=passphrase)
    again = keyring.remove_key(place.objects, _seen(place), _given(place), key_id)
    if again is not None:
        warn(
            f"warning: somebody has removed the key that you use meanwhile; it opens the store again, as {again.key_id}"
        )
    _bring_over(place)
    say(f"removed {key_id}; who has a copy of it and of its key file or passphrase can still read the store")


def key_to_be(*, key_file: Path | None, passphrase_file: Path | None) -> KeySource | None:
    """What these files hold; a key file that does not exist is made.  Raises ConfigError."""
    from vmfs_stub.store.key_sources import new_key_file, read_source

    if key_file is not None and passphrase_file is None and not os.path.lexists(key_file):
        source = new_key_file(key_file)
        say(f"made {source.origin}: keep copies of it elsewhere; without it nothing in the store can be read")
        return source
    return read_source(key_file=key_file, passphrase_file=passphrase_file)


def _bring_over(place: Place) -> None:
    """What opens the store opens its replica, too; one that is away learns of it with the next restore point."""
    from vmfs_stub.store.keyring import look_at
    from vmfs_stub.store.replica import copy_keys
    from vmfs_stub.store.store import Store

    if place.config is None:
        return
    seen = look_at(place.objects)
    both = replicated(place.config, Store(place.objects, seen.description, seen.unlock(place.source)))
    if both is None:
        return
    try:
        copy_keys(both.plain, both.replica)
    except (StoreError, IntegrityError, UnknownFormat) as exc:
        warn(f"warning: the keys of the replica are as they were, until its next restore point: {exc}")


def _seen(place: Place) -> SeenStore:
    from vmfs_stub.store.keyring import look_at

    seen = look_at(place.objects)
    if not seen.description.is_encrypted:
        raise Refused(
            f"the store at {place.at.url} is not encrypted; that is decided when it is made, by `init --encrypt`"
        )
    return seen


def _given(place: Place) -> KeySource:
    if place.source is None:
        raise KeyMissing("the store is encrypted, and no key was given")
    return place.source
