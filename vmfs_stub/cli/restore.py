"""`restore`: a restore point as ordinary files, elsewhere; needs nothing but the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmfs_stub.cli.context import argument_names, reading_store_of
from vmfs_stub.cli.job_progress import advance_shown
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say, warn
from vmfs_stub.services.stored_vms import find_stored


def restore(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM[@POINT]", help="A VM's newest restore point, or the one named.")],
    to: Annotated[
        Path, typer.Option(help="Directory that gets the files of the VM themselves; nothing in it is overwritten.")
    ],
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Write a restore point out as ordinary files; use a directory of its own for each VM."""
    from vmfs_stub.services.restore import restore_point

    found = reading_store_of(ctx, store, key=key, passphrase=passphrase)
    stored, summary = find_stored(found.vms(), argument_names([vm])[0])
    name = stored.name or stored.vm_id
    point = found.open_point(stored.vm_id, summary.point_id)
    with advance_shown(f"restoring {name}", total_bytes=summary.size_bytes) as advance:
        report = restore_point(found, point, to, progress=advance)
    for warning in report.warnings:
        warn(f"warning: {warning}")
    say(
        f"{name}@{summary.point_id}: {report.file_count} files, {bytes_text(report.size_bytes)} "
        f"({bytes_text(report.written_bytes)} written) in {to}"
    )
