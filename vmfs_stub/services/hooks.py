"""Commands of the operator's own that run before and after something is done to a VM.

No shell is involved: a command is a list of words.  What it is about is in its environment, and as JSON on its standard
input.  It has a limit of time, after which it is killed with all that it has started; of what it says on standard error
the first line is kept, the rest is read and forgotten.  A hook can keep a VM from being touched, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import trio

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.names import printable

SAID_BYTES_MAX = 4096
"""Of what a hook says that is kept."""
REASON_CHARACTERS_MAX = 500
LEFT_OPEN_S = 1.0
"""How long a hook that has ended is listened to, while something that it started still could speak."""
GONE_WAIT_S = 5.0
"""How long a killed hook may hang in a system call until nobody waits for it any more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HookCall:
    """What a hook is told; ``undo`` is the command that takes it back, ``outcome`` is empty before it is done."""

    what: Literal["backup", "archive", "stop", "start"]
    vm: str
    vm_id: str
    reason: str = ""
    rule: str = ""
    undo: str = ""
    outcome: str = ""

    def environment(self) -> dict[str, str]:
        """The same as variables."""
        return {f"VMFS_STUB_{name.upper()}": _plain(value) for name, value in asdict(self).items()}


class _CannotRun(Exception):
    """No process was started; says why."""


class Hooks:
    """The commands of one datastore; an empty one is none.  ``limit_s`` is for each run."""

    def __init__(self, before: Sequence[str] = (), after: Sequence[str] = (), *, limit_s: float = 60.0) -> None:
        self._before = tuple(before)
        self._after = tuple(after)
        self._limit_s = limit_s

    async def before(self, call: HookCall) -> str:
        """Why it must not be done; empty when it may.  A hook that hangs forbids it.

        Raises ConfigError where it cannot be run at all: nobody has said then that the VM is to be left alone.
        """
        if not self._before:
            return ""
        try:
            code, said = await self._run(self._before, call)
        except _CannotRun as exc:
            name = printable(self._before[0])
            raise ConfigError(f"the hook {name} cannot be run: {exc}; correct [hooks] before") from exc
        if code == 0:
            return ""
        why = said or (f"it ended with {code}" if code is not None else "it did not end")
        return f"the hook {printable(self._before[0])} forbids it: {why}"

    async def after(self, call: HookCall, outcome: str) -> None:
        """Tell how it went; what the hook makes of that is logged and changes nothing."""
        if not self._after:
            return
        try:
            code, said = await self._run(self._after, replace(call, outcome=outcome))
        except _CannotRun as exc:
            log.warning("the hook after the %s of VM %s cannot be run: %s", call.what, call.vm, exc)
            return
        if code != 0:
            log.warning("the hook after the %s of VM %s failed (%s): %s", call.what, call.vm, code, said)

    async def _run(self, command: Sequence[str], call: HookCall) -> tuple[int | None, str]:
        """Exit code (None: it had none) and the first line that it said.  Raises _CannotRun."""
        try:
            process = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**_inherited(os.environ), **call.environment()},
                cwd="/",
                start_new_session=True,
            )
        except (OSError, ValueError, RuntimeError) as exc:
            raise _CannotRun(getattr(exc, "strerror", None) or str(exc)) from exc
        said = bytearray()
        over = trio.Event()
        try:
            with trio.move_on_after(self._limit_s) as limit:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_feed, process, json.dumps(asdict(call)).encode())
                    nursery.start_soon(_listen, process, said, over)
                    await process.wait()
                    with trio.move_on_after(LEFT_OPEN_S):
                        await over.wait()
                    nursery.cancel_scope.cancel()
        finally:
            await _end(process, is_silent=over.is_set())
        if limit.cancelled_caught:
            return None, f"it did not end within {self._limit_s:g} s and was killed"
        lines = bytes(said).decode("utf-8", "replace").splitlines()
        return process.returncode, printable(lines[0])[:REASON_CHARACTERS_MAX] if lines else ""


async def _feed(process: trio.Process, text: bytes) -> None:
    assert process.stdin is not None
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await process.stdin.send_all(text)
    await process.stdin.aclose()


async def _listen(process: trio.Process, said: bytearray, over: trio.Event) -> None:
    assert process.stderr is not None
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while more := await process.stderr.receive_some(SAID_BYTES_MAX):
            said += more[: SAID_BYTES_MAX - len(said)]
    over.set()


async def _end(process: trio.Process, *, is_silent: bool) -> None:
    """Kill what has not ended, and what it has left behind."""
    # One that has ended is not there any more, and its number may be another's, unless something of its group is left.
    if process.returncode is None or not is_silent:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with trio.CancelScope(shield=True):
        with trio.move_on_after(GONE_WAIT_S) as wait:
            await process.wait()
        if wait.cancelled_caught:
            log.error("the hook's process %d was killed, but hangs in a system call", process.pid)
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                await pipe.aclose()


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a hook needs of the daemon's environment: credentials are not among it."""
    return {name: environment[name] for name in ("PATH", "LANG", "LC_ALL", "TZ", "HOME") if name in environment}


def _plain(text: str) -> str:
    return text.replace("\0", "")
