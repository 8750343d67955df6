"""`status`: what the daemon says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import client_of, load_config_of
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.output import bytes_text, say, say_json
from vmfs_stub.core.times import time_text

if TYPE_CHECKING:
    from vmfs_stub.control.messages import Status


def status(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show daemon, mount, store, jobs, recalls and findings; exit code 8 when an operator has to act."""
    found = client_of(load_config_of(ctx)).status()
    if json:
        say_json(found.model_dump(mode="json"))
    else:
        _say_status(found)
    if not found.healthy:
        raise typer.Exit(ExitCode.UNHEALTHY)


def _say_status(found: Status) -> None:
    say("healthy" if found.healthy else "UNHEALTHY")
    daemon = found.daemon
    held = ", recalls are held" if daemon.held else ""
    held += ", backup jobs are paused" if daemon.jobs_paused else ""
    waiting = f", {daemon.waiting_reads} reads wait for a recall" if daemon.waiting_reads else ""
    say(f"daemon: pid {daemon.pid}, version {daemon.version}, since {time_text(daemon.started)}{held}{waiting}")
    mount = found.mount
    state = "mounted" if mount.mounted else "NOT mounted"
    free = f", {bytes_text(mount.free_bytes)} of {bytes_text(mount.size_bytes)} free" if mount.size_bytes else ""
    if mount.full_in_s is not None:
        free += f", full in {mount.full_in_s / 86400:.0f} days if it goes on filling like that"
    say(f"mount: {mount.mountpoint} {state} on {mount.backing}, {mount.open_disks} disks open{free}")
    store = found.store
    say(f"store: {store.url} {'reachable' if store.reachable else f'NOT reachable: {store.last_error}'}")
    if (replica := found.replica) is not None:
        there = f"{replica.behind} restore points behind, {replica.reads} reads answered for the store"
        away = f"NOT reachable: {replica.last_error}"
        say(f"replica: {replica.url} {f'reachable, {there}' if replica.reachable else away}")
    if (libvirt := found.libvirt) is not None:
        since = "" if libvirt.away_since is None else f" since {time_text(libvirt.away_since)}"
        away = f"NOT reachable{since}: {libvirt.last_error}"
        say(f"libvirt: {libvirt.uri} {'connected' if libvirt.connected else away}")
    backups = found.backups
    if backups.last_done is not None:
        never = f", {backups.vms_without_point} VMs without any restore point" if backups.vms_without_point else ""
        say(f"backups: the last was done at {time_text(backups.last_done)}{never}")
    for job in found.jobs:
        names = ", ".join(job.vms) or "all VMs"
        done, total = bytes_text(job.progress.done_bytes), bytes_text(job.progress.total_bytes)
        say(f"job: {job.id} {job.kind} of {names}, {job.state}: {job.progress.doing} {done} of {total}")
    for recall in found.recalls:
        done, total = bytes_text(recall.done_bytes), bytes_text(recall.total_bytes)
        say(f"recall: {recall.vm} {recall.disk}, {done} of {total}")
    for finding in found.findings:
        say(f"{finding.severity}: {finding.subject}: {finding.message}")
