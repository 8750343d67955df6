"""The command line: output, exit codes, and what `mount --background` and `init` promise."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from command_line import Run, runner
from store_points import back_up
from typer.testing import CliRunner

from vmfs_stub.cli import host_checks
from vmfs_stub.cli import main as cli
from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.cli.output import bytes_text
from vmfs_stub.config import load_config
from vmfs_stub.config.policy import IdleConfig, RuleConfig
from vmfs_stub.control.client import ControlClient
from vmfs_stub.core.errors import DaemonUnreachable
from vmfs_stub.core.policy import DEFAULT_RULE
from vmfs_stub.core.times import time_text
from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.mount import syscalls
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store

HERE = Path(__file__).parent
LS_FIELDS = [
    "vm",
    "disk",
    "path",
    "state",
    "size_bytes",
    "resident_bytes",
    "restore_points",
    "last_access",
    "protected",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return runner(monkeypatch, capsys, config=tmp_path / "config.toml")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose directories are all in tmp_path; nothing but the store directory's parent exists."""
    path = tmp_path / "config.toml"
    path.write_text(
        f'[datastore]\nname = "t"\nbacking = "{tmp_path}/backing"\nmountpoint = "{tmp_path}/vms"\n'
        f'runtime_dir = "{tmp_path}/run"\n[store]\nurl = "file://{tmp_path}/store"\n'
        "[control]\nrequest_timeout_s = 20\nstart_timeout_s = 20\n"
    )
    return path


