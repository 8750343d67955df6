"""Two hosts at one backing directory, where a lock of one does not reach the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_datastore import DEADLINE_S, MIB, QUIET, LiveDatastore, MakeDatastore, detach, noise, wait_until
from other_host_daemon import PACE

from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.mount.mountpoint import is_dead

PROGRAM = Path(__file__).with_name("other_host_daemon.py")
CONTENT = noise(4 * MIB, seed=1)


@pytest.fixture
def hosts(make_datastore: MakeDatastore) -> tuple[LiveDatastore, LiveDatastore]:
    """Two hosts that are to serve the same backing directory, of which the first does."""
    first = make_datastore(QUIET)
    first.start(program=(PROGRAM, "first"))
    first.add_vm("web", CONTENT)
    first.archive("web")
    second = make_datastore(QUIET, store=first.store)
    second.backing = first.backing
    second.config.unlink()
    detach(second.mountpoint)
    second.init(QUIET)
    return first, second


def without_locks(datastore: LiveDatastore) -> None:
    """As on a filesystem whose locks do not reach the other host."""
    for name in ("lock", "mover.lock"):
        (datastore.backing / ".vmfs-stub" / name).unlink()


def start_refused(datastore: LiveDatastore, machine: str) -> str:
    """What a start says that must not succeed."""
    command = [sys.executable, PROGRAM, machine, "--config", datastore.config, "mount"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == ExitCode.REFUSED, done
    return done.stderr


def test_one_host_is_refused_while_the_other_serves_and_follows_it_when_it_is_gone(
    hosts: tuple[LiveDatastore, LiveDatastore],
) -> None:
    first, second = hosts
    without_locks(first)
    assert "host-of-the-test" in start_refused(second, "second")
    assert "host-of-the-test" in second.cli("doctor").out
    left = second.cli("leave")
    assert left.code == ExitCode.UNREACHABLE, left
    assert first.state("web") == "placeholder"
    first.kill()
    second.start(program=(PROGRAM, "second"))
    assert "taking over" in second.log()
    assert (second.mountpoint / "web/disk.raw").read_bytes() == CONTENT
    second.stop()
    assert not (second.backing / ".vmfs-stub/serving").exists()


def test_one_that_stood_still_and_was_followed_writes_nothing_and_ends(
    hosts: tuple[LiveDatastore, LiveDatastore],
) -> None:
    first, second = hosts
    without_locks(first)
    assert first.daemon is not None
    first.daemon.send_signal(signal.SIGSTOP)
    second.start(program=(PROGRAM, "second"))
    with (second.mountpoint / "web/disk.raw").open("r+b") as disk:
        disk.write(b"second")
        os.fsync(disk.fileno())
    first.daemon.send_signal(signal.SIGCONT)
    assert first.daemon.wait(DEADLINE_S) == 1
    assert "ending at once: host 'host-of-the-test'" in first.log()
    assert is_dead(first.mountpoint)
    assert (second.mountpoint / "web/disk.raw").read_bytes() == b"second" + CONTENT[6:]


def test_one_that_stood_still_and_was_not_followed_goes_on(hosts: tuple[LiveDatastore, LiveDatastore]) -> None:
    first, _ = hosts
    assert first.daemon is not None
    first.daemon.send_signal(signal.SIGSTOP)
    time.sleep(PACE.held_s + 1)
    first.daemon.send_signal(signal.SIGCONT)
    with (first.mountpoint / "web/disk.raw").open("r+b") as disk:
        disk.write(b"after")
        os.fsync(disk.fileno())
    assert first.daemon.poll() is None


def test_after_a_kill_the_same_host_waits_for_nothing(hosts: tuple[LiveDatastore, LiveDatastore]) -> None:
    first, _ = hosts
    first.kill()
    assert (first.backing / ".vmfs-stub/serving").exists()
    first.start(program=(PROGRAM, "first"))
    assert "watching" not in first.log()
    wait_until("the mark is there", (first.backing / ".vmfs-stub/serving").exists)
