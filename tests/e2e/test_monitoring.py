"""Monitoring of a real daemon: the metrics it has, where they are told, and what makes it unhealthy."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, forget_pages, merged, noise, wait_until

from tests.unit.test_alert_rules import metrics_named
from vmfs_stub.cli.exit_codes import ExitCode

CONTENT = noise(8 * MIB, seed=11)
HASTY_DAEMON = Path(__file__).with_name("hasty_daemon.py")


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def scraped(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def values(text: str) -> dict[str, float]:
    """Samples by name with labels."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def has(datastore: LiveDatastore, name: str, value: float) -> bool:
    return values(datastore.client.metrics()).get(name) == value


def test_what_a_scrape_tells(make_datastore: MakeDatastore) -> None:
    port = free_port()
    datastore = make_datastore(merged(QUIET, {"monitoring": {"listen": f"127.0.0.1:{port}"}}))
    datastore.start()
    disk = datastore.add_vm("web", CONTENT)
    datastore.add_vm("db", CONTENT)
    wait_until("the port answers", lambda: "metrics are served at" in datastore.log())
    datastore.archive("web")
    wait_until("the archive was noted", lambda: values(scraped(port)).get("vmfs_stub_vms") == 2)
    wait_until("what is saved was seen", lambda: values(scraped(port))["vmfs_stub_saved_bytes"] > 7 * MIB)
    with disk.open("rb") as file:  # a part, or it would be an ordinary file again soon
        assert file.read(MIB) == CONTENT[:MIB]
    text = scraped(port)
    known = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    known |= {re.sub(r"[ {].*", "", line) for line in text.splitlines() if not line.startswith("#")}
    missing = metrics_named() - known - {f"{name}_total" for name in known}
    assert missing == set(), "an alert rule names a metric that no daemon has"
    found = values(text)
    assert found["vmfs_stub_placeholders"] == 1
    assert found["vmfs_stub_vms_without_point"] == 1
    assert 0 <= found['vmfs_stub_vm_point_age_seconds{vm="web"}'] < 60
    assert 'vmfs_stub_vm_point_age_seconds{vm="db"}' not in found
    assert 0 <= found["vmfs_stub_last_backup_age_seconds"] < 60
    assert found['vmfs_stub_jobs_total{kind="archive",outcome="done"}'] == 1
    assert found['vmfs_stub_store_up{place="store"}'] == 1
    assert found["vmfs_stub_healthy"] == 1
    assert found["vmfs_stub_recall_wait_seconds_count"] >= 1
    assert found["vmfs_stub_recall_waits_failed_total"] == 0
    assert found["vmfs_stub_mover_starts_total"] == 1
    assert 0 < found["vmfs_stub_primary_free_bytes"] < found["vmfs_stub_primary_size_bytes"]
    assert set(found) >= set(values(datastore.client.metrics())) - {"vmfs_stub_control_requests_total"} - {
        name for name in found if "control_requests" in name
    } - {name for name in values(datastore.client.metrics()) if "control_requests" in name}
    for path in ("/v1/status", "/", "/v1/disks"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scraped(port, path)
    datastore.client.hold()
    assert has(datastore, "vmfs_stub_recalls_held", 1)


def test_backups_that_the_store_fails_count_as_its_errors(make_datastore: MakeDatastore) -> None:
    """It is the data mover that meets them."""
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("web", CONTENT)
    name = 'vmfs_stub_store_errors_total{error="StoreUnavailable",place="store"}'
    assert name not in values(datastore.client.metrics())
    packs = datastore.store / "packs"
    assert not packs.exists()
    packs.touch()
    datastore.cli("backup", "web", check=5)
    wait_until("it is counted", lambda: values(datastore.client.metrics()).get(name, 0) > 0)


def test_a_port_that_is_taken_is_a_finding(make_datastore: MakeDatastore) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        datastore = make_datastore(merged(QUIET, {"monitoring": {"listen": f"127.0.0.1:{port}"}}))
        datastore.start()
        (finding,) = wait_until("it is found", lambda: datastore.client.status().findings)
        assert (finding.severity, finding.subject) == ("warning", "metrics")
        assert f"127.0.0.1:{port}" in finding.message
        assert datastore.client.status().healthy
        assert "vmfs_stub_healthy 1.0" in datastore.client.metrics()


@contextmanager
def without_packs(datastore: LiveDatastore) -> Iterator[None]:
    """The store has lost its packs within the block."""
    packs = datastore.store / "packs"
    hidden = packs.rename(datastore.base / "hidden")
    try:
        yield
    finally:
        hidden.rename(packs)


def unhealthy(datastore: LiveDatastore) -> str:
    """What `status` says when it ends with its exit code for that, else nothing."""
    found = datastore.cli("status")
    assert found.code in (0, ExitCode.UNHEALTHY)
    return found.out if found.code else ""


def test_status_ends_with_8_for_each_reason(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("web", CONTENT)
    datastore.archive("web")
    assert unhealthy(datastore) == ""
    forget_pages(disk)
    with without_packs(datastore), pytest.raises(OSError, match="error"):
        disk.read_bytes()
    assert "problem: VM web, disk web/disk.raw: " in unhealthy(datastore)
    assert has(datastore, "vmfs_stub_recalls_failing", 1)
    assert disk.read_bytes() == CONTENT
    assert unhealthy(datastore) == ""
    assert values(datastore.client.metrics())["vmfs_stub_recall_waits_failed_total"] >= 1
    for limits, subject in (({"free_percent_min": 99.9}, "primary"), ({"backup_age_max_hours": 0.0000001}, "backups")):
        datastore.configure({"monitoring": {"free_percent_min": 0, "backup_age_max_hours": 0, **limits}})
        datastore.cli("reload", check=0)
        assert f"problem: {subject}: " in unhealthy(datastore)
        status = json.loads(datastore.cli("status", "--json").out)
        assert status["healthy"] is False
    assert status["backups"]["last_done"] > time.time() - 600
    datastore.configure({"monitoring": {"free_percent_min": 0, "backup_age_max_hours": 1}})
    datastore.cli("reload", check=0)
    assert unhealthy(datastore) == ""


# A catalog that was lost


def points_seen(datastore: LiveDatastore) -> dict[str, float | None]:
    with closing(sqlite3.connect(datastore.backing / ".vmfs-stub/catalog.sqlite", timeout=10)) as connection:
        return dict(connection.execute("SELECT name, last_point FROM vms").fetchall())


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_a_lost_catalog_is_rebuilt(make_datastore: MakeDatastore, how: str) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("web", CONTENT)
    datastore.add_vm("db", CONTENT)
    datastore.add_vm("new", CONTENT)
    datastore.cli("backup", "db", check=0)
    datastore.cli("backup", "db", check=0)
    datastore.archive("web")
    before = points_seen(datastore)
    assert before["new"] is None
    listed, points = datastore.rows(), datastore.cli("points", "--json", check=0).out
    datastore.kill()
    catalog = datastore.backing / ".vmfs-stub/catalog.sqlite"
    for path in catalog.parent.glob("catalog.sqlite-*"):
        path.unlink()
    if how == "deleted":
        catalog.unlink()
    else:
        catalog.write_bytes(b"\xa5" * 20_000)
    hidden = datastore.store.with_name("hidden")
    datastore.store.rename(hidden)  # the store is away: that delays nothing, and it is tried again
    datastore.start(program=(HASTY_DAEMON,))
    assert [row["vm"] for row in datastore.rows()] == [row["vm"] for row in listed]
    finding = wait_until("it is told", lambda: lost(datastore))
    assert finding == "warning"
    assert points_seen(datastore)["db"] is None
    hidden.rename(datastore.store)
    wait_until("it was rebuilt", lambda: lost(datastore) == "note", deadline_s=90, poll_s=0.2)
    assert points_seen(datastore) == {
        "new": None,
        "db": pytest.approx(before["db"], abs=5),
        "web": pytest.approx(before["web"], abs=5),
    }
    for row in (*listed, *(rows := datastore.rows())):
        row.pop("last_access", None)
    assert rows == listed
    assert datastore.cli("points", "--json", check=0).out == points
    assert disk.read_bytes() == CONTENT
    wait_until("the store is seen again", lambda: datastore.client.status().healthy)
    datastore.stop()
    datastore.start()
    assert lost(datastore) is None, "it was said, and is not lost again"


def lost(datastore: LiveDatastore) -> str | None:
    found = [each for each in datastore.client.status().findings if each.subject == "catalog"]
    assert all("jobs and usage" in each.message for each in found)
    return found[0].severity if found else None


def test_a_new_datastore_has_lost_nothing(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.add_vm("web", CONTENT)
    wait_until("the catalog is complete", lambda: "the catalog knows" in datastore.log())
    assert datastore.client.status().findings == []
