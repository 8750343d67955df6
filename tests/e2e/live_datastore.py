"""A datastore that is served by the real daemon, started by the command line in a process of its own.

A test talks to it as an operator (``cli``, ``client``) and as a guest (files below ``mountpoint``), may damage what is
below ``backing``, ``store`` and ``runtime``, and may kill the daemon whenever it likes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scripts.lab.datastore import Settings, ended, with_settings
from tests.e2e import forked
from tests.e2e.forked import Forked
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.errors import DaemonUnreachable
from vmfs_stub.core.names import RECALLED_XATTR, XATTR_PREFIX
from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.mount import syscalls

T = TypeVar("T")

MIB = 1 << 20
CHUNK = 64 << 10
BLOCK = 4096
DEADLINE_S = 60.0
"""After this a test no longer believes that what it waits for will come."""

LOG_SHOWN = 20_000

SMALL_ENDS: Settings = {
    "archive": {"resident_head_bytes": 0, "resident_tail_bytes": 0, "placeholder_bytes_min": "1 MiB"},
}
"""Nothing stays resident, so that a test knows what is absent."""
QUIET: Settings = {**SMALL_ENDS, "hydration": {"enabled": False}}
"""And nothing comes back that no one reads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def wait_until(what: str, condition: Callable[[], T], *, deadline_s: float = DEADLINE_S, poll_s: float = 0.01) -> T:
    """Poll until ``condition`` gives something true, which is returned; fails at the deadline."""
    end_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"{what}: not so after {deadline_s:g} s"
        time.sleep(poll_s)
    return found


def free_bytes(directory: Path) -> int:
    """Room of the filesystem, as the mount tells it for the one behind it."""
    vfs = os.statvfs(directory)
    return vfs.f_bavail * vfs.f_frsize


