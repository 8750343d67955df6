"""The units for systemd: systemd takes them, and they say what keeps a datastore safe."""

from __future__ import annotations

import configparser
import shutil
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from vmfs_stub.cli import init
from vmfs_stub.control.readiness import tell_ready

UNITS = Path(str(resources.files("vmfs_stub").joinpath("units")))
NAMES = ("vmfs-stub-backup@.service", "vmfs-stub-backup@.timer", "vmfs-stub@.service")


def unit(name: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=True)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string((UNITS / name).read_text(encoding="utf-8"))
    return parsed


def test_these_are_shipped() -> None:
    assert sorted(path.name for path in UNITS.iterdir()) == sorted(NAMES)


def test_init_says_how_systemd_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(init, "_SYSTEMD_RUNS", tmp_path)
    target = Path("/etc/vmfs-stub/vms.toml")
    init._say_units(target)
    said = capsys.readouterr().out
    assert f"cp {UNITS}/* /etc/systemd/system/" in said
    assert "enable --now vmfs-stub@vms.service vmfs-stub-backup@vms.timer" in said
    assert "unmount" not in said
    init._say_units(target, is_mounted=True)
    said = capsys.readouterr().out
    assert 0 < said.index(f"vmfs-stub --config {target} unmount") < said.index("systemctl enable")
    init._say_units(tmp_path / "vms.toml")
    init._say_units(target.parent / "sub/vms.toml")
    assert capsys.readouterr().out == ""


def test_what_keeps_a_datastore_safe() -> None:
    service = unit("vmfs-stub@.service")
    assert service["Service"]["RuntimeDirectoryPreserve"] == "yes"
    assert service["Service"]["Type"] == "notify"
    assert "libvirt-guests.service" in service["Unit"]["Before"]
    timer = unit("vmfs-stub-backup@.timer")["Timer"]
    assert timer["Persistent"] == "true"
    assert timer["RandomizedDelaySec"]
    assert timer["Unit"] == "vmfs-stub-backup@%i.service"
    backup = unit("vmfs-stub-backup@.service")
    assert backup["Service"]["ExecStart"].endswith(" backup")
    assert backup["Unit"]["Requires"] == backup["Unit"]["After"] == "vmfs-stub@%i.service"


@pytest.mark.parametrize("spoiled", [False, True])
def test_systemd_takes_them(tmp_path: Path, spoiled: bool) -> None:
    """And would not take one with a key that it does not know."""
    analyze = shutil.which("systemd-analyze")
    assert analyze is not None, "the package systemd is missing"
    program = Path(sys.executable).with_name("vmfs-stub")
    for name in NAMES:
        text = (UNITS / name).read_text(encoding="utf-8").replace("=vmfs-stub ", f"={program} ")
        text = text.replace("=-vmfs-stub ", f"=-{program} ")
        if spoiled:
            text = text.replace("Persistent=true", "Persistant=true")
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = ["vmfs-stub@try.service", "vmfs-stub-backup@try.service", "vmfs-stub-backup@try.timer"]
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "vmfs-stub" in line]
    assert bool(complaints) is spoiled, done.stderr


def test_readiness_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(10)
        receiver.bind(str(tmp_path / "notify"))
        tell_ready({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert receiver.recv(100) == b"READY=1"
    tell_ready({})


def test_a_manager_that_is_not_there_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell_ready({"NOTIFY_SOCKET": str(tmp_path / "missing")})
    assert "cannot be told" in caplog.text
