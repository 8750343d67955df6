"""`restore`: a restore point as ordinary files, elsewhere; needs nothing but the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    only_domain: Annotated[
        bool,
        typer.Option("--only-domain", help="Only the domain's definition, NVRAM and TPM state; none of its disks."),
    ] = False,
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
    with advance_shown(f"restoring {name}", total_bytes=0 if only_domain else summary.size_bytes) as advance:
        report = restore_point(found, point, to, progress=advance, only_beside=only_domain)
    for warning in report.warnings:
        warn(f"warning: {warning}")
    say(
        f"{name}@{summary.point_id}: {report.file_count} files, {bytes_text(report.size_bytes)} "
        f"({bytes_text(report.written_bytes)} written) in {to}"
    )
    for line in _beside_lines(report.beside, to):
        say(line)
    if only_domain and not report.beside:
        warn("warning: this restore point has no definition of a domain, NVRAM or TPM state")


def _beside_lines(beside: Mapping[str, Sequence[str]], to: Path) -> Iterator[str]:
    """What an operator does with what was written beside the VM's files."""
    from vmfs_stub.store.associated_files import NVRAM, TPM

    for name in beside.get("domain", ()):
        yield f"its definition is {to / name}: see that the paths in it are right, then `virsh define {to / name}`"
    for kind, what in ((NVRAM, "its NVRAM"), (TPM, "the state of its TPM")):
        for name in beside.get(kind, ()):
            yield f"{what} is {to / name}: copy it to where the definition says before the first start"
