# ruff: noqa: ASYNC110 - what is waited for has no event of its own
"""The metrics' port answers one question, for anybody, and lets nobody hold it up."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, memory_stream_pair

from vmfs_stub.config.monitoring import listen_address
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.metrics_port import CONNECTION_S, RETRY_INTERVAL_S, MetricsPort
from vmfs_stub.services.recall_waits import Waits

GET = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def some_metrics() -> Metrics:
    metrics = Metrics()
    metrics.gauge("open_disks", "Open disks.", lambda: 3.0)
    return metrics


@asynccontextmanager
async def serving(*, connections_max: int = 4, metrics: Metrics | None = None) -> AsyncIterator[int]:
    port, told = free_port(), list[OSError | None]()
    served = MetricsPort(
        metrics or some_metrics(), ("127.0.0.1", port), connections_max=connections_max, tell=told.append
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.run)
        with trio.fail_after(10):
            while not told:
                await trio.sleep(0.01)
        assert told == [None]
        yield port
        nursery.cancel_scope.cancel()


async def ask(port: int, request: bytes) -> bytes:
    """All that is answered until the other end closes."""
    with trio.fail_after(10):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(request)
            await stream.send_eof()
            return b"".join([part async for part in stream])


async def test_get_metrics_and_nothing_else() -> None:
    async with serving() as port:
        answer = await ask(port, GET)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"text/plain; version=" in head
        assert "vmfs_stub_open_disks 3.0" in body.decode()
        assert (await ask(port, GET.replace(b"/metrics", b"/metrics?x=1"))).startswith(b"HTTP/1.1 200 ")
        for path in (b"/", b"/v1/status", b"/v1/disks", b"/metrics/x", b"//metrics", b"/v1/shutdown"):
            assert (await ask(port, GET.replace(b"/metrics", path))).startswith(b"HTTP/1.1 404 "), path
        for method in (b"POST", b"HEAD", b"DELETE", b"PUT"):
            assert (await ask(port, GET.replace(b"GET", method))).startswith(b"HTTP/1.1 405 "), method


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 9,
        b"A" * 100_000,
        b"",
        b"GET /m",
    ],
)
async def test_what_is_no_request_harms_nobody(request_: bytes) -> None:
    async with serving() as port:
        answer = await ask(port, request_)
        assert answer.startswith(b"HTTP/1.1 4") or answer == b""
        assert (await ask(port, GET)).startswith(b"HTTP/1.1 200 ")


async def test_a_metric_that_fails_ends_one_connection() -> None:
    metrics, broken = some_metrics(), [True]

    def read() -> float:
        if broken:
            raise OSError(errno.EIO, "the disk")
        return 1.0

    metrics.gauge("broken", "Breaks.", read)
    async with serving(metrics=metrics) as port:
        assert await ask(port, GET) == b""
        broken.clear()
        assert b"vmfs_stub_broken 1.0" in await ask(port, GET)


async def test_connections_are_bounded() -> None:
    async with serving(connections_max=2) as port:
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        await trio.sleep(0.1)
        assert await ask(port, b"") == b""
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            assert await ask(port, GET) != b""
        for stream in silent:
            await stream.aclose()
        with trio.fail_after(10):
            while not await answers(port):
                await trio.sleep(0.01)


async def answers(port: int) -> bool:
    try:
        return (await ask(port, GET)).startswith(b"HTTP/1.1 200 ")
    except trio.BrokenResourceError:
        return False


async def test_who_says_nothing_is_let_go(autojump_clock: MockClock) -> None:
    served = MetricsPort(some_metrics(), ("127.0.0.1", 1), connections_max=1, tell=lambda error: None)
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.handle, theirs)  # type: ignore[arg-type]
        await ours.send_all(GET[:10])
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await trio.sleep(1)
                await ours.send_all(b"a")
    assert trio.current_time() == pytest.approx(CONNECTION_S, abs=1)


async def test_a_port_in_use_is_told_and_tried_again(autojump_clock: MockClock) -> None:
    told: list[OSError | None] = []
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = ("127.0.0.1", other.getsockname()[1])
        served = MetricsPort(some_metrics(), address, connections_max=1, tell=told.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run)
            await trio.sleep(RETRY_INTERVAL_S * 1.5)
            assert [error is not None and error.errno for error in told] == [errno.EADDRINUSE] * 2
            other.close()
            await trio.sleep(RETRY_INTERVAL_S)
            assert told[-1] is None
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9640", ("127.0.0.1", 9640)),
        ("[::1]:1", ("::1", 1)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert listen_address(text) == expected


@pytest.mark.parametrize(
    "text",
    ["9640", ":9640", "localhost:9640", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1",
     "::1:9640", "[127.0.0.1]:9640", "[fe80::1%eth0]:9640", "127.0.0.1:९६४०", "1.2.3:80", "127.0.0.1:99999999999999"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        listen_address(text)


def test_a_histogram_and_what_nobody_knows() -> None:
    metrics = Metrics()
    metrics.histogram("wait_seconds", "Waits.", lambda: Waits((0.5, 1.0), (2, 1, 4), 9.5))
    metrics.maybe("unknown", "Unknown.", lambda: None)
    metrics.maybe("known", "Known.", lambda: 2.0)
    metrics.totals("jobs", "Jobs.", ("kind", "outcome"), lambda: {("backup", 'a"b\n'): 3.0})
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    buckets = {sample.labels["le"]: sample.value for sample in families["vmfs_stub_wait_seconds"].samples[:3]}
    assert buckets == {"0.5": 2, "1.0": 3, "+Inf": 7}
    assert [sample.value for sample in families["vmfs_stub_wait_seconds"].samples[3:]] == [7, 9.5]
    assert families["vmfs_stub_unknown"].samples == []
    assert families["vmfs_stub_known"].samples[0].value == 2
    assert families["vmfs_stub_jobs"].samples[0].labels == {"kind": "backup", "outcome": 'a"b\n'}
