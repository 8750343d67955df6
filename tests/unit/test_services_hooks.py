"""Hooks can keep a VM from being touched, and nothing else: not when they hang, talk, crash or are not there."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.services import hooks
from vmfs_stub.services.hooks import HookCall, Hooks

CALL = HookCall("archive", "web", "a" * 32, reason="idle for 20 days", rule="idle", undo="vmfs-stub recall web")


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


async def before(code: str, *words: str, limit_s: float = 20.0) -> str:
    return await Hooks(python(code, *words), limit_s=limit_s).before(CALL)


async def test_one_that_ends_well_allows_it() -> None:
    assert await before("import sys; print('x' * 1000000); print('noise', file=sys.stderr)") == ""
    assert await Hooks().before(CALL) == ""


async def test_one_that_fails_says_why() -> None:
    said = await before("import sys; sys.exit('it is being moved\\nsecond line')")
    assert said == f"the hook {sys.executable} forbids it: it is being moved"
    assert (await before("import sys; sys.exit(3)")).endswith("it ended with 3")
    assert (await before("import os; os.kill(os.getpid(), 9)")).endswith("it ended with -9")


async def test_what_it_is_told(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        "import json, os, sys; mine = {k: v for k, v in os.environ.items() if k.startswith('VMFS_STUB_')};"
        "open(sys.argv[1], 'w').write(json.dumps([mine, json.load(sys.stdin), sorted(os.environ)]))"
    )
    os.environ["AWS_SECRET_ACCESS_KEY"] = "secret"
    try:
        await Hooks((), python(code, str(told))).after(CALL, "archived")
    finally:
        del os.environ["AWS_SECRET_ACCESS_KEY"]
    environment, stdin, names = json.loads(told.read_text())
    assert environment == {
        "VMFS_STUB_WHAT": "archive",
        "VMFS_STUB_VM": "web",
        "VMFS_STUB_VM_ID": "a" * 32,
        "VMFS_STUB_REASON": "idle for 20 days",
        "VMFS_STUB_RULE": "idle",
        "VMFS_STUB_UNDO": "vmfs-stub recall web",
        "VMFS_STUB_OUTCOME": "archived",
    }
    assert stdin == {name.removeprefix("VMFS_STUB_").lower(): value for name, value in environment.items()}
    assert "AWS_SECRET_ACCESS_KEY" not in names


async def test_one_that_cannot_be_run_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ConfigError, match=r"missing cannot be run: No such file or directory; correct \[hooks\] before"
    ):
        await Hooks([str(tmp_path / "missing")]).before(CALL)
    (tmp_path / "plain").write_text("no program")
    with pytest.raises(ConfigError, match="plain cannot be run: Permission denied"):
        await Hooks([str(tmp_path / "plain")]).before(CALL)
    await Hooks((), [str(tmp_path / "missing")]).after(CALL, "archived")
    assert "cannot be run: No such file or directory" in caplog.text


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def gone(pid: int) -> bool:
    for _ in range(500):
        if not alive(pid):
            return True
        await trio.sleep(0.01)
    return False


def pids(path: Path) -> list[int]:
    """Of the hook and what it started; none while it has not said."""
    done = Path(f"{path}.done")
    return list(map(int, done.read_text().split())) if done.exists() else []


HANGS = (
    "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}'); os.rename(sys.argv[1], sys.argv[1] + '.done');"
)


async def test_one_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    began_s = time.monotonic()
    said = await before(HANGS + "time.sleep(600)", str(path), limit_s=3)
    assert said.endswith("did not end within 3 s and was killed")
    assert time.monotonic() - began_s < 20
    for pid in pids(path):
        assert await gone(pid)


async def test_what_it_leaves_behind_is_killed_when_it_holds_on(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert await before(HANGS, str(path)) == ""
    for pid in pids(path):
        assert await gone(pid)


async def test_one_that_talks_without_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    listen = hooks._listen

    async def watched(process: trio.Process, said: bytearray, over: trio.Event) -> None:
        await listen(process, said, over)
        kept.append(len(said))

    monkeypatch.setattr(hooks, "_listen", watched)
    said = await before("import sys\nsys.stderr.write('y' * (8 << 20))\nsys.exit(1)")
    assert kept == [hooks.SAID_BYTES_MAX]
    assert len(said) < hooks.REASON_CHARACTERS_MAX + 100


async def test_what_it_says_can_be_shown() -> None:
    said = await before("import sys; sys.stderr.buffer.write(b'\\x1b[31m\\xff\\n'); sys.exit(1)")
    assert "\x1b" not in said
    assert said.isprintable()


async def test_a_job_that_is_cancelled_ends_its_hook(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(before, HANGS + "time.sleep(600)", str(path))
            while not pids(path):  # noqa: ASYNC110
                await trio.sleep(0.01)
            scope.cancel()
    for pid in pids(path):
        assert await gone(pid)


async def test_one_that_fails_afterwards_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    await Hooks((), python("import sys; sys.exit('no')")).after(CALL, "archived")
    assert "the hook after the archive of VM web failed (1): no" in caplog.text
