# ruff: noqa: ASYNC240 - what these tests look at is on a local disk
"""Commands and errors cross the control socket, with the caller that the kernel names."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import stat
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing
from control_fakes import BACKING, FakeHistory, FakeTarget, open_fake_daemon
from pytest import RaisesExc, RaisesGroup

from vmfs_stub.control import messages
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.jobs import JobProgress, one_by_one, open_jobs
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.peer import Peer
from vmfs_stub.control.server import open_control
from vmfs_stub.core import errors
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.worker_pool import NoThread

T = TypeVar("T")

ME = Peer(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


async def ask(path: Path, question: Callable[[ControlClient], T]) -> T:
    def run() -> T:
        return question(ControlClient(path, timeout_s=10))

    return await trio.to_thread.run_sync(run)


async def eventually_answers(path: Path) -> None:
    """Until the server has seen that connections are closed, it may refuse new ones."""
    with trio.fail_after(10):
        while True:
            with suppress(errors.DaemonUnreachable):
                await ask(path, lambda client: client.status())
                return
            await trio.sleep(0.01)


async def test_disks_and_status(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path):
        rows = await ask(socket_path, lambda client: client.list_disks())
        assert [(row.vm, row.state, row.last_access) for row in rows] == [
            ("db", "placeholder", None),
            ("web", "resident", 1_790_000_000.0),
        ]
        assert [row.vm for row in await ask(socket_path, lambda client: client.list_disks("web"))] == ["web"]
        status = await ask(socket_path, lambda client: client.status())
        assert status.daemon.pid == os.getpid()
        assert status.healthy


async def test_policy(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path):
        rows = await ask(socket_path, lambda client: client.policy())
        assert [(row.vm, row.archives, row.rule, row.reason) for row in rows] == [
            ("db", False, None, "no rule is for it"),
            ("web", True, "default", "off for 14 days"),
        ]


async def test_protecting_nothing_or_what_is_not_there_is_refused(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path):
        with pytest.raises(errors.ConfigError, match="name at least one VM"):
            await ask(socket_path, lambda client: client.protect([], protected=True))
        with pytest.raises(errors.VmNotFound, match="nope"):
            await ask(socket_path, lambda client: client.protect(["nope"], protected=True))


async def test_changing_commands_carry_and_log_the_caller(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_fake_daemon(socket_path) as target:
        with caplog.at_level(logging.INFO, logger="vmfs_stub"):
            await ask(socket_path, lambda client: client.hold())
            await ask(socket_path, lambda client: client.unhold())
            await ask(socket_path, lambda client: client.protect(["db", "web"], protected=False))
            await ask(socket_path, lambda client: client.start_backup(["db"], archive=False))
            await ask(socket_path, lambda client: client.start_archive(["db", "web"]))
            await ask(socket_path, lambda client: client.start_recall(["db"]))
            await ask(socket_path, lambda client: client.start_adopt(["db"], force=True))
            await ask(socket_path, lambda client: client.start_adopt([], everything=True, accept_loss=True))
            assert await ask(socket_path, lambda client: client.reload()) == ["hydration.enabled"]
            await ask(socket_path, lambda client: client.shutdown(force=True))
        assert target.calls == [
            ("hold", ME),
            ("unhold", ME),
            ("protect", ("db", "web"), False, ME),
            ("backup", ("db",), False, ME),
            ("archive", ("db", "web"), ME),
            ("recall", ("db",), ME),
            ("adopt", ("db",), False, Told(force=True), ME),
            ("adopt", (), True, Told(accept_loss=True), ME),
            ("reload", ME),
            ("shutdown", True, ME),
        ]
        assert [record.getMessage() for record in caplog.records if "commanded" in record.getMessage()] == [
            f"{what} commanded by uid {ME.uid} (pid {ME.pid})"
            for what in (
                "hold",
                "unhold",
                "protect of 'db', 'web' protected=False",
                "backup of 'db' archive=False",
                "archive of 'db', 'web'",
                "recall of 'db'",
                "adopt of 'db' everything=False force=True accept_loss=False",
                "adopt everything=True force=False accept_loss=True",
                "reload",
                "unmount force=True",
            )
        ]


async def test_the_peer_is_another_process_and_user(socket_path: Path, tmp_path: Path) -> None:
    """The pid is the caller's; a user that is neither root nor ours is refused even past the file's mode."""
    script = (
        "import os, sys, socket\n"
        "os.setuid(int(sys.argv[2]))\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "s.sendall(b'POST /v1/hold HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n')\n"
        "print(os.getpid(), s.recv(100).split(b'\\r\\n')[0].decode())\n"
    )
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    async with open_fake_daemon(socket_path) as target:
        run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False)
        ours = await run([sys.executable, "-c", script, str(socket_path), str(os.geteuid())])
        pid, reply = ours.stdout.decode().split(maxsplit=1)
        assert reply.split()[1] == "204"
        assert target.calls == [("hold", Peer(pid=int(pid), uid=ME.uid, gid=ME.gid))]
        refused = await run([sys.executable, "-c", script, str(socket_path), "65534"])
        assert b"PermissionError" in refused.stderr
        socket_path.chmod(0o666)
        past_the_mode = await run([sys.executable, "-c", script, str(socket_path), "65534"])
        assert b"204" not in past_the_mode.stdout
        assert len(target.calls) == 1


async def test_the_socket_is_private(socket_path: Path) -> None:
    before = os.umask(0)
    try:
        async with open_fake_daemon(socket_path):
            assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert list(socket_path.parent.iterdir()) == []


async def test_usage(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target:
        found = await ask(socket_path, lambda client: client.usage("web", days=30))
        assert ("usage", "web", 30) in target.calls
        assert (found.vm, found.state, [span.is_gap for span in found.spans]) == ("web", "off", [True, False])
        with pytest.raises(errors.VmNotFound, match="no VM is called 'x&y/z'"):
            await ask(socket_path, lambda client: client.usage("x&y/z", days=1))
        for days in (0, -1, 731, 10**30):
            with pytest.raises(errors.ConfigError, match="days must be"):
                await ask(socket_path, lambda client, days=days: client.usage("web", days=days))


async def test_errors_keep_their_class_and_message(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target:
        with pytest.raises(errors.VmNotFound, match="no VM is called 'x&y/z'"):
            await ask(socket_path, lambda client: client.list_disks("x&y/z"))
        target.busy = True
        with pytest.raises(errors.InUse, match="process 7"):
            await ask(socket_path, lambda client: client.shutdown(force=False))
        with pytest.raises(errors.ConfigError, match="at least one VM"):
            await ask(socket_path, lambda client: client.start_recall([]))
        for vms, everything in (([], False), (["db"], True)):
            with pytest.raises(errors.ConfigError, match="or all of them"):
                await ask(socket_path, partial(ControlClient.start_adopt, vms=vms, everything=everything))
        with pytest.raises(errors.NotFound, match="no job"):
            await ask(socket_path, lambda client: client.job(messages.JobId("f" * 32)))


def test_every_error_crosses_as_itself() -> None:
    for error in _tree(errors.VmfsStubError):
        if error.__module__ != errors.__name__:
            continue
        received = messages.error_of(messages.error_info(error("why")))
        assert type(received) is error
        assert str(received) == "why"
    strange = messages.error_of(messages.ErrorInfo(error="annotations", message="m"))
    assert type(strange) is errors.VmfsStubError


def test_an_error_of_one_module_crosses_as_what_it_is_a_kind_of() -> None:
    received = messages.error_of(messages.error_info(NoThread("no thread could be started")))
    assert type(received) is errors.PrimaryIOError
    assert str(received) == "no thread could be started"


async def test_a_bug_in_a_handler_is_an_answer(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_fake_daemon(socket_path) as target:
        target.broken = True
        with pytest.raises(errors.VmfsStubError, match="ValueError: a bug"):
            await ask(socket_path, lambda client: client.list_disks())
        assert "Traceback" in caplog.text
        assert (await ask(socket_path, lambda client: client.status())).healthy


async def test_a_job_is_cancelled_and_its_report_kept(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target:
        target.may_finish = trio.Event()
        job_id = await ask(socket_path, lambda client: client.start_backup(["db"], archive=True, rehearsal=True))
        await target.working.wait()
        await ask(socket_path, lambda client: client.cancel_job(job_id))
        ended = await ask(socket_path, lambda client: client.wait_job(job_id, lambda _: None))
        assert (ended.state, ended.error) == ("cancelled", None)
        with pytest.raises(errors.Refused, match="is over"):
            await ask(socket_path, lambda client: client.cancel_job(job_id))
        with pytest.raises(errors.NotFound):
            await ask(socket_path, lambda client: client.cancel_job(messages.JobId("f" * 32)))
        assert target.calls[0] == ("backup", ("db",), True, "rehearsal", ME)
        await ask(socket_path, lambda client: client.pause_jobs(paused=True))
        assert (await ask(socket_path, lambda client: client.status())).daemon.jobs_paused
        await ask(socket_path, lambda client: client.pause_jobs(paused=False))
        assert target.calls[-2:] == [("pause", ME), ("unpause", ME)]


async def test_what_is_known_of_a_cancelled_job_is_its_report() -> None:
    history = FakeHistory()
    async with open_jobs(history, running_max=2, kept=10) as jobs:
        added = trio.Event()

        async def work(progress: JobProgress) -> messages.JobReport:
            progress.add(messages.VmOutcome(vm="a", outcome="backed up"))
            added.set()
            await trio.sleep_forever()
            raise AssertionError

        job_id = jobs.start("backup", ["a", "b"], work, peer=ME)
        await added.wait()
        running = jobs.get(job_id)
        assert running.state == "running"
        assert running.result is not None
        jobs.cancel(job_id)
        ended = await jobs.wait(job_id, wait_s=10)
        assert ended.state == "cancelled"
        assert ended.result == running.result
    assert history.ended == [(job_id, "cancelled")]


async def test_jobs_report_progress_and_outcome(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target:
        target.may_finish = trio.Event()
        job_id = await ask(socket_path, lambda client: client.start_backup(["db"], archive=True))
        await target.working.wait()  # a job is recorded, in a thread, before its work begins
        running = await ask(socket_path, lambda client: client.job(job_id))
        assert (running.state, running.caller_uid) == ("running", ME.uid)
        assert (running.progress.done_bytes, running.progress.total_bytes) == (1, 2)
        assert [job.id for job in (await ask(socket_path, lambda client: client.status())).jobs] == [job_id]
        target.may_finish.set()
        seen: list[messages.JobInfo] = []
        done = await ask(socket_path, lambda client: client.wait_job(job_id, seen.append))
        assert done.state == "done"
        assert done.result == {"vms": [{"vm": "db", "outcome": "done", "message": "2 bytes", "error": None}]}
        assert seen[-1] == done
        damaged = await ask(socket_path, lambda client: client.start_archive(["damaged"]))
        failed = await ask(socket_path, lambda client: client.wait_job(damaged, seen.append))
        assert failed.error == messages.ErrorInfo(error="CorruptFrame", message="a frame of 'damaged' does not decode")
        bug = await ask(socket_path, lambda client: client.start_archive(["bug"]))
        unexpected = await ask(socket_path, lambda client: client.wait_job(bug, seen.append))
        assert unexpected.error is not None
        assert "ValueError" in unexpected.error.message
        listed = await ask(socket_path, lambda client: client.jobs())
        assert [job.id for job in listed] == [bug, damaged, job_id]
        partly = await ask(socket_path, lambda client: client.start_backup(["db", "big"], archive=False))
        partly_failed = await ask(socket_path, lambda client: client.wait_job(partly, seen.append))
        assert (partly_failed.state, partly_failed.result is None) == ("failed", False)
        assert partly_failed.error == messages.ErrorInfo(error="StoreFull", message="no room")


async def test_an_answer_waits_for_the_end_of_a_job(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target:
        target.may_finish = trio.Event()
        job_id = await ask(socket_path, lambda client: client.start_backup(["db"], archive=True))
        assert (await ask(socket_path, lambda client: client.job(job_id, wait_s=0.05))).state == "running"

        async def finish() -> None:
            await target.working.wait()
            await trio.sleep(0.05)
            target.may_finish.set()

        with trio.fail_after(8):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finish)
                assert (await ask(socket_path, lambda client: client.job(job_id, wait_s=10))).state == "done"
                assert (await ask(socket_path, lambda client: client.job(job_id, wait_s=10))).state == "done"
        for wrong in (-1, 11, math.nan):
            with pytest.raises(errors.ConfigError, match="from 0 to 10"):
                await ask(socket_path, lambda client, wait_s=wrong: client.job(job_id, wait_s=wait_s))


async def test_jobs_are_bounded_recorded_and_interrupted() -> None:
    history = FakeHistory()

    async def for_ever(progress: JobProgress) -> messages.JobReport:
        await trio.sleep_forever()
        raise AssertionError

    async def at_once(progress: JobProgress) -> messages.JobReport:
        return messages.JobReport()

    async with open_jobs(history, running_max=2, kept=3) as jobs:
        first = [jobs.start("recall", ["a"], for_ever, peer=ME) for _ in range(2)]
        with pytest.raises(errors.Refused, match="2 jobs run already"):
            jobs.start("recall", ["b"], for_ever, peer=ME)
    assert sorted(history.ended) == sorted((job_id, "interrupted") for job_id in first)
    async with open_jobs(history, running_max=2, kept=3) as jobs:
        for _ in range(5):
            job_id = jobs.start("backup", [], at_once, peer=ME)
            while jobs.get(job_id).state == "running":
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert len(jobs.list()) == 3


async def test_metrics_are_scraped(socket_path: Path) -> None:
    metrics = Metrics()
    metrics.gauge("open_disks", "Open disks", lambda: 3.0)
    async with (
        open_jobs(FakeHistory(), running_max=1, kept=1) as jobs,
        open_control(FakeTarget(jobs), metrics, backing=BACKING, socket_path=socket_path),
    ):
        await ask(socket_path, lambda client: client.status())
        text = await ask(socket_path, lambda client: client.metrics())
    assert "vmfs_stub_open_disks 3.0" in text
    assert 'vmfs_stub_control_requests_total{outcome="ok",route="/v1/status"} 1.0' in text


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    async with open_fake_daemon(socket_path):
        with RaisesGroup(RaisesExc(errors.DatastoreLocked, match="another daemon"), flatten_subgroups=True):
            async with open_fake_daemon(socket_path):
                pass
        assert (await ask(socket_path, lambda client: client.status())).healthy
    socket_path.write_text("precious")
    with RaisesGroup(RaisesExc(errors.AlreadyExists, match="no socket"), flatten_subgroups=True):
        async with open_fake_daemon(socket_path):
            pass
    assert socket_path.read_text() == "precious"


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    with RaisesGroup(RaisesExc(errors.ConfigError, match="too long"), flatten_subgroups=True):
        async with open_fake_daemon(directory / "control.sock"):
            pass
    assert list(directory.iterdir()) == []


async def test_connections_are_bounded(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path):
        streams = [await trio.open_unix_socket(socket_path) for _ in range(8)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(errors.DaemonUnreachable):
            await ask(socket_path, lambda client: client.status())
        for stream in streams:
            await stream.aclose()
        await eventually_answers(socket_path)


async def test_a_connection_ends_with_its_reply(socket_path: Path) -> None:
    """Otherwise a script that runs `ls` in a loop would use all connections up."""
    async with open_jobs(FakeHistory(), running_max=1, kept=1) as jobs:
        target = FakeTarget(jobs)
        async with open_control(
            target, Metrics(), backing=BACKING, socket_path=socket_path, connections_max=2, idle_s=60
        ):
            for _ in range(10):
                await ask(socket_path, lambda client: client.status())


async def test_the_reply_to_unmount_arrives_while_the_daemon_stops(socket_path: Path) -> None:
    async with open_fake_daemon(socket_path) as target, trio.open_nursery() as nursery:
        nursery.start_soon(ask, socket_path, lambda client: client.shutdown(force=False))
        await target.stopping.wait()  # leaves the server at once, with the reply still to be sent
    assert target.calls[-1][0] == "shutdown"
    with pytest.raises(errors.DaemonUnreachable, match="no daemon answers"):
        await ask(socket_path, lambda client: client.status())


async def test_a_socket_of_another_user_is_not_told_of_as_a_daemon_that_is_away(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(errors.DaemonUnreachable, match=r"Permission denied.*be root"):
        await ask(socket_path, lambda client: client.status())


async def test_what_is_not_our_daemon(socket_path: Path) -> None:
    async def rude(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(b"HTTP/1.1 404 Nope\r\ncontent-length: 2\r\n\r\nhi")
        await stream.aclose()

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(socket_path))
    sock.listen(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, rude, [trio.SocketListener(sock)])
        with pytest.raises(errors.DaemonUnreachable, match="does not speak"):
            await ask(socket_path, lambda client: client.status())
        nursery.cancel_scope.cancel()
    sock.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999\r\n\r\n[]", "broke off"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffff\r\n[]", "broke off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + b" " * 2000, "does not speak"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2100, "larger than"),
    ],
)
async def test_an_answer_gets_no_more_memory_than_it_has_bytes(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, message: str
) -> None:
    monkeypatch.setattr("vmfs_stub.control.client.REPLY_BYTES_MAX", 2050)
    tracemalloc.start()
    try:
        async with answering(socket_path, [answer]):
            with pytest.raises(errors.DaemonUnreachable, match=message):
                await ask(socket_path, lambda client: client.jobs())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b" "])
async def test_an_answer_that_does_not_end_is_given_up(socket_path: Path, piece: bytes) -> None:
    pieces = [piece] + [piece if b"100" in piece else b" "] * 200
    async with answering(socket_path, pieces, interval_s=0.02):
        client = ControlClient(socket_path, timeout_s=0.3)
        with pytest.raises(errors.DaemonUnreachable, match="no answer within"), trio.fail_after(3):
            await trio.to_thread.run_sync(client.status)


async def test_metrics_that_are_no_text_are_shown_all_the_same(socket_path: Path) -> None:
    async with answering(socket_path, [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na\xff"]):
        assert await ask(socket_path, lambda client: client.metrics()) == "a\ufffd"


async def test_a_client_that_leaves_amid_its_request_is_no_failure(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_fake_daemon(socket_path) as target:
        stream = await trio.open_unix_socket(str(socket_path))
        await stream.send_all(b"POST /v1/backup HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n{")
        await stream.aclose()
        await eventually_answers(socket_path)
        with trio.move_on_after(0.3):
            await trio.sleep_forever()
        assert [call[0] for call in target.calls if call[0] == "backup"] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_what_follows_a_request_is_no_failure_of_the_daemon(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused, and the connection ended, while the reply may still be going out."""
    async with open_fake_daemon(socket_path):
        for _ in range(20):
            stream = await trio.open_unix_socket(str(socket_path))
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n{}\0 no request")
            with suppress(trio.BrokenResourceError), trio.fail_after(5):
                while await stream.receive_some():
                    pass
            await stream.aclose()
            await eventually_answers(socket_path)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="at once"),
        pytest.param(b"GET /v1/status HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\n\r\n", id="by an upgrade"),
    ],
)
async def test_nobody_speaks_http_2_and_the_connection_ends_in_time(socket_path: Path, asked: bytes) -> None:
    async with open_jobs(FakeHistory(), running_max=1, kept=1) as jobs:
        target = FakeTarget(jobs)
        async with open_control(
            target, Metrics(), backing=BACKING, socket_path=socket_path, connections_max=4, idle_s=0.1
        ):
            stream = await trio.open_unix_socket(str(socket_path))
            await stream.send_all(asked)
            answer = b""
            with trio.fail_after(10):
                while part := await stream.receive_some():
                    answer += part
            await stream.aclose()
    assert answer.startswith(b"HTTP/1.1 ")
    assert not answer.startswith(b"HTTP/1.1 101")


