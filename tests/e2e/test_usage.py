"""What counts as use of a VM with a real daemon: what a hypervisor does with its disks, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, forget_pages, merged, noise, wait_until

SIZE = 4 * MIB
INTERVAL_S = 1


@pytest.fixture
def datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(merged(QUIET, {"usage": {"interval_s": INTERVAL_S}}))
    made.start()
    return made


@pytest.fixture
def hypervisor(base: Path) -> Path:
    """An executable with a hypervisor's name: it reads what it is told, as dd does."""
    path = base / "qemu-system-x86_64"
    shutil.copy2("/usr/bin/dd", path)
    return path


def usage(datastore: LiveDatastore, vm: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(datastore.cli("usage", vm, "--days", "1", "--json", check=0).out)
    return found


def spans(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [span for span in found["spans"] if not span["is_gap"]]


def read(program: str | Path, disk: Path) -> None:
    forget_pages(disk)
    subprocess.run([program, f"if={disk}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)


def sampled_since(datastore: LiveDatastore, vm: str, at_s: float) -> Mapping[str, Any]:
    """What is known once two rounds have passed after ``at_s``."""

    def look() -> Mapping[str, Any] | None:
        found = usage(datastore, vm)
        ends = [span["end"] for span in spans(found)]
        return found if ends and ends[-1] > at_s + 2 * INTERVAL_S else None

    return wait_until("it was sampled", look, poll_s=0.2)


def test_only_a_hypervisor_uses_a_disk(datastore: LiveDatastore, hypervisor: Path, base: Path) -> None:
    disk = datastore.add_vm("vm", noise(SIZE, seed=1))
    read("dd", disk)
    shutil.copy(disk, base / "copy.raw")
    forget_pages(disk)
    subprocess.run(["cp", disk, base / "other.raw"], check=True)
    seen = sampled_since(datastore, "vm", time.time())
    assert (seen["state"], seen["last_open"], seen["last_io"], seen["domains"]) == ("off", None, None, [])
    assert sum(span["read_bytes"] + span["requests"] + span["running_s"] for span in spans(seen)) == 0
    assert sum(span["off_s"] for span in spans(seen)) > 0
    assert spans(seen)[-1]["disk_bytes_per_s_max"] == 0

    before_s = time.time()
    read(hypervisor, disk)
    write = [hypervisor, "if=/dev/zero", f"of={disk}", "conv=notrunc", "bs=1M", "count=1"]
    subprocess.run(write, check=True, capture_output=True)
    seen = sampled_since(datastore, "vm", time.time())
    assert before_s <= seen["last_open"] <= seen["last_io"] <= time.time()
    assert sum(span["read_bytes"] for span in spans(seen)) == SIZE
    assert sum(span["written_bytes"] for span in spans(seen)) == MIB
    assert sum(span["requests"] for span in spans(seen)) > 0
    assert sum(span["unknown_s"] for span in spans(seen)) > 0
    (row,) = datastore.rows()
    assert float(str(row["last_access"])) >= before_s


def test_a_running_hypervisor_and_a_restart(datastore: LiveDatastore, hypervisor: Path) -> None:
    disk = datastore.add_vm("vm", noise(SIZE, seed=2))
    # It holds the disk open and waits: for what it would write into a pipe that nobody reads.
    held = subprocess.Popen([hypervisor, f"if={disk}", "bs=64K"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        seen = sampled_since(datastore, "vm", time.time() + 2)
        assert seen["state"] == "running"
        assert sum(span["running_s"] for span in spans(seen)) > 0
        assert spans(seen)[-1]["cpu_percent_max"] is None
        opened_s = seen["last_open"]
    finally:
        held.kill()
        held.communicate()
    wait_until("it is closed", lambda: usage(datastore, "vm")["state"] == "off", poll_s=0.2)
    datastore.restart()
    stopped_s = time.time()
    seen = sampled_since(datastore, "vm", stopped_s)
    assert (seen["state"], seen["last_open"]) == ("off", opened_s)
    shown = datastore.cli("usage", "vm", "--days", "1", check=0).out
    assert shown.startswith("vm: off; by a hypervisor last opened ")
    first = shown.splitlines()[2].split("\t")
    assert first[2] == "gap"
    assert len(first) == len(shown.splitlines()[1].split("\t"))


def test_an_unknown_vm(datastore: LiveDatastore) -> None:
    assert "no VM is called" in datastore.cli("usage", "nobody", check=3).err
