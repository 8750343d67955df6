"""What libvirt's statistics say of a guest: a part that is missing makes a sum unknown, never small."""

from __future__ import annotations

from typing import Any

from vmfs_stub.core.usage import Counters
from vmfs_stub.inventory.libvirt_stats import counters_of

WHOLE: dict[str, Any] = {
    "cpu.time": 2_500_000_000,
    "vcpu.maximum": 1,
    "vcpu.0.state": 1,
    "vcpu.0.time": 2_000_000_000,
    "net.count": 2,
    **{f"net.{number}.{way}.bytes": 10 for number in range(2) for way in ("rx", "tx")},
    "block.count": 2,
    **{f"block.{number}.path": "/x" for number in range(2)},
    **{f"block.{number}.{key}": value for number in range(2) for key, value in
       {"rd.bytes": 100, "wr.bytes": 20, "rd.reqs": 3, "wr.reqs": 4}.items()},
}  # fmt: skip


def without(*keys: str) -> Counters:
    return counters_of({key: value for key, value in WHOLE.items() if key not in keys})


def test_sums() -> None:
    assert counters_of(WHOLE) == Counters(2.5, 200, 40, 14, 40)


def test_without_cgroups_the_processors_threads_are_counted() -> None:
    assert without("cpu.time").cpu_s == 2.0
    assert without("cpu.time", "vcpu.0.time").cpu_s is None
    # One that is not plugged in has used nothing.
    assert without("cpu.time", "vcpu.0.time", "vcpu.0.state").cpu_s == 0.0


def test_a_missing_part_makes_the_sum_unknown() -> None:
    assert without("net.1.tx.bytes").network_bytes is None
    assert without("net.count").network_bytes is None
    assert without("block.1.rd.bytes").read_bytes is None
    assert without("block.1.rd.bytes").written_bytes == 40
    assert without("block.0.wr.reqs").requests is None
    assert counters_of({}) == Counters()


def test_a_drive_without_a_medium_counts_nothing() -> None:
    keys = ("path", "rd.bytes", "wr.bytes", "rd.reqs", "wr.reqs")
    assert without(*(f"block.1.{key}" for key in keys)) == Counters(2.5, 100, 20, 7, 40)


def test_a_guest_without_a_network_used_none() -> None:
    assert counters_of({**WHOLE, "net.count": 0}).network_bytes == 0
