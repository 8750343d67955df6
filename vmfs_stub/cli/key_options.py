"""The options that say what opens an encrypted store, for commands that need no configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="Key file of an encrypted store; else as configured.")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase", metavar="FILE", help="Instead: file with a passphrase of the store."),
]
StoreOption = Annotated[str | None, typer.Option("--store", help="URL of a store; no configuration is needed then.")]