def make_room(path: Path) -> None:
    """Remove a file, and wait for its space: the kernel tells of the last close and of forgetting it a little later."""
    before, size = free_bytes(path.parent), path.stat().st_blocks * 512
    path.unlink()
    wait_until("its space is free", lambda: free_bytes(path.parent) - before >= size // 2)


def merged(*several: Settings) -> Settings:
    """The settings of all; a later one overrides."""
    found: dict[str, dict[str, bool | int | float | str]] = {}
    for settings in several:
        for section, values in settings.items():
            found.setdefault(section, {}).update(values)
    return found


def image(size: int, *, seed: int) -> bytes:
    """Contents of a disk: runs of noise, of compressible text and of zeros, different for each seed."""
    rng, parts, length = random.Random(seed), [], 0
    while length < size:
        count = rng.choice((BLOCK, 3 * BLOCK, CHUNK, 3 * CHUNK + 17, 9 * CHUNK))
        kind = rng.random()
        if kind < 0.6:
            part = rng.randbytes(count)
        elif kind < 0.8:
            part = (rng.randbytes(48) * (count // 48 + 1))[:count]
        else:
            part = bytes(count)
        parts.append(part)
        length += count
    return b"".join(parts)[:size]


def noise(size: int, *, seed: int) -> bytes:
    """Contents of a disk in which no two chunks are alike and none is zeros."""
    return random.Random(seed).randbytes(size)


class LiveDatastore:
    """Directories, configuration and daemon of one datastore; ``daemon`` is None while none was started."""

    def __init__(self, base: Path, *, store: Path | str | None = None) -> None:
        self.base = base
        self.backing = base / "backing"
        self.mountpoint = base / "mount"
        self.store = store if isinstance(store, Path) else base / "store"
        self.store_url = store if isinstance(store, str) else self.store.as_uri()
        self.runtime = base / "run"
        self.config = base / "config.toml"
        self.log_path = base / "log"
        self.daemon: subprocess.Popen[bytes] | Forked | None = None
        self.client = ControlClient(self.runtime / "control.sock", timeout_s=30)

    def init(self, settings: Settings, *words: str | Path) -> None:
        """Create it, with more ``words`` for ``init``, whose configuration is then changed by ``settings``."""
        where = ("--backing", self.backing, "--mountpoint", self.mountpoint, "--store", self.store_url)
        self.cli("init", *where, "--runtime-dir", self.runtime, *words, check=0)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Change the configuration, for the next start."""
        self.config.write_text(with_settings(self.config.read_text(), settings))

    # As an operator

    def cli(self, *words: str | Path, check: int | None = None) -> Outcome:
        """Run a command; ``check`` is the exit code that it must end with."""
        outcome = Outcome(*forked.run(["--config", str(self.config), *map(str, words)], timeout_s=4 * DEADLINE_S))
        assert check is None or outcome.code == check, f"{' '.join(map(str, words))}: {outcome}"
        return outcome

    def start(self, *, program: Sequence[str | Path] = (), view: Sequence[str | Path] = ()) -> None:
        """Start the daemon; returns when the mount answers.

        ``program``, if any, is what Python runs anew, ``view`` what runs Python anew, in its own process.
        """
        words = ["--config", str(self.config), "mount"]
        with self.log_path.open("ab") as log:
            if program or view:
                command = [*map(str, view), sys.executable, *map(str, program or ("-m", "vmfs_stub.cli.main")), *words]
                self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            else:
                self.daemon = Forked(words, out=log, err=log)
        wait_until("the mount answers", self._answers, poll_s=0.02)

    def _answers(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, f"the daemon ended with {self.daemon.returncode}: {self.log()}"
        with contextlib.suppress(DaemonUnreachable):
            status = self.client.status()
            return status.daemon.pid == self.daemon.pid and status.mount.mounted
        return False

    def kill(self) -> None:
        """End the daemon as a crash does; its mover, which gives way to everybody, takes a moment longer."""
        assert self.daemon is not None
        pid, left = self.daemon.pid, ""
        with contextlib.suppress(OSError):
            left = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        self.daemon.kill()
        self.daemon.wait()
        assert all(ended(int(child), deadline_s=DEADLINE_S) for child in left.split())

    def crash(self) -> None:
        """Kill the daemon and start another."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Unmount as an operator does."""
        assert self.daemon is not None
        self.cli("unmount", check=0)
        assert self.daemon.wait(timeout=DEADLINE_S) == 0, self.log()

    def restart(self) -> None:
        """Unmount and mount again."""
        self.stop()
        self.start()

    def archive(self, *vms: str) -> JobInfo:
        """Archive VMs and wait; they are placeholders then."""
        done = self.wait_job(self.client.start_archive(vms))
        assert done.state == "done", done
        return done

    def recall(self, *vms: str) -> JobInfo:
        """Recall VMs and wait; they are ordinary files then."""
        done = self.wait_job(self.client.start_recall(vms))
        assert done.state == "done", done
        return done

    def wait_job(self, job_id: str, *, deadline_s: float = DEADLINE_S) -> JobInfo:
        """How a job ended."""
        return wait_until(f"job {job_id} ends", lambda: self._ended(job_id), deadline_s=deadline_s)

    def _ended(self, job_id: str) -> JobInfo | None:
        info = self.client.job(job_id, wait_s=1)  # type: ignore[arg-type]
        return None if info.state == "running" else info

    def state(self, vm: str) -> str:
        """State of a VM with one disk: resident, placeholder or recalling."""
        (row,) = self.client.list_disks(vm)
        return row.state

    def rows(self) -> list[Mapping[str, object]]:
        """``ls --json``."""
        found: list[Mapping[str, object]] = json.loads(self.cli("ls", "--json", check=0).out)
        return found

    def log(self) -> str:
        """All that the daemon logged so far."""
        return self.log_path.read_text()

    # As a guest

    def add_vm(self, name: str, content: bytes, *, disk: str = "disk.raw") -> Path:
        """Make a VM with one disk, through the mount; its path there."""
        path = self.mountpoint / name / disk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        forget_pages(path)
        return path

    def backing_of(self, path: Path) -> Path:
        """Where the file of this path in the mount lies."""
        return self.backing / path.relative_to(self.mountpoint)

    # What is left

    def private_xattrs(self, path: Path) -> list[str]:
        """Our extended attributes on a backing file, but for the note that it was a placeholder once."""
        names = [name for name in os.listxattr(path) if name.startswith(XATTR_PREFIX)]
        return [name for name in names if name != RECALLED_XATTR]

    def durable_maps(self) -> list[Path]:
        return sorted((self.backing / ".vmfs-stub/maps").iterdir())

    def volatile_maps(self) -> list[Path]:
        return sorted((self.runtime / "maps").iterdir())

    def pins(self) -> list[Path]:
        return objects(self.store / "pins")

    def assert_nothing_left(self, *paths: Path) -> None:
        """The backing files ``paths`` are ordinary, and no placeholder is left anywhere.

        Of a file that was closed the kernel tells a moment later, and its maps and its pin go after its record.
        """
        with contextlib.suppress(AssertionError):
            wait_until("nothing is left", lambda: not self._left(paths))
        assert self._left(paths) == []

    def _left(self, paths: Sequence[Path]) -> list[object]:
        xattrs = [name for path in paths for name in self.private_xattrs(path)]
        return [*xattrs, *self.durable_maps(), *self.volatile_maps(), *self.pins()]

    def tear_down(self) -> None:
        """No daemon, no mount, a mountpoint that can be removed; whatever state it is in."""
        if self.daemon is not None:
            self.kill()
        detach(self.mountpoint)
        if self.log_path.exists():
            print(self.log()[-LOG_SHOWN:])  # pytest shows it when the test failed


def objects(folder: Path) -> list[Path]:
    """All files below a folder of the store."""
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def detach(mountpoint: Path) -> None:
    """Take away what is mounted, and the flag that keeps the directory from being removed."""
    while mountpoints.mounts_at(mountpoint):
        syscalls.unmount(os.fsencode(mountpoint), flags=syscalls.MNT_DETACH | syscalls.MNT_FORCE)
    if mountpoint.is_dir():
        mountpoints.clear_immutable(mountpoint)


def remove_base(base: Path) -> None:
    """Remove a test's directory; never anything below a mount."""
    assert not any(f" {base}/" in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
    shutil.rmtree(base)


def forget_pages(path: Path) -> None:
    """Have the kernel drop what it cached of a file, or a reader is not served by the daemon."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def damage(path: Path, offset: int, *, mask: int = 0x01) -> None:
    """Flip bits of one byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def readable_ranges(path: Path, size: int, *, step: int = CHUNK) -> Sequence[bytes | int]:
    """Each step of a file as a reader gets it: its bytes, or the errno of the failure."""
    found: list[bytes | int] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in range(0, size, step):
            try:
                found.append(os.pread(fd, step, offset))
            except OSError as exc:
                found.append(exc.errno)
    finally:
        os.close(fd)
    return found


class Holder:
    """A process that keeps a file open: ``mode`` is r or rw, or map for a mapping whose descriptor is closed."""

    _CODE = """
import mmap, os, sys
path, mode = sys.argv[1:]
fd = os.open(path, os.O_RDONLY if mode in ("r", "map") else os.O_RDWR)
if mode == "map":
    kept = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
print("open", flush=True)
sys.stdin.read()
"""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-c", self._CODE, str(path), mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"open\n"

    def let_go(self) -> None:
        """Close the file; it is closed on return."""
        self.process.kill()
        self.process.communicate()


MakeDatastore = Callable[..., LiveDatastore]
Hold = Callable[..., Holder]