@asynccontextmanager
async def answering(path: Path, pieces: Sequence[bytes], *, interval_s: float = 0.0) -> AsyncIterator[None]:
    """Something at ``path`` that answers each request with ``pieces``, one by one, whatever it is."""

    async def answer(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some(4096)
            for piece in pieces:
                await stream.send_all(piece)
                await trio.sleep(interval_s)
            await stream.aclose()

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(sock)])
        yield
        nursery.cancel_scope.cancel()
    sock.close()


def _tree(error: type[errors.VmfsStubError]) -> list[type[errors.VmfsStubError]]:
    return [error, *(leaf for child in error.__subclasses__() for leaf in _tree(child))]


@dataclass(frozen=True)
class FakeVm:
    name: str


@pytest.mark.parametrize("tolerant", [True, False])
async def test_what_goes_wrong_with_one_vm_spoils_no_other(tolerant: bool, caplog: pytest.LogCaptureFixture) -> None:
    raised = {
        "bug": RuntimeError("what is this"),
        "group": ExceptionGroup("several", [OSError(5, "broken")]),
        "used": errors.InUse("in use"),
        "full": errors.NoSpace("no room"),
    }

    async def step(vm: FakeVm) -> messages.VmOutcome:
        await trio.lowlevel.checkpoint()
        if vm.name in raised:
            raise raised[vm.name]
        return messages.VmOutcome(vm=vm.name, outcome="backed up")

    vms = [FakeVm(name) for name in ("bug", "group", "used", "full", "good")]
    found = {each.vm: each for each in await one_by_one("backup", vms, step, tolerant=tolerant)}
    assert [each.outcome for each in found.values()] == ["failed", "failed", "skipped", "failed", "backed up"]
    assert "RuntimeError: what is this; the daemon's log" in found["bug"].message
    assert "OSError" in found["group"].message
    assert found["full"].error == messages.ErrorInfo(error="NoSpace", message="no room")
    assert (found["used"].error is None) == tolerant
    tracebacks = [record.message for record in caplog.records if record.exc_info]
    assert tracebacks == ["backup of VM bug failed unexpectedly", "backup of VM group failed unexpectedly"]
