"""What libvirt's numbers mean: states of domains, statistics of those that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vmfs_stub.core.usage import Counters, GuestState

_NANO: Final = 1e9


def counters_of(stats: Mapping[str, Any]) -> Counters:
    """What libvirt's statistics of a running domain say; whatever part of a sum is missing makes it unknown."""
    cpu_ns = stats.get("cpu.time")  # which needs cgroups
    if cpu_ns is None:
        cpu_ns = _sum(
            stats, "vcpu", "vcpu.maximum", ("time",), is_needed=lambda number: f"vcpu.{number}.state" in stats
        )
    # A drive without a medium has no path, and no counters.
    disks = ("block", "block.count")
    read, written, requests = (
        _sum(stats, *disks, keys, is_needed=lambda number: f"block.{number}.path" in stats)
        for keys in (("rd.bytes",), ("wr.bytes",), ("rd.reqs", "wr.reqs"))
    )
    return Counters(
        cpu_s=None if cpu_ns is None else cpu_ns / _NANO,
        read_bytes=read,
        written_bytes=written,
        requests=requests,
        network_bytes=_sum(stats, "net", "net.count", ("rx.bytes", "tx.bytes")),
    )


def _sum(
    stats: Mapping[str, Any],
    group: str,
    count_key: str,
    keys: Sequence[str],
    *,
    is_needed: Callable[[int], bool] = lambda number: True,
) -> int | None:
    count = stats.get(count_key)
    if count is None:
        return None
    total = 0
    for number in filter(is_needed, range(count)):
        for key in keys:
            value = stats.get(f"{group}.{number}.{key}")
            if value is None:
                return None
            total += int(value)
    return total


def state_of(libvirt: Any, number: int) -> GuestState:
    """What libvirt calls by that number."""
    return {
        libvirt.VIR_DOMAIN_RUNNING: GuestState.RUNNING,
        libvirt.VIR_DOMAIN_BLOCKED: GuestState.RUNNING,
        libvirt.VIR_DOMAIN_SHUTDOWN: GuestState.RUNNING,  # it is about to
        libvirt.VIR_DOMAIN_PAUSED: GuestState.PAUSED,
        libvirt.VIR_DOMAIN_PMSUSPENDED: GuestState.PAUSED,
        libvirt.VIR_DOMAIN_SHUTOFF: GuestState.OFF,
        libvirt.VIR_DOMAIN_CRASHED: GuestState.CRASHED,
    }.get(number, GuestState.UNKNOWN)


def operation_of(libvirt: Any, number: int) -> str:
    """What a job of libvirt's does, in words."""
    return {
        libvirt.VIR_DOMAIN_JOB_OPERATION_START: "start",
        libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
        libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: "restore",
        libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "migration from another host",
        libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration to another host",
        libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
        libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
        libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
    }.get(number, "of a kind that is not known here")
