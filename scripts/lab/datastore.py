"""A datastore in a temporary directory, used as an operator uses one: by the command line, the mount and the API.

Cleaning up is part of it: at the end of ``temporary_datastore`` the mount is gone, the daemon has ended and the
directory is removed, also after a failure.  Nothing is ever removed while something is still mounted there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec

from scripts.lab.failure import LabError, run
from scripts.lab.s3_server import Bucket
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient
from vmfs_stub.mount.mountpoint import is_mounted
from vmfs_stub.store.remote import RemoteObjects

PROGRAM = Path(sys.executable).with_name("vmfs-stub")
COMMAND_DEADLINE_S = 900.0
_END_DEADLINE_S = 30.0
_PREFIX = "vms"
_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_CONFIGURED = ("access_key_id", "secret_access_key")

P = ParamSpec("P")
Setting = bool | int | float | str
Settings = Mapping[str, Mapping[str, Setting]]
"""Section → key → value of the configuration, as far as it differs from what ``init`` writes."""


@dataclass(frozen=True, slots=True)
class DiskState:
    """One line of ``ls --json``."""

    vm: str
    disk: str
    state: str
    size_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Recalled:
    """Bytes that came back from the store: all of them, and those that somebody waited for."""

    total: int = 0
    on_demand: int = 0

    def since(self, before: Recalled) -> Recalled:
        """The difference to an earlier value."""
        return Recalled(self.total - before.total, self.on_demand - before.on_demand)


@dataclass(slots=True)
class Datastore:
    """Backing directory, mountpoint, store and configuration under ``home``; ``daemon_pid`` is 0 when not mounted.

    With a ``bucket`` or a ``shared_store``, a directory, that is the store, and several datastores may share it.
    With a ``host`` all commands, and so the daemon, run on a host of that name, as far as a name makes one.
    """

    home: Path
    daemon_pid: int = 0
    bucket: Bucket | None = None
    shared_store: Path | None = None
    host: str = ""

    @property
    def backing(self) -> Path:
        """The backing directory."""
        return self.home / "backing"

    @property
    def mountpoint(self) -> Path:
        """Where the disks are seen."""
        return self.home / "mount"

    @property
    def store(self) -> Path:
        """Secondary storage, where it is a directory."""
        return self.shared_store or self.home / "store"

    @property
    def store_url(self) -> str:
        """Secondary storage, wherever it is."""
        return self.store.as_uri() if self.bucket is None else self.bucket.url(_PREFIX)

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.home / "config.toml"

    def backing_of(self, path: Path) -> Path:
        """Where the file of this path in the mount lies."""
        return self.backing / path.relative_to(self.mountpoint)

    def vmfs(self, *words: str) -> str:
        """Run ``vmfs-stub --config … WORDS`` and return its stdout; raises LabError."""
        return run(self._command(*words), deadline_s=COMMAND_DEADLINE_S)

    def _command(self, *words: str | Path) -> list[str | Path]:
        """The program with these words, on the datastore's host."""
        command: list[str | Path] = [PROGRAM, "--config", self.config, *words]
        if not self.host:
            return command
        return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.host, *command]

    def init(self, settings: Settings) -> None:
        """Create it by ``vmfs-stub init``, then change the configuration's ``settings``."""
        where: list[str | Path] = [
            "--backing",
            self.backing,
            "--mountpoint",
            self.mountpoint,
            "--store",
            self.store_url,
        ]
        command = self._command("init", *where, "--runtime-dir", self.home / "run")
        run(command, deadline_s=COMMAND_DEADLINE_S, env=os.environ | self._credentials(_ENVIRONMENT))
        text = with_settings(self.config.read_text(), {"store": self._credentials(_CONFIGURED)})
        self.config.write_text(with_settings(text, settings))

    def _credentials(self, names: tuple[str, str]) -> dict[str, str]:
        """Those of the bucket under the names that they have there; nothing for a directory."""
        if self.bucket is None:
            return {}
        account = self.bucket.account
        return dict(zip(names, (account.access_key_id, account.secret_access_key), strict=True))

    def mount(self) -> None:
        """Start the daemon in the background; returns when the mount answers."""
        self.vmfs("mount", "--background")
        self.daemon_pid = int(self.status()["daemon"]["pid"])

    def unmount(self) -> None:
        """Unmount and wait until the daemon has ended."""
        self.vmfs("unmount")
        if not ended(self.daemon_pid, deadline_s=_END_DEADLINE_S):
            raise LabError(f"the daemon (process {self.daemon_pid}) is still there after 'unmount'")
        self.daemon_pid = 0

    def job_seconds(self, kind: Literal["archive", "recall"], vm: str) -> float:
        """Run a job and return how long it took in the daemon; LabError when it failed."""
        client = ControlClient(load_config(self.config).socket_path, timeout_s=COMMAND_DEADLINE_S)
        job_id = client.start_archive([vm]) if kind == "archive" else client.start_recall([vm])
        info = client.wait_job(job_id, lambda _: None)
        if info.error is not None or info.ended is None:
            raise LabError(f"the {kind} job of {vm} failed: {info.error}")
        return info.ended - info.started

    def status(self) -> dict[str, dict[str, str | int | float | bool]]:
        """``status --json``."""
        found: dict[str, dict[str, str | int | float | bool]] = json.loads(self.vmfs("status", "--json"))
        return found

    def disks(self) -> list[DiskState]:
        """``ls --json``."""
        keys = ("vm", "disk", "state", "size_bytes", "resident_bytes")
        return [DiskState(**{key: row[key] for key in keys}) for row in json.loads(self.vmfs("ls", "--json"))]

    def recalled(self) -> Recalled:
        """What came back from the store since the daemon started."""
        daemon = self.status()["daemon"]
        return Recalled(int(daemon["recalled_bytes"]), int(daemon["recalled_on_demand_bytes"]))

    def store_bytes(self) -> int:
        """Bytes that the store occupies."""
        if self.bucket is not None:
            return sum(info.size for info in self.objects().list(""))
        return allocated_bytes(self.store)

    def objects(self) -> RemoteObjects:
        """What is in its bucket, without retries."""
        assert self.bucket is not None
        return self.bucket.objects(_PREFIX)

    def end(self) -> None:
        """Unmount in whatever state it is; the daemon has ended when this returns.  Raises LabError if it cannot."""
        if not self.daemon_pid and is_mounted(self.mountpoint):
            with suppress(LabError):
                self.daemon_pid = int(self.status()["daemon"]["pid"])
        if self.daemon_pid and not ended(self.daemon_pid, deadline_s=0):
            with suppress(LabError):
                run(self._command("unmount", "--force"), deadline_s=_END_DEADLINE_S)
        while is_mounted(self.mountpoint):  # a dead mount may lie under another
            run(["umount", "-l", self.mountpoint], deadline_s=_END_DEADLINE_S)
        if self.daemon_pid and not ended(self.daemon_pid, deadline_s=_END_DEADLINE_S):
            os.kill(self.daemon_pid, signal.SIGKILL)
            ended(self.daemon_pid, deadline_s=_END_DEADLINE_S)
        self.daemon_pid = 0
        with suppress(LabError):  # `init` makes it immutable, where the filesystem can do that
            run(["chattr", "-i", self.mountpoint], deadline_s=_END_DEADLINE_S)

    def kill(self) -> None:
        """End the daemon as a crash does; the mount stays behind, dead, until the next ``mount`` takes it over."""
        os.kill(self.daemon_pid, signal.SIGKILL)
        if not ended(self.daemon_pid, deadline_s=_END_DEADLINE_S):
            raise LabError(f"the daemon (process {self.daemon_pid}) does not die")


