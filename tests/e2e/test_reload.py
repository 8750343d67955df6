"""A running daemon takes what it can of a changed configuration, and never half of it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from live_datastore import (
    MIB,
    QUIET,
    SMALL_ENDS,
    LiveDatastore,
    MakeDatastore,
    forget_pages,
    merged,
    noise,
    wait_until,
)

from scripts.lab.s3_server import Bucket, S3Account, add_key, remove_key
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.core.errors import ObjectMissing, StoreDenied

CONTENT = noise(24 * MIB, seed=21)


@contextmanager
def reading(disk: Path, content: bytes, *, piece: int = 128 << 10) -> Iterator[list[str]]:
    """Within the block somebody reads the disk, from its end to its beginning, again and again; yields what fails."""
    wrong: list[str] = []
    enough = threading.Event()

    def read() -> None:
        while True:
            fd = os.open(disk, os.O_RDONLY)
            try:
                for offset in range(len(content) - piece, -1, -piece):
                    if os.pread(fd, piece, offset) != content[offset : offset + piece]:
                        wrong.append(f"other bytes at {offset}")
                    if enough.is_set():
                        return
            except OSError as exc:
                wrong.append(str(exc))
                return
            finally:
                os.close(fd)
            forget_pages(disk)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield wrong
    finally:
        enough.set()
        thread.join(60)
        assert not thread.is_alive()


def test_limits_change_while_guests_read(make_datastore: MakeDatastore) -> None:
    slow = {"hydration": {"bytes_per_s_max": "64 KiB"}, "recall": {"recall_concurrency": 1}}
    datastore = make_datastore(merged(SMALL_ENDS, slow))
    datastore.start()
    disk = datastore.add_vm("web", CONTENT)
    datastore.archive("web")
    assert datastore.cli("reload", check=0).out == "nothing has changed\n"
    with disk.open("rb") as file:
        assert file.read(4096) == CONTENT[:4096]  # from now on the rest comes back, at 64 KiB/s: six minutes
    wait_until("it comes back", lambda: datastore.state("web") == "recalling")
    with reading(disk, CONTENT[: 2 * MIB]) as wrong:
        for deadline_s, concurrency in ((9, 4), (8, 2), (7, 8)):
            limits = {"recall_deadline_s": deadline_s, "recall_concurrency": concurrency}
            datastore.configure({"recall": limits})
            datastore.cli("reload", check=0)
        assert datastore.state("web") == "recalling"
        datastore.configure({"hydration": {"bytes_per_s_max": 0}})
        assert datastore.cli("reload", check=0).out == "changed: hydration.bytes_per_s_max\n"
        wait_until("all of it is back soon", lambda: datastore.state("web") == "resident")
    assert wrong == []
    assert disk.read_bytes() == CONTENT


def test_what_cannot_change_is_refused_with_all_else(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(merged(QUIET, {"retention": {"keep_last": 1}}))
    datastore.start()
    datastore.add_vm("web", CONTENT[:MIB])
    good = datastore.config.read_text()
    datastore.configure({"retention": {"keep_last": 7}, "primary": {"threads": 3}, "mount": {"max_background": 99}})
    refused = datastore.cli("reload")
    assert refused.code == ExitCode.USAGE
    lines = datastore.config.read_text().splitlines()
    for key, wanted in (("primary.threads", "threads = 3"), ("mount.max_background", "max_background = 99")):
        place = f"{datastore.config}:{lines.index(wanted) + 1}:1: {key}: cannot change while the daemon runs"
        assert place in refused.err
    assert "retention" not in refused.err
    for _ in range(2):
        datastore.cli("backup", "web", check=0)
    assert len(datastore.cli("points", "web", check=0).out.splitlines()) == 2, "one point and the heading: as before"
    datastore.config.write_text(good.replace("\n[store]\n", "\n[store]\nno_such_key = 1\n"))
    assert datastore.daemon is not None
    datastore.daemon.send_signal(signal.SIGHUP)
    (finding,) = wait_until("it is told", lambda: datastore.client.status().findings)
    assert (finding.severity, finding.subject) == ("warning", "configuration")
    assert "no such key" in finding.message
    datastore.config.write_text(good)
    datastore.configure({"retention": {"keep_last": 2}})
    datastore.daemon.send_signal(signal.SIGHUP)
    wait_until("it is settled", lambda: not datastore.client.status().findings)
    for _ in range(2):
        datastore.cli("backup", "web", check=0)
    assert len(datastore.cli("points", "web", check=0).out.splitlines()) == 3
    assert datastore.client.status().healthy


@pytest.fixture
def server_home(bucket: Bucket, testrun_uid: str) -> Path:
    """Where the S3 server of this run of the tests is at home."""
    return Path(tempfile.gettempdir()) / f"vmfs-stub-s3-{testrun_uid[:12]}"


def is_refused(bucket: Bucket, account: S3Account) -> bool:
    with suppress(ObjectMissing):
        try:
            replace(bucket, account=account).objects().size("vmfs-stub/none")
        except StoreDenied:
            return True
    return False


def configure_key(datastore: LiveDatastore, account: S3Account) -> None:
    named = {"access_key_id": account.access_key_id, "secret_access_key": account.secret_access_key}
    datastore.configure({"store": named})


def test_credentials_change_while_guests_read(
    make_datastore: MakeDatastore, bucket: Bucket, server_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = add_key(server_home), add_key(server_home)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", bucket.account.access_key_id),
        ("AWS_SECRET_ACCESS_KEY", bucket.account.secret_access_key),
    ):
        monkeypatch.setenv(name, value)
    datastore = make_datastore(QUIET, store=bucket.url())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    configure_key(datastore, old)
    datastore.start()
    disk = datastore.add_vm("web", CONTENT)
    datastore.archive("web")
    with reading(disk, CONTENT) as wrong:
        configure_key(datastore, replace(new, secret_access_key="wrong"))
        refused = datastore.cli("reload")
        assert refused.code == ExitCode.USAGE
        assert "credentials in [store] are refused" in refused.err
        assert "nothing was changed" in refused.err
        assert "wrong" not in refused.err
        configure_key(datastore, new)
        changed = datastore.cli("reload", check=0).out.splitlines()
        assert changed == ["changed: store.access_key_id", "changed: store.secret_access_key"]
    assert wrong == []
    remove_key(server_home, old)
    wait_until("the server refuses the old key", lambda: is_refused(bucket, old))
    assert not is_refused(bucket, new)
    datastore.recall("web")  # by the mover
    assert disk.read_bytes() == CONTENT
    datastore.archive("web")
    assert disk.read_bytes() == CONTENT  # by the daemon
    assert datastore.client.status().healthy
    assert new.secret_access_key not in datastore.log()