StartDaemon = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_daemon(config: Path, tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts fake daemons in processes of their own; all are ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> subprocess.Popen[str]:
        (tmp_path / "run").mkdir(exist_ok=True, mode=0o700)
        where = (tmp_path / "run/control.sock", "--backing", tmp_path / "backing")
        command = [sys.executable, HERE / "control_fakes.py", *where, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


COMMANDS = (
    *("init", "mount", "unmount", "ls", "backup", "archive", "recall", "restore", "points", "verify", "scrub"),
    *(
        "adopt",
        "forget",
        "gc",
        "leave",
        "policy",
        "protect",
        "unprotect",
        "hold",
        "unhold",
        "status",
        "doctor",
        "store",
    ),
)
HEAVY = (
    "pydantic",
    "starlette",
    "hypercorn",
    "trio",
    "prometheus_client",
    "obstore",
    "blake3",
    "cryptography",
    "rich.progress",
)


def test_help_names_all_commands_and_imports_little() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert "..." not in result.output.replace("[ARGS]...", "")  # no summary is cut
    for command in COMMANDS:
        assert f"\n  {command} " in result.output
    check = f"import sys, vmfs_stub.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    imported = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert imported.stdout == "[]\n"


def test_the_version_is_the_packages(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out.split()) == (0, ["vmfs-stub", metadata.version("vmfs-stub")])


def test_usage_errors_are_2(run: Run) -> None:
    assert run("no-such-command").code == ExitCode.USAGE
    assert run("recall").code == ExitCode.USAGE
    missing = run("--config", "/nonexistent/x.toml", "ls")
    assert (missing.code, missing.out) == (ExitCode.USAGE, "")
    assert "/nonexistent/x.toml: no such file" in missing.err


def test_no_daemon_is_7(run: Run, config: Path) -> None:
    for command in (["ls"], ["status"], ["hold"], ["backup"], ["recall", "db"], ["unmount"]):
        result = run(*command)
        assert result.code == ExitCode.UNREACHABLE, result
        assert "no daemon answers" in result.err


def test_policy(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    rows = json.loads(run("policy", "--json").out)
    assert [(row["vm"], row["archives"], row["numbers"]) for row in rows] == [
        ("db", False, {"used_s": 0.0}),
        ("web", True, {"used_s": 0.0}),
    ]
    assert run("policy").out.splitlines() == [
        "VM\tSTATE\tDECISION\tRULE\tFREES\tSECONDS\tREASON",
        "db\toff\tkeep\t-\t1.0 GiB\t9\tno rule is for it",
        "web\toff\tarchive\tdefault\t1.0 GiB\t9\toff for 14 days",
    ]


def test_protect(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    assert run("protect", "db", "web").out.startswith("protected: db, web; `vmfs-stub unprotect`")
    assert run("unprotect", "db").out == "no longer protected by `protect`: db\n"
    assert run("protect", "nope").code == ExitCode.NOT_FOUND
    assert run("protect").code == ExitCode.USAGE


def test_ls(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    rows = json.loads(run("ls", "--json").out)
    assert [list(row) for row in rows] == [LS_FIELDS, LS_FIELDS]
    assert (rows[0]["state"], rows[0]["last_access"]) == ("placeholder", None)
    assert [row["vm"] for row in json.loads(run("ls", "web", "--json").out)] == ["web"]
    lines = run("ls").out.splitlines()
    assert lines[1] == "db\tdisk.raw\tplaceholder\t1.0 GiB\t4.0 KiB\t2\t-\t-"
    unknown = run("ls", "nope")
    assert (unknown.code, unknown.out) == (ExitCode.NOT_FOUND, "")
    assert "no VM is called 'nope'" in unknown.err
    assert run("ls", os.fsdecode(b"bad\xff")).code == ExitCode.NOT_FOUND


def test_usage(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    found = json.loads(run("usage", "web", "--json").out)
    assert (found["vm"], found["domains"], len(found["spans"])) == ("web", ["dom"], 2)
    at = [time_text(1_790_000_000.0 + hours * 3600) for hours in (0, 2, 4)]
    assert run("usage", "web", "--days", "3").out.splitlines() == [
        f"web: off, domain dom; by a hypervisor last opened {at[0]}, last read or written -",
        "FROM\tTO\tOFF\tRAN\tUNKNOWN\tCPU\tCPU MAX\tREAD\tWRITTEN\tDISK MAX\tNETWORK\tNETWORK MAX",
        f"{at[0]}\t{at[1]}\tgap\tgap\t2.0 h\t-\t-\t-\t-\t-\t-\t-",
        f"{at[1]}\t{at[2]}\t0.5 h\t1.0 h\t0.5 h\t2.2 %\t50.0 %\t1.0 MiB\t0 B\t2.0 KiB/s\t0 B\t-",
    ]
    assert run("usage", "nope").code == ExitCode.NOT_FOUND
    assert run("usage", "web", "--days", "731").code == ExitCode.USAGE


def test_jobs_are_followed_to_their_outcome(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    done = run("backup", "db", "web", "--no-archive")
    assert (done.code, done.out) == (0, "db: done (2 bytes)\nweb: done (2 bytes)\n")
    partly = run("backup", "db", "big")
    assert (partly.code, partly.out) == (ExitCode.STORE, "db: done (2 bytes)\n")
    assert "big: failed: no room" in partly.err
    damaged = run("archive", "damaged")
    assert damaged.code == ExitCode.INTEGRITY
    assert "does not decode" in damaged.err
    bug = run("archive", "bug")
    assert bug.code == ExitCode.FAILED
    assert "ValueError" in bug.err
    started = run("recall", "db", "--no-wait")
    assert started.code == 0
    assert len(started.out.strip()) == 32
    assert run("recall", "db").out == "db: done (2 bytes)\n"


def test_adopt(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    assert run("adopt", "db").out == "db: done (2 bytes)\n"
    assert run("adopt", "--all").out == "every VM of the store is here\n"
    assert json.loads(run("adopt", "--all", "--json").out) == []
    partly = run("adopt", "db", "big", "--force", "--accept-loss", "--json")
    assert (partly.code, "no room" in partly.err) == (ExitCode.STORE, False)
    assert [(each["vm"], each["outcome"]) for each in json.loads(partly.out)] == [("db", "done"), ("big", "failed")]
    for words in ([], ["db", "--all"]):
        refused = run("adopt", *words)
        assert refused.code == ExitCode.USAGE
        assert "name at least one VM, or give --all" in refused.err


def test_status_and_hold(run: Run, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    status = json.loads(run("status", "--json").out)
    assert status["daemon"]["pid"] == daemon.pid
    assert set(status) == {
        *("healthy", "daemon", "mount", "store", "replica", "libvirt", "backups", "jobs", "recalls", "findings")
    }
    assert run("hold").code == 0
    assert "recalls are held" in run("status").out
    assert run("unhold").code == 0
    assert "recalls are held" not in run("status").out


def test_a_daemon_of_another_datastore_gets_no_commands(
    run: Run, config: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Two datastores whose mountpoints have the same name share a runtime directory unless they are told otherwise."""
    daemon = start_daemon("--backing", str(tmp_path / "theirs"))
    for command in (["ls"], ["status"], ["hold"], ["archive", "db"], ["mount", "--background"], ["unmount", "--force"]):
        result = run(*command)
        assert (result.code, result.out) == (ExitCode.REFUSED, ""), result
        assert f"serves {tmp_path}/theirs, not {tmp_path}/backing" in result.err
    (found,) = (f for f in host_checks.examine(load_config(config)) if f.subject == "control")
    assert (found.severity, "runtime_dir" in found.remedy) == ("problem", True)
    assert daemon.poll() is None


def test_unhealthy_is_8(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon("--unhealthy")
    result = run("status")
    assert result.code == ExitCode.UNHEALTHY
    assert "problem: store: gone; bring it back" in result.out
    assert json.loads(run("status", "--json").out)["healthy"] is False


def test_reload_says_what_changed(run: Run, start_daemon: StartDaemon) -> None:
    start_daemon()
    assert run("reload").out == "changed: hydration.enabled\n"
    assert json.loads(run("reload", "--json").out) == ["hydration.enabled"]


def test_reload_that_is_refused_is_2(run: Run, start_daemon: StartDaemon, config: Path) -> None:
    start_daemon("--busy")
    refused = run("reload")
    assert (refused.code, refused.out) == (ExitCode.USAGE, "")
    assert "c.toml:2: mount.max_background: cannot change" in refused.err
    config.write_text(config.read_text() + "\n[mount]\nno_such_key = 1\n")
    refused = run("reload")
    assert refused.code == ExitCode.USAGE
    assert "mount.no_such_key: no such key" in refused.err


def test_unmount_waits_for_the_end(run: Run, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    reaper = threading.Thread(target=daemon.wait)  # in real life the daemon is not our child
    reaper.start()
    result = run("unmount")
    reaper.join(10)
    assert (result.code, daemon.returncode) == (0, 0)
    assert "is unmounted" in result.out


def test_unmount_is_refused_while_disks_are_open(run: Run, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--busy")
    refused = run("unmount")
    assert refused.code == ExitCode.REFUSED
    assert "open in process 7" in refused.err
    assert daemon.poll() is None
    assert run("unmount", "--force").code == 0


def test_a_mount_left_by_a_dead_daemon(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detached: list[Path] = []
    monkeypatch.setattr(mountpoints, "is_mounted", lambda path: True)
    monkeypatch.setattr(mountpoints, "detach", detached.append)
    result = run("unmount")
    assert result.code == ExitCode.UNREACHABLE
    assert "--force" in result.err
    assert detached == []
    assert run("unmount", "--force").code == 0
    assert detached == [config.parent / "vms"]


def test_as_a_real_process(config: Path, start_daemon: StartDaemon) -> None:
    start_daemon("--broken")
    command = [sys.executable, "-m", "vmfs_stub.cli.main", "--config", str(config)]
    ls = subprocess.run([*command, "ls"], capture_output=True, text=True, check=False)
    assert (ls.returncode, ls.stdout) == (ExitCode.FAILED, "")
    assert "ValueError: a bug" in ls.stderr
    assert "Traceback" not in ls.stderr
    status = subprocess.run([*command, "status"], capture_output=True, text=True, check=False)
    assert status.returncode == 0


def test_a_closed_pipe_is_no_traceback(config: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    command = f"{sys.executable} -u -m vmfs_stub.cli.main --config {config} ls --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


# mount --background, with a daemon that is put in the place of the real one

FAKE_DAEMON = """\
import sys, types
module = types.ModuleType("vmfs_stub.daemon")
def run(config, **options):
    {body}
module.run = run
sys.modules["vmfs_stub.daemon"] = module
"""
SERVES = (
    "import trio, control_fakes; backing = config.datastore.backing; "
    "trio.run(lambda: control_fakes.serve(config.socket_path, backing=backing))"
)


@pytest.fixture
def fake_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def put(body: str) -> None:
        directory = tmp_path / "site"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(FAKE_DAEMON.format(body=body))
        monkeypatch.setenv("PYTHONPATH", f"{directory}:{HERE}")

    monkeypatch.setattr(mountpoints, "is_mounted", lambda path: True)
    return put


def test_background_returns_when_the_mount_answers(run: Run, config: Path, fake_daemon: Callable[[str], None]) -> None:
    fake_daemon(SERVES)
    result = run("mount", "--background")
    assert result.code == 0, result
    client = ControlClient(load_config(config).socket_path)
    pid = client.status().daemon.pid
    assert f"pid {pid}" in result.out
    assert stat.S_IMODE((config.parent / "run").stat().st_mode) == 0o700
    again = run("mount", "--background")
    assert again.code == ExitCode.REFUSED
    assert "answers on" in again.err
    client.shutdown(force=True)
    os.waitpid(pid, 0)
    with pytest.raises(DaemonUnreachable):
        client.status()


def test_background_passes_the_daemons_error_on(run: Run, config: Path, fake_daemon: Callable[[str], None]) -> None:
    (config.parent / "run").mkdir()
    (config.parent / "run/daemon.log").write_text("an old line\n")
    fake_daemon("from vmfs_stub.core.errors import DatastoreLocked; raise DatastoreLocked('pid 7 has it')")
    result = run("mount", "--background")
    assert result.code == ExitCode.REFUSED
    assert "pid 7 has it" in result.err
    assert "an old line" not in result.err
    fake_daemon("raise ExceptionGroup('g', [ValueError('a bug')])")
    crashed = run("mount", "--background")
    assert crashed.code == ExitCode.FAILED
    assert "a bug" in crashed.err


def test_background_gives_up_on_a_silent_daemon(run: Run, config: Path, fake_daemon: Callable[[str], None]) -> None:
    config.write_text(config.read_text().replace("start_timeout_s = 20", "start_timeout_s = 0.5"))
    fake_daemon(f"import os, time; open('{config.parent}/pid', 'w').write(str(os.getpid())); time.sleep(60)")
    result = run("mount", "--background")
    assert result.code == ExitCode.UNREACHABLE
    assert "start_timeout_s" in result.err
    with suppress(FileNotFoundError):  # it may have been stopped before it wrote its pid
        assert not Path(f"/proc/{(config.parent / 'pid').read_text()}").exists()


# init


def init_arguments(tmp_path: Path, mountpoint: Path, **changes: str | Path) -> list[str | Path]:
    options: dict[str, str | Path] = {
        "backing": tmp_path / "backing",
        "mountpoint": mountpoint,
        "store": f"file://{tmp_path}/store",
        "runtime-dir": tmp_path / "run",
    }
    return ["init", *(part for name, value in (options | changes).items() for part in (f"--{name}", value))]


def test_init_makes_a_datastore(run: Run, tmp_path: Path, mountpoint: Path) -> None:
    path = tmp_path / "etc/config.toml"
    result = run("--config", path, *init_arguments(tmp_path, mountpoint))
    assert result.code == 0, result
    config = load_config(path)
    assert (config.datastore.name, config.datastore.backing) == ("vms", tmp_path / "backing")
    assert config.store.url == f"file://{tmp_path}/store"
    assert config.datastore.runtime_dir == tmp_path / "run"
    assert stat.S_IMODE((tmp_path / "backing").stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "store/vmfs-store.json").exists()
    assert list((tmp_path / "backing").iterdir()) == []
    assert list(mountpoint.iterdir()) == []
    if mountpoints.is_immutable(mountpoint):
        with pytest.raises(PermissionError):
            (mountpoint / "x").touch()
    else:
        assert "cannot be made immutable" in result.err
    before = path.read_bytes()
    again = run("--config", path, *init_arguments(tmp_path, mountpoint))
    assert again.code == ExitCode.REFUSED
    assert path.read_bytes() == before
    joined = run("--config", tmp_path / "second.toml", *init_arguments(tmp_path, mountpoint))
    assert joined.code == 0
    assert "joined the store" in joined.out


def test_a_replica_is_made_filled_and_looked_at(run: Run, tmp_path: Path, mountpoint: Path, config: Path) -> None:
    path, url = tmp_path / "two.toml", f"file://{tmp_path}/replica"
    made = run("--config", path, *init_arguments(tmp_path, mountpoint, replica=url))
    assert made.code == 0, made
    assert f"made the replica at {url}" in made.out
    assert load_config(path).replica.url == url
    assert load_config(path).min_copies == 2
    again = run("--config", tmp_path / "third.toml", *init_arguments(tmp_path, mountpoint, replica=url))
    assert f"joined the replica at {url}" in again.out
    store = Store.open(open_objects(StoreAt(f"file://{tmp_path}/store")))
    back_up(store, {"disk.raw": b"content" * 1000})
    told = run("--config", path, "replicate")
    assert told.code == 0 and told.out.startswith("1 restore points were brought into the replica, "), told
    assert json.loads(run("--config", path, "replicate", "--json").out) == {"points": 0, "bytes": 0, "failures": {}}
    findings = json.loads(run("--config", path, "doctor", "--json").out)
    assert {each["severity"] for each in findings if each["subject"] == "replica"} == {"ok"}
    # One that is away is not made again.
    (tmp_path / "replica").rename(tmp_path / "away")
    assert run("--config", path, "replicate").code == ExitCode.STORE
    assert not (tmp_path / "replica").exists()
    findings = json.loads(run("--config", path, "doctor", "--json").out)
    assert {each["severity"] for each in findings if each["subject"] == "replica"} == {"problem"}
    assert json.loads(run("--config", path, "replicate", "--create", "--json").out)["points"] == 1
    (pack,) = [each for each in (tmp_path / "replica/packs").rglob("*") if each.is_file()]
    pack.write_bytes(b"damaged")
    checked = run("--config", path, "replicate", "--check")
    assert checked.code == 0 and checked.out.startswith("1 restore points are in the replica and were read back, "), (
        checked
    )
    assert run("--config", path, "verify", "--store", url).code == 0
    # None is configured.
    assert run("replicate").code == ExitCode.USAGE


def test_the_template_shows_the_defaults(run: Run, tmp_path: Path, mountpoint: Path) -> None:
    """Every key of the configuration is in the template, and what is commented out is the default."""
    path = tmp_path / "config.toml"
    assert run(*init_arguments(tmp_path, mountpoint)).code == 0
    plain = load_config(path)
    text = path.read_text()
    examples = ("socket =", "keep_deleted_days =", "_watermark_percent =")  # without a default
    before, begin, after = text.partition("# [[policy.rules]]")
    rules, end, after = after.partition("[retention]")

    def uncommented(part: str) -> str:
        lines = [
            line.removeprefix("# ") if line.startswith("# ") and line.split()[2:3] in (["="], []) else line
            for line in part.splitlines()
            if not any(example in line for example in examples)
        ]
        return "\n".join(lines) + "\n"

    path.write_text(uncommented(before) + uncommented(end + after))
    assert load_config(path) == plain
    path.write_text(before + uncommented(begin + rules) + end + after)
    kept, usual = load_config(path).archive_policy.rules
    assert not kept.archives
    assert replace(usual, not_started_for_s=None, point_age_max_s=None, target_s=None) == DEFAULT_RULE
    sections = [type(getattr(plain, section)) for section in type(plain).model_fields]
    for section in (*sections, RuleConfig, IdleConfig):
        for key in section.model_fields:
            assert f"{key} = " in text or f"[[policy.{key}]]" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backing": "vms"}, "must not be the same directory"),
        ({"backing": "vms/inside"}, "must not lie in mountpoint"),
        ({"store": "file://{tmp}/backing/store"}, "store .* must not lie in backing"),
        ({"backing": "link/backing", "store": "file://{tmp}/real"}, "backing .* must not lie in store"),
        ({"store": "ftp://x/y"}, "not a store URL"),
        ({"replica": "ftp://x/y"}, "not a store URL"),
        ({"replica": "file://{tmp}/store"}, "is that of the store"),
        ({"replica": "file://{tmp}/backing/replica"}, "replica .* must not lie in backing"),
        ({"replica": "file://{tmp}/store/replica"}, "replica .* must not lie in store"),
        ({"replica": "file://{tmp}/missing/replica"}, "its parent directory does not exist; make it, or mount"),
        ({"store": "file://{tmp}/missing/store"}, "its parent directory does not exist; make it, or mount"),
        ({"name": "a/b"}, r"datastore\.name"),
    ],
)
def test_init_refuses_before_it_makes_anything(
    run: Run, tmp_path: Path, mountpoint: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    before = sorted(tmp_path.rglob("*"))
    resolved = {
        name: tmp_path / value if name == "backing" else value.format(tmp=tmp_path) for name, value in changes.items()
    }
    result = run(*init_arguments(tmp_path, mountpoint, **resolved))
    assert result.code == ExitCode.USAGE, result
    assert re.search(message, result.err), result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_init_refuses_a_mountpoint_in_use(run: Run, tmp_path: Path, mountpoint: Path) -> None:
    mountpoint.mkdir()
    (mountpoint / "precious.raw").touch()
    result = run(*init_arguments(tmp_path, mountpoint))
    assert result.code == ExitCode.REFUSED
    assert "not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["vms"]
    mounted = run(*init_arguments(tmp_path, Path("/proc")))
    assert mounted.code == ExitCode.REFUSED
    assert "mounted on /proc already" in mounted.err


def test_init_makes_what_backing_and_store_lie_in(run: Run, tmp_path: Path, mountpoint: Path) -> None:
    """As in the README's walk-through."""
    new = {"backing": tmp_path / "new/backing", "store": f"file://{tmp_path}/new/store"}
    assert run(*init_arguments(tmp_path, mountpoint, **new)).code == 0
    assert (tmp_path / "new/store/vmfs-store.json").exists()


def test_a_store_that_cannot_be_made_leaves_the_mountpoint_as_it_was(
    run: Run, tmp_path: Path, mountpoint: Path
) -> None:
    mountpoint.mkdir()
    (tmp_path / "store").touch()
    result = run(*init_arguments(tmp_path, mountpoint))
    assert result.code == ExitCode.STORE, result
    assert not mountpoints.is_immutable(mountpoint)
    assert not (tmp_path / "config.toml").exists()
    (tmp_path / "store").unlink()
    assert run(*init_arguments(tmp_path, mountpoint)).code == 0


def test_init_refuses_a_filesystem_without_attributes(run: Run, tmp_path: Path, mountpoint: Path) -> None:
    result = run(*init_arguments(tmp_path, mountpoint, backing="/proc/1"))
    assert result.code in (ExitCode.REFUSED, ExitCode.PRIMARY)
    assert "/proc/1" in result.err


# doctor


def findings_of(run: Run, *, code: int | None = None) -> dict[str, list[dict[str, str]]]:
    result = run("doctor", "--json")
    assert code is None or result.code == code, result
    found: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(result.out):
        found.setdefault(finding["subject"], []).append(finding)
    return found


def severities(findings: list[dict[str, str]]) -> set[str]:
    return {finding["severity"] for finding in findings}


def test_doctor_finds_what_is_planted(run: Run, config: Path, tmp_path: Path, start_daemon: StartDaemon) -> None:
    nothing_made = findings_of(run, code=ExitCode.UNHEALTHY)
    for subject in ("backing", "mountpoint", "store"):
        assert "problem" in severities(nothing_made[subject])
    config.unlink()
    (tmp_path / "vms").mkdir()
    assert run(*init_arguments(tmp_path, tmp_path / "vms")).code == 0
    mountpoints.clear_immutable(tmp_path / "vms")
    start_daemon()
    sound = findings_of(run)
    for subject in ("backing", "store", "control", "privileges", "kernel", "fuse"):
        assert "problem" not in severities(sound[subject]), sound[subject]
    (tmp_path / "backing").chmod(0o755)
    (tmp_path / "vms/stray").touch()
    (tmp_path / "run/control.sock").chmod(0o666)
    (tmp_path / "run").chmod(0o755)
    planted = findings_of(run, code=ExitCode.UNHEALTHY)
    for subject in ("backing", "mountpoint", "control", "runtime_dir"):
        problems = [finding for finding in planted[subject] if finding["severity"] == "problem"]
        assert problems, subject
        assert all(finding["remedy"] for finding in problems)


def test_doctor_checks_that_cannot_be_planted_on_this_host(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config)
    limit = tmp_path / "max_request_timeout"
    for seconds, severity in (("25", ["problem"]), ("10", ["problem"]), ("0", []), ("60", [])):
        limit.write_text(seconds)
        assert [found.severity for found in host_checks.request_timeout(loaded, limit)] == severity
    assert [found.severity for found in host_checks.fuse_device(loaded, tmp_path / "none")] == ["problem"]
    (tmp_path / "protected_symlinks").write_text("0\n")
    (tmp_path / "protected_hardlinks").write_text("1\n")
    assert [found.severity for found in host_checks.protected_files(loaded, tmp_path)] == ["note"]


def test_each_missing_capability_is_a_problem(config: Path, tmp_path: Path) -> None:
    loaded, status = load_config(config), tmp_path / "status"
    held = {"CAP_LINUX_IMMUTABLE": 1 << 9, "CAP_SYS_ADMIN": 1 << 21, "CAP_LEASE": 1 << 28}
    for missing in held:
        status.write_text(f"CapEff:\t{sum(held.values()) - held[missing]:016x}\n")
        (found,) = host_checks.privileges(loaded, status)
        assert (found.severity, found.message.split()[0]) == ("problem", missing)
        assert f"--cap-add {missing.removeprefix('CAP_')}" in found.remedy
    status.write_text(f"CapEff:\t{sum(held.values()):016x}\n")
    assert [found.severity for found in host_checks.privileges(loaded, status)] == ["ok"]


def test_a_check_that_fails_is_a_finding(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Iterator[host_checks.HostFinding]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(host_checks, "CHECKS", (broken,))
    (found,) = host_checks.examine(load_config(config))
    assert (found.severity, found.subject) == ("problem", "broken")


def test_a_check_that_may_not_look_says_who_may(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> Iterator[host_checks.HostFinding]:
        raise PermissionError(13, "Permission denied", "/place")

    monkeypatch.setattr(host_checks, "CHECKS", (refused,))
    (found,) = host_checks.examine(load_config(config))
    assert (found.severity, found.remedy) == ("problem", "be root")
    assert found.message == "/place could not be looked at: Permission denied"


def test_hooks_that_cannot_be_run_are_found(config: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    config.write_text(f'{config.read_text()}\n[hooks]\nbefore = ["{hook}", "x"]\nafter = ["{hook}"]\n')
    loaded = load_config(config)
    assert [found.severity for found in host_checks.hooks(loaded)] == ["problem", "warning"]
    hook.mkdir(0o755)
    assert [found.severity for found in host_checks.hooks(loaded)] == ["problem", "warning"]
    hook.rmdir()
    hook.touch(0o644)
    assert [found.severity for found in host_checks.hooks(loaded)] == ["problem", "warning"]
    hook.chmod(0o755)
    assert [found.severity for found in host_checks.hooks(loaded)] == ["ok", "ok"]


def test_mounts_are_read_without_touching_them() -> None:
    assert not mountpoints.is_mounted(Path("/proc"))  # mounted, but not by us
    assert mountpoints.mount_of(Path("/proc/1")).kind == "proc"
    assert not mountpoints.is_mounted(Path("/nowhere"))


@pytest.fixture
def dead_mount(config: Path) -> Iterator[Path]:
    """A FUSE mount whose daemon is gone."""
    path = load_config(config).datastore.mountpoint
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        syscalls.mount(b"t", os.fsencode(path), b"fuse.vmfs-stub", flags=0, options=options)
    finally:
        os.close(fd)
    yield path
    with suppress(OSError):
        mountpoints.detach(path)


def test_a_dead_mount_is_found_and_removed(run: Run, dead_mount: Path) -> None:
    assert mountpoints.is_mounted(dead_mount)
    assert mountpoints.is_dead(dead_mount)
    found = findings_of(run, code=ExitCode.UNHEALTHY)
    assert "daemon is gone" in found["mountpoint"][0]["message"]
    assert run("unmount", "--force").code == 0
    assert not mountpoints.is_mounted(dead_mount)
    assert not mountpoints.is_dead(dead_mount)


def test_numbers_beyond_all_bounds_are_shown() -> None:
    assert bytes_text(10**400).endswith(" PiB")
    assert [time_text(seconds) for seconds in (None, float("nan"), float("inf"), 1e20, -1e20)] == ["-"] * 5


def test_sizes_for_people() -> None:
    assert [bytes_text(size) for size in (0, 1023, 1024, 1536, 1 << 30, 5 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 GiB",
        "5.0 PiB",
    ]
