"""`usage`: how a VM was used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmfs_stub.cli.context import argument_names, client_of, load_config_of
from vmfs_stub.cli.output import bytes_text, say, say_json, say_table
from vmfs_stub.core.times import time_text

if TYPE_CHECKING:
    from vmfs_stub.control.messages import UsageSpan, VmUsage

_HEADERS = (
    "FROM",
    "TO",
    "OFF",
    "RAN",
    "UNKNOWN",
    "CPU",
    "CPU MAX",
    "READ",
    "WRITTEN",
    "DISK MAX",
    "NETWORK",
    "NETWORK MAX",
)
_GAP = "gap"


def usage(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(help="Name or id of a VM.")],
    days: Annotated[int, typer.Option(help="How far back; up to two by the hour.", min=1, max=730)] = 14,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show how a VM was used: hours off and running, processor, disk and network, last use by a hypervisor.

    A gap is time in which nobody looked; it never counts as idle.  Processor in percent of one; MAX are the highest
    means of one sampling interval, "-" where that is not known.
    """
    found = client_of(load_config_of(ctx)).usage(argument_names([vm])[0], days=days)
    if json:
        say_json(found.model_dump(mode="json"))
        return
    say(_now(found))
    say_table(_HEADERS, [_line(span) for span in found.spans], right=frozenset(range(2, len(_HEADERS))))


def _now(found: VmUsage) -> str:
    since = "" if found.state_since is None else f" since {time_text(found.state_since)}"
    domains = f", domain {', '.join(found.domains)}" if found.domains else ""
    return (
        f"{found.vm}: {found.state}{since}{domains}; by a hypervisor last opened {time_text(found.last_open)}, "
        f"last read or written {time_text(found.last_io)}"
    )


def _line(span: UsageSpan) -> tuple[str, ...]:
    when = (time_text(span.start), time_text(span.end))
    if span.is_gap:
        return (*when, _GAP, _GAP, _hours(span.unknown_s), *("-" for _ in _HEADERS[5:]))
    return (
        *when,
        _hours(span.off_s),
        _hours(span.running_s),
        _hours(span.unknown_s),
        _percent(span.cpu_percent),
        _percent(span.cpu_percent_max),
        bytes_text(span.read_bytes),
        bytes_text(span.written_bytes),
        _rate(span.disk_bytes_per_s_max),
        bytes_text(span.network_bytes),
        _rate(span.network_bytes_per_s_max),
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_text(int(min(bytes_per_s, 2**63)))}/s"
