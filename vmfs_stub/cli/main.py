"""The command line: options before the command, the list of commands, and errors turned into exit codes.

Each command is a module of its own.  This module, and what it imports, must stay light: `--help` imports it all.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vmfs_stub.cli import (
    adopt,
    archive,
    backup,
    doctor,
    forget,
    gc,
    hold,
    init,
    jobs,
    leave,
    ls,
    mount,
    points,
    policy,
    protect,
    recall,
    reload,
    replicate,
    restore,
    scrub,
    status,
    store_keys,
    unmount,
    usage,
    verify,
)
from vmfs_stub.cli.command_list import CommandList
from vmfs_stub.cli.context import Invocation
from vmfs_stub.cli.exit_codes import ExitCode, exit_code_of
from vmfs_stub.cli.output import warn
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.wrapped_errors import unwrapped

app = typer.Typer(
    cls=CommandList,
    help="Backs up VMs and turns idle ones into placeholders that still boot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command("init")(init.init)
app.command("mount")(mount.mount)
app.command("unmount")(unmount.unmount)
app.command("leave")(leave.leave)
app.command("ls")(ls.ls)
app.command("usage")(usage.usage)
app.command("backup")(backup.backup)
app.command("archive")(archive.archive)
app.command("recall")(recall.recall)
app.command("adopt")(adopt.adopt)
app.command("restore")(restore.restore)
app.command("points")(points.points)
app.command("verify")(verify.verify)
app.command("scrub")(scrub.scrub)
app.command("gc")(gc.gc)
app.command("replicate")(replicate.replicate)
app.command("forget")(forget.forget)
app.command("policy")(policy.policy)
app.command("protect")(protect.protect)
app.command("unprotect")(protect.unprotect)
app.command("jobs")(jobs.jobs)
app.command("hold")(hold.hold)
app.command("unhold")(hold.unhold)
app.command("reload")(reload.reload)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.add_typer(store_keys.app, name="store")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib import metadata

        typer.echo(f"vmfs-stub {metadata.version('vmfs-stub')}")
        raise typer.Exit


@app.callback()
def _before(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration file; else $VMFS_STUB_CONFIG, else /etc/vmfs-stub/config.toml."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    ctx.obj = Invocation(config)


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    try:
        app(prog_name="vmfs-stub")
    except Exception as exc:
        cause = unwrapped(exc)
        if isinstance(cause, VmfsStubError):
            for line in str(cause).splitlines():
                warn(line)
            sys.exit(exit_code_of(cause))
        if isinstance(cause, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
            sys.exit(ExitCode.FAILED)
        logging.getLogger(__name__).critical("unexpected failure", exc_info=exc)
        warn(f"failed unexpectedly ({type(cause).__name__}: {cause}); this is a bug in vmfs-stub")
        sys.exit(ExitCode.FAILED)
    sys.exit(ExitCode.DONE)


if __name__ == "__main__":
    main()
