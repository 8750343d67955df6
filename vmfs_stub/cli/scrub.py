"""`scrub`: proves that all of the store is what was written, and says who needs what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import cache_path_of, replicated, store_and_config_of
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.job_progress import advance_shown
from vmfs_stub.cli.key_options import KeyOption, PassphraseOption, StoreOption
from vmfs_stub.cli.output import bytes_text, say, say_json, warn
from vmfs_stub.core.times import time_text

if TYPE_CHECKING:
    from vmfs_stub.services.scrub_report import Damage, ScrubReport


def scrub(
    ctx: typer.Context,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever an earlier run has done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    store: StoreOption = None,
    key: KeyOption = None,
    passphrase: PassphraseOption = None,
) -> None:
    """Check every pack, segment and manifest; repair what can be; exit code 6 when restore points need the rest.

    A run that is stopped goes on where it was the next time, but with --store.
    """
    from vmfs_stub.config import ScrubConfig
    from vmfs_stub.services import scrub as scrubbing
    from vmfs_stub.services.rate import Rate
    from vmfs_stub.services.scrub_progress import ScrubProgress
    from vmfs_stub.store.keys import PACKS

    found, config = store_and_config_of(ctx, store, key=key, passphrase=passphrase)
    settings = ScrubConfig() if config is None else config.scrub
    path = cache_path_of(config, lambda config: config.scrub_path)
    total_bytes = sum(info.size for info in found.objects.list(PACKS))
    with (
        closing(ScrubProgress(path, found.id, restart=restart)) as progress,
        advance_shown("scrubbing the store", total_bytes=total_bytes) as advance,
    ):
        rate = Rate(settings.bytes_per_s_max)
        both = None if config is None else replicated(config, found)
        replica = None if both is None else both.replica
        report = scrubbing.scrub(found, progress, replica=replica, rate=rate, advance=advance)
    if json:
        say_json({**dataclasses.asdict(report), "is_whole": report.is_whole})
    else:
        _tell(report)
    if not report.is_whole:
        raise typer.Exit(ExitCode.INTEGRITY)


def _tell(report: ScrubReport) -> None:
    for damage in report.damages:
        for line in _told(damage):
            warn(line)
    if report.more_damages:
        warn(f"{report.more_damages} more objects are damaged")
    lost = sum(bool(damage.needs) for damage in report.damages)
    say(
        f"{report.point_count} restore points, {report.segment_count} segments, {report.pack_count} packs, "
        f"{bytes_text(report.read_bytes)} read, "
        f"{len(report.damages) + report.more_damages} objects damaged, {lost} of them missed by restore points"
    )


def _told(damage: Damage) -> Iterator[str]:
    since = "" if damage.since_s is None else f" (found {time_text(damage.since_s)})"
    yield f"{damage.key}: {damage.problem}{since}"
    for need in damage.needs:
        pinned = f", on which {need.pin_count} placeholders depend" if need.pin_count else ""
        part = f" {need.path}: {need.chunk_count} chunks" if need.path else ""
        yield f"  needed by {need.vm_name or need.vm_id}@{need.point_id}{pinned}{part}"
    if damage.need_count > len(damage.needs):
        yield f"  and by {damage.need_count - len(damage.needs)} more files"
    if damage.repaired_count:
        yield f"  {damage.repaired_count} of {damage.frame_count} frames that restore points need are repaired"
    elif not damage.needs:
        yield "  no restore point needs what is damaged of it"
