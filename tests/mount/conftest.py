"""Real mounts of plain directories, each served by a process of its own and taken down whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.mount import syscalls


class PlainMount:
    """A mounted plain directory; ``plain`` is a directory beside it to compare with."""

    def __init__(self, base: Path, *settings: str) -> None:
        self.base = base
        self.backing = base / "backing"
        self.mountpoint = base / "mount"
        self.plain = base / "plain"
        self.log = base / "log"
        for directory in (self.backing, self.mountpoint, self.plain):
            if directory.name not in os.listdir(base):  # noqa: PTH208 - the mount may be dead
                directory.mkdir()
        (self.backing / ".vmfs-stub").mkdir(mode=0o700, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("plain_daemon.py")),
                    str(self.backing),
                    str(self.mountpoint),
                    *settings,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.first_answer = self.receive()

    def receive(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the daemon ended: {self.log.read_text()}"
        return json.loads(line)

    def command(self, line: str) -> object:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.receive()

    def stop(self) -> str:
        """End the daemon and return what it logged."""
        try:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        return self.log.read_text()

    def end(self) -> None:
        """End the daemon if the test has not done so, as quickly as it goes."""
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            if self.process.poll() is None:
                with contextlib.suppress(OSError):
                    syscalls.unmount(os.fsencode(self.mountpoint), flags=syscalls.MNT_DETACH | syscalls.MNT_FORCE)
            self.stop()


def names(directory: Path | str) -> list[str]:
    """What a directory lists."""
    return sorted(path.name for path in Path(directory).iterdir())


def tear_down(mountpoint: Path) -> None:
    """Detach whatever is mounted and make the mountpoint removable."""
    while mountpoints.mounts_at(mountpoint):
        syscalls.unmount(os.fsencode(mountpoint), flags=syscalls.MNT_DETACH | syscalls.MNT_FORCE)
    mountpoints.clear_immutable(mountpoint)


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    if path.exists():
        shutil.rmtree(path)


@pytest.fixture
def make_mount(base: Path) -> Iterator[Callable[..., PlainMount]]:
    """Mounts that a test makes itself, with settings as ``name=json``."""
    made: list[PlainMount] = []

    def make(*settings: str) -> PlainMount:
        made.append(PlainMount(base, *settings))
        return made[-1]

    yield make
    try:
        for mount in made:
            mount.end()
    finally:
        if made:
            tear_down(made[0].mountpoint)


@pytest.fixture(scope="module")
def mounted() -> Iterator[PlainMount]:
    """One mount for all tests of a module; each uses names of its own."""
    path = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    path.chmod(0o755)
    mount = PlainMount(path)
    try:
        assert mount.first_answer == {"ready": True}
        yield mount
    finally:
        try:
            mount.end()
        finally:
            tear_down(mount.mountpoint)
            shutil.rmtree(path)
