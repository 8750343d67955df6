"""Retention by the real daemon and commands: what goes after a backup, by hand, and of a VM that was deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, merged, noise

from vmfs_stub.cli.exit_codes import ExitCode

CONTENT = noise(2 * MIB, seed=77)


def points_of(datastore: LiveDatastore, vm: str) -> list[dict[str, Any]]:
    rows = json.loads(datastore.cli("points", "--json", check=0).out)
    return [row for row in rows if row["vm"] == vm]


def back_up(datastore: LiveDatastore) -> str:
    return datastore.cli("backup", "vm", check=0).out


def test_a_backup_forgets_what_no_rule_keeps(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(
        merged(QUIET, {"archive": {"placeholder_bytes_min": "1 MiB"}, "retention": {"keep_last": 2}})
    )
    datastore.start()
    datastore.add_vm("vm", CONTENT)
    assert [back_up(datastore) for _ in range(3)] == [
        "vm: backed up\n",
        "vm: backed up\n",
        "vm: backed up (older restore points forgotten: 1)\n",
    ]
    before = [row["point"] for row in points_of(datastore, "vm")]
    assert len(before) == 2
    marks = json.loads(datastore.cli("points", "--forgotten", "--json", check=0).out)
    assert [mark["why"] for mark in marks] == ["not kept by keep_last 2"]
    assert sorted(path.parent.name for path in Path(datastore.store, "forgotten").glob("*/*")) == [marks[0]["vm_id"]]
    datastore.archive("vm")
    (older, pinned) = points_of(datastore, "vm")
    assert (older["point"], older["pins"], pinned["pins"], pinned["deleted"]) == (before[1], 0, 1, False)
    refused = datastore.cli("forget", f"vm@{pinned['point']}", check=ExitCode.REFUSED)
    assert "needed by 1 placeholder in datastore" in refused.err
    datastore.cli("forget", f"vm@{older['point'][:8]}", check=0)
    assert [row["point"] for row in points_of(datastore, "vm")] == [pinned["point"]]
    datastore.recall("vm")
    assert (datastore.mountpoint / "vm/disk.raw").read_bytes() == CONTENT
    datastore.restart()
    shutil.rmtree(datastore.mountpoint / "vm")
    assert [(row["deleted"], row["pins"]) for row in points_of(datastore, "vm")] == [(True, 0)]
    kept = json.loads(datastore.cli("forget", "--by-rules", "--json", check=0).out)
    assert [(row["kept"], row["why"]) for row in kept] == [(True, "deleted, and keep_deleted_days is not set")]