@contextmanager
def temporary_datastore(settings: Settings | None = None) -> Iterator[Datastore]:
    """A datastore that was initialised and not mounted yet, in a fresh temporary directory."""
    with working_directory() as home, datastore_in(home, settings) as datastore:
        yield datastore


@contextmanager
def datastore_in(
    home: Path,
    settings: Settings | None = None,
    *,
    bucket: Bucket | None = None,
    shared_store: Path | None = None,
    host: str = "",
) -> Iterator[Datastore]:
    """A datastore in the existing directory ``home``; unmounted at the end, the directory stays.

    Its store is a directory in there, or a ``bucket``, or a ``shared_store``; see `Datastore`, also for ``host``.
    """
    datastore = Datastore(home, bucket=bucket, shared_store=shared_store, host=host)
    try:
        datastore.init(settings or {})
        yield datastore
    finally:
        datastore.end()


@contextmanager
def working_directory(parent: Path | None = None) -> Iterator[Path]:
    """A temporary directory, in ``parent`` if given; removed at the end, unless something is still mounted in it."""
    home = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir=parent))
    try:
        yield home
    finally:
        if any(
            line.split()[4].startswith(f"{home}/") for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ):
            print(f"{home} was not removed: something is still mounted in it", file=sys.stderr)
        else:
            shutil.rmtree(home, ignore_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does; a second signal does not disturb the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


def with_settings(text: str, settings: Settings) -> str:
    """The TOML ``text`` with these values in these sections; a value that was there is replaced."""
    for section, values in settings.items():
        for key, value in values.items():
            text = _with_setting(text, section, key, value)
    return text


def _with_setting(text: str, section: str, key: str, value: Setting) -> str:
    line = f"{key} = {json.dumps(value)}"
    parts = re.split(rf"(?m)^(\[{re.escape(section)}\][^\n]*\n)", text, maxsplit=1)
    if len(parts) != 3:
        return f"{text}\n[{section}]\n{line}\n"
    before, header, rest = parts
    following = re.search(r"(?m)^\[", rest)
    end = following.start() if following else len(rest)
    body = re.sub(rf"(?m)^{re.escape(key)}\s*=.*\n", "", rest[:end])
    return f"{before}{header}{line}\n{body}{rest[end:]}"


def allocated_bytes(path: Path) -> int:
    """Bytes that a file, or all files below a directory, occupy."""
    if not path.is_dir():
        return path.stat().st_blocks * 512
    total = 0
    for directory, _, names in os.walk(path):
        total += sum(os.lstat(os.path.join(directory, name)).st_blocks * 512 for name in names)
    return total


def children() -> dict[int, list[int]]:
    """The processes of this machine, by their parents."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process and all its descendants: shared pages count by their share."""
    children_of = children()
    total, pending = 0, [pid]
    while pending:
        current = pending.pop()
        pending += children_of.get(current, [])
        with suppress(OSError):
            found = re.search(r"(?m)^Pss:\s+(\d+) kB", Path(f"/proc/{current}/smaps_rollup").read_text())
            total += int(found[1]) * 1024 if found else 0
    return total


def drop_caches() -> None:
    """Write out everything dirty and forget all clean cached pages; raises LabError where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError as exc:
        raise LabError(f"caches cannot be dropped here ({exc.strerror}), so nothing cold can be measured") from exc


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a disk image with its holes, durable on return."""
    run(["cp", "--sparse=always", "--reflink=never", source, target], deadline_s=COMMAND_DEADLINE_S)
    run(["sync", target], deadline_s=COMMAND_DEADLINE_S)


def seconds(action: Callable[P, object], *args: P.args, **keywords: P.kwargs) -> float:
    """How long ``action(*args, **keywords)`` takes."""
    started_s = time.perf_counter()
    action(*args, **keywords)
    return time.perf_counter() - started_s


def ended(pid: int, *, deadline_s: float) -> bool:
    """Whether a process is gone, or but a zombie with no thread that has files open, within ``deadline_s``."""
    until_s = time.monotonic() + deadline_s
    process = Path(f"/proc/{pid}")
    while True:
        try:
            is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if is_zombie and len(list((process / "task").iterdir())) == 1:
                return True
        except OSError:
            return True
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.05)
