"""How a daemon that cannot start says why: by what is wrong and what to do, never as a bug."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config, parse_config
from vmfs_stub.core.errors import DatastoreLocked, PrimaryIOError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import Counters, GuestState, Reading
from vmfs_stub.daemon import has_met_domains, look_at_placeholders
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.guest_notes import GuestNote
from vmfs_stub.services.datastore_lock import take_lock
from vmfs_stub.services.placeholder_index import PlaceholderIndex

HOLDER = """
import sys
from pathlib import Path
from vmfs_stub.services.datastore_lock import take_lock
take_lock(Path(sys.argv[1]), backing=Path(sys.argv[1]).parent.parent)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    (tmp_path / "backing").mkdir()
    path = tmp_path / "config.toml"
    path.write_text(f"""
[datastore]
name = "main"
backing = "{tmp_path}/backing"
mountpoint = "{tmp_path}/mount"
runtime_dir = "{tmp_path}/run"
[store]
url = "file://{tmp_path}/store"
""")
    return path


@pytest.fixture
def config(config_path: Path) -> Config:
    return parse_config(config_path.read_text(), origin="c.toml")


def test_a_backing_directory_that_is_gone(config: Config) -> None:
    config.datastore.backing.rmdir()
    with pytest.raises(PrimaryIOError, match=r"is the backing filesystem mounted, and are you root\?"):
        take_lock(config.lock_path, backing=config.datastore.backing)


@pytest.mark.parametrize("name", ["backing/.vmfs-stub/maps", "run"])
def test_private_state_that_cannot_be_made(config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(PrimaryIOError, match=f"{name}.*: .*; check that the filesystems") as raised:
        look_at_placeholders(config, FileCalls(), PlaceholderIndex())
    assert isinstance(raised.value.__cause__, OSError)


def test_a_backing_directory_that_cannot_be_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("vmfs_stub.services.recovery.walk", failing)
    with pytest.raises(PrimaryIOError, match=r"cannot look at the placeholders of .*backing: Input/output error"):
        look_at_placeholders(config, FileCalls(), PlaceholderIndex())


def test_the_lock_is_held_until_the_process_is_gone(config: Config) -> None:
    command = [sys.executable, "-c", HOLDER, str(config.lock_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(DatastoreLocked, match=f"pid {holder.pid}"):
            take_lock(config.lock_path, backing=config.datastore.backing)
    finally:
        holder.kill()
        holder.communicate()
    probe = subprocess.run(command, input=b"", capture_output=True, check=True)
    assert probe.stdout == b"locked\n"


def test_whether_an_earlier_daemon_knew_domains(config: Config, tmp_path: Path) -> None:
    private, _ = look_at_placeholders(config, FileCalls(), PlaceholderIndex())
    with closing(Catalog.open(tmp_path / "catalog.sqlite")) as catalog:
        assert not has_met_domains(catalog, private)
        note = GuestNote(VmId("1" * 32), "2" * 32, 1)
        for notes in (private.stopped, private.thaws):
            notes.add(note)
            assert has_met_domains(catalog, private), "a guest is to be started again, or thawed"
            notes.remove(note)
        assert not has_met_domains(catalog, private)
        catalog.add_samples((), readings={"2" * 32: Reading(1.0, GuestState.OFF, Counters())})
        assert has_met_domains(catalog, private)
        catalog.add_samples((), readings={})
        assert not has_met_domains(catalog, private), "they are undefined"


def test_where_nobody_can_tell_whether_there_were_domains_there_were(config: Config, tmp_path: Path) -> None:
    private, _ = look_at_placeholders(config, FileCalls(), PlaceholderIndex())
    with closing(Catalog.open(tmp_path / "catalog.sqlite")) as catalog:
        with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection, connection:
            connection.execute("DROP TABLE readings")
        assert has_met_domains(catalog, private)
