"""The command line in processes of its own, forked from one that has imported all of it already.

That is most of the work of a start.  Only `exec` and the imports are left out; `test_in_use.py`, soaks and the demo
start the program from nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from vmfs_stub import cli, daemon  # noqa: F401 - the daemon for those who are forked
from vmfs_stub.cli import main as command_line

for _module in pkgutil.iter_modules(cli.__path__):
    importlib.import_module(f"{cli.__name__}.{_module.name}")

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.e2e.forked"])


class Forked:
    """A command that runs, with what `subprocess.Popen` offers of it."""

    def __init__(self, words: Sequence[str], *, out: IO[bytes], err: IO[bytes]) -> None:
        # Connections since these are what takes a descriptor to another process.
        with _connection(out) as to, _connection(err) as told:
            args = (list(words), (to, told), str(Path.cwd()), dict(os.environ))
            # A "daemon" is what this process neither waits for nor leaves behind when it ends.
            self._process = _FORKS.Process(target=_run, args=args, daemon=True)
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended.  Raises TimeoutError."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"process {self.pid} has not ended within {timeout:g} s")
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _connection(file: IO[bytes]) -> Connection:
    return Connection(os.dup(file.fileno()), readable=False)


def run(words: Sequence[str], *, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, output and diagnostics of a command.  Raises TimeoutError, after which it does not run on."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = Forked(words, out=out, err=err)
        try:
            code = command.wait(timeout_s)
        finally:
            command.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return code, texts[0], texts[1]


def _run(words: Sequence[str], files: Sequence[Connection], directory: str, environment: Mapping[str, str]) -> None:
    """In the forked process: what the interpreter does before `main`, with the starter's directory and environment."""
    for fd, file in enumerate(files, start=1):
        os.dup2(file.fileno(), fd)
        file.close()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["vmfs-stub", *words]
    command_line.main()
