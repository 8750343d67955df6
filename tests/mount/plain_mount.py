"""A mount of a plain directory, served by a process of its own that a test can command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

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
