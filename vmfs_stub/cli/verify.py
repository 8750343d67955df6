"""`verify`: proves that restore points can be restored, by reading all that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import argument_names, reading_store_of
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.job_progress import advance_shown
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say, warn
from vmfs_stub.services.stored_vms import named_points

if TYPE_CHECKING:
    from vmfs_stub.services.verify import Finding


def verify(
    ctx: typer.Context,
    vm: Annotated[
        str | None,
        typer.Argument(metavar="VM[@POINT]", help="All points of a VM, or one point; all of the store without."),
    ] = None,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Check restore points; exit code 6 when one could not be restored."""
    from vmfs_stub.services import verify as verification

    found = reading_store_of(ctx, store, key=key, passphrase=passphrase)
    points = named_points(found.vms(), None if vm is None else argument_names([vm])[0])
    one = points.only
    with advance_shown(f"verifying {points.what}", total_bytes=points.size_bytes) as advance:
        report = verification.verify(
            found, vm_id=points.vm_id, point_id=None if one is None else one.point_id, progress=advance
        )
    for finding, chunk_count in _folded(report.findings):
        place = f"{finding.vm_name or finding.vm_id}@{finding.point_id}"
        part = f" {finding.path}" if finding.path else ""
        warn(f"{place}{part}{_chunks(finding.chunk, chunk_count)}: {finding.problem}")
    if report.replica_reads:
        warn(
            f"{report.replica_reads} reads were answered by the replica, where the store failed: run `vmfs-stub scrub`"
        )
    say(
        f"{points.what}: {report.point_count} restore points, {report.file_count} files, "
        f"{bytes_text(report.read_bytes)} read, {len(report.findings)} findings"
    )
    if report.findings:
        raise typer.Exit(ExitCode.INTEGRITY)


def _folded(findings: Iterable[Finding]) -> Iterator[tuple[Finding, int]]:
    """The first of each run of neighbouring chunks with the same problem, and how many they are.

    A pack that is missing takes hundreds of chunks with it.
    """
    first, count = None, 0
    for finding in findings:
        if (
            first is not None
            and first.chunk is not None
            and finding == dataclasses.replace(first, chunk=first.chunk + count)
        ):
            count += 1
            continue
        if first is not None:
            yield first, count
        first, count = finding, 1
    if first is not None:
        yield first, count


def _chunks(first: int | None, count: int) -> str:
    if first is None:
        return ""
    return f" chunk {first}" if count == 1 else f" chunks {first} to {first + count - 1}"
