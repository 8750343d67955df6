"""Backup jobs of the real daemon: many unchanged VMs, and jobs that are cancelled, killed, paused or forbidden."""

from __future__ import annotations

import json
import time
from pathlib import Path

from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, merged, noise, wait_until
from test_incremental import read_by_mover

from vmfs_stub.control.messages import JobInfo

VMS = 100
UNCHANGED_S_MAX = 60.0
"""It takes some 3 s on an idle machine."""
UNCHANGED_BYTES_MAX = VMS * 64 * 1024
SLOW = merged(QUIET, {"jobs": {"bytes_per_s_max_outside": "512 KiB"}})
"""A backup of what the tests below make takes half a minute."""


def outcomes(job: JobInfo) -> dict[str, str]:
    assert job.result is not None
    return {vm["vm"]: vm["outcome"] for vm in job.result["vms"]}


def test_a_hundred_unchanged_vms_take_seconds_and_are_not_read(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    for number in range(VMS):
        path = datastore.backing / f"vm{number:03}" / "disk.raw"
        path.parent.mkdir()
        path.write_bytes(noise(MIB, seed=number))
    datastore.start()
    first = datastore.wait_job(datastore.client.start_backup([], archive=False))
    assert set(outcomes(first).values()) == {"backed up"}
    before = read_by_mover(datastore)
    began_s = time.monotonic()
    second = datastore.wait_job(datastore.client.start_backup([], archive=False))
    took_s, read_bytes = time.monotonic() - began_s, read_by_mover(datastore) - before
    print(f"{VMS} unchanged VMs: {took_s:.2f} s, {read_bytes} bytes read")
    assert len(outcomes(second)) == VMS
    assert set(outcomes(second).values()) == {"backed up"}
    assert second.result is not None
    assert sum(vm["read_bytes"] for vm in second.result["vms"]) == 0
    assert read_bytes < UNCHANGED_BYTES_MAX
    assert took_s < UNCHANGED_S_MAX


def slow_datastore(make_datastore: MakeDatastore) -> LiveDatastore:
    datastore = make_datastore(SLOW)
    datastore.start()
    for number, name in enumerate(("a", "b", "c")):
        datastore.add_vm(name, noise(8 * MIB, seed=number))
    return datastore


def copying(datastore: LiveDatastore, job_id: str) -> bool:
    return datastore.client.job(job_id).progress.done_bytes > 0  # type: ignore[arg-type]


def test_a_job_is_shown_and_cancelled(make_datastore: MakeDatastore) -> None:
    datastore = slow_datastore(make_datastore)
    job_id = datastore.client.start_archive(["a", "b", "c"])
    wait_until("it copies", lambda: copying(datastore, job_id))
    assert job_id in datastore.cli("jobs", check=0).out
    shown = datastore.cli("jobs", job_id, check=0).out
    assert "running" in shown
    assert "archive of" in shown
    assert "is cancelled" in datastore.cli("jobs", "--cancel", job_id, check=0).out
    cancelled = datastore.client.job(job_id)
    assert cancelled.state == "cancelled"
    assert outcomes(cancelled) == {"a": "cancelled", "b": "cancelled", "c": "not tried"}
    assert [datastore.state(name) for name in "abc"] == ["resident"] * 3
    assert datastore.cli("jobs", "--cancel", job_id).code == 4
    assert datastore.cli("jobs", "f" * 32).code == 3
    datastore.stop()
    datastore.configure({"jobs": {"bytes_per_s_max_outside": 0}})
    datastore.start()
    assert [job["state"] for job in json.loads(datastore.cli("jobs", "--json", check=0).out)] == ["cancelled"]
    assert set(outcomes(datastore.archive("a", "b", "c")).values()) == {"archived"}


def test_a_job_that_a_crash_interrupts_is_shown_and_gone_on_with(make_datastore: MakeDatastore) -> None:
    datastore = slow_datastore(make_datastore)
    datastore.configure({"jobs": {"bytes_per_s_max_outside": 0}})
    datastore.restart()
    datastore.wait_job(datastore.client.start_backup(["a", "b"], archive=False))
    datastore.configure({"jobs": {"bytes_per_s_max_outside": "512 KiB"}})
    datastore.restart()
    job_id = datastore.client.start_backup([], archive=False)
    wait_until("a is done", lambda: {"a", "b"} <= set(outcomes_so_far(datastore, job_id)))
    datastore.crash()
    interrupted = datastore.client.job(job_id)
    assert interrupted.state == "interrupted"
    datastore.configure({"jobs": {"bytes_per_s_max_outside": 0}})
    datastore.restart()
    again = datastore.wait_job(datastore.client.start_backup([], archive=False))
    assert again.result is not None
    assert {vm["vm"]: vm["read_bytes"] for vm in again.result["vms"]} == {"a": 0, "b": 0, "c": 8 * MIB}


def outcomes_so_far(datastore: LiveDatastore, job_id: str) -> dict[str, str]:
    info = datastore.client.job(job_id)  # type: ignore[arg-type]
    return {} if info.result is None else outcomes(info)


def test_a_pause_outlives_the_daemon(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("a", noise(MIB, seed=1))
    datastore.cli("jobs", "--pause", check=0)
    assert "backup jobs are paused" in datastore.cli("status", check=0).out
    datastore.crash()
    refused = datastore.cli("backup")
    assert refused.code == 4
    assert "jobs --unpause" in refused.err
    assert "would be backed up" in datastore.cli("backup", "--dry-run", check=0).out
    datastore.cli("jobs", "--unpause", check=0)
    assert "a: backed up" in datastore.cli("backup", check=0).out
    assert json.loads(datastore.cli("status", "--json", check=0).out)["daemon"]["jobs_paused"] is False


def test_hooks_are_told_and_can_forbid(make_datastore: MakeDatastore, base: Path) -> None:
    datastore = make_datastore(QUIET)
    said = base / "said"
    before, after = base / "before", base / "after"
    before.write_text('#!/bin/sh\n[ "$VMFS_STUB_VM" != b ] || { echo "b is being moved" >&2; exit 3; }\n')
    after.write_text(f'#!/bin/sh\necho "$VMFS_STUB_WHAT $VMFS_STUB_VM: $VMFS_STUB_OUTCOME" >> {said}\n')
    for hook in (before, after):
        hook.chmod(0o755)
    # The settings of the tests are plain values: lists are written by hand.
    text = datastore.config.read_text()
    hooks = f'[hooks]\nbefore = ["{before}"]\nafter = ["{after}"]\n'
    datastore.config.write_text(text.replace("[hooks]\n", hooks))
    datastore.start()
    for name in ("a", "b"):
        datastore.add_vm(name, noise(MIB, seed=1))
    done = datastore.cli("backup", check=0)
    assert "a: backed up" in done.out
    assert "b: skipped (the hook" in done.out
    assert "b is being moved" in done.out
    assert sorted(said.read_text().splitlines())[0] == "backup a: backed up"
