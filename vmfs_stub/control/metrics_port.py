"""Serves the metrics on a TCP port, and nothing else of the API: whoever reaches the port is asked nothing.

Every connection has one answer and a limit of time; how many there are at once is bounded.  A port that somebody else
has is told of, and tried again: it stops nothing.  Must not know what the metrics say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import h11
import trio

from vmfs_stub.control.metrics import CONTENT_TYPE, Metrics

CONNECTION_S: Final = 10.0
"""For one request and its answer."""
REQUEST_BYTES_MAX: Final = 16 << 10
RETRY_INTERVAL_S: Final = 30.0
_BACKLOG: Final = 16
_READ_BYTES: Final = 4096

log = logging.getLogger(__name__)


class MetricsPort:
    """Answers ``GET /metrics`` on one address; ``tell`` gets why it cannot, and None when it can again."""

    def __init__(
        self,
        metrics: Metrics,
        address: tuple[str, int],
        *,
        connections_max: int,
        tell: Callable[[OSError | None], None],
    ) -> None:
        self._metrics = metrics
        self._address = address
        self._connections_max = connections_max
        self._connection_count = 0
        self._tell = tell

    async def run(self) -> None:
        """Serve for ever; a port that cannot be had is tried again now and then."""
        host, port = self._address
        while True:
            try:
                listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
            except OSError as exc:
                self._tell(exc)
                await trio.sleep(RETRY_INTERVAL_S)
                continue
            self._tell(None)
            await trio.serve_listeners(self.handle, listeners)

    async def handle(self, stream: trio.SocketStream) -> None:
        """Answer one request; never raises but for cancellation."""
        if self._connection_count >= self._connections_max:
            log.warning("more than %d connections to the metrics' port: one was closed", self._connections_max)
            await trio.aclose_forcefully(stream)
            return
        self._connection_count += 1
        try:
            with trio.move_on_after(CONNECTION_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._answer(stream)
        except Exception:  # a scrape must not end the daemon
            log.exception("a request for metrics failed")
        finally:
            self._connection_count -= 1
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
        send = partial(_send, stream, connection)
        try:
            request = await _request(stream, connection)
        except h11.RemoteProtocolError as exc:
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await send(exc.error_status_hint, b"this is no HTTP request that can be answered\n")
            return
        if request is None:
            return
        if request.target.partition(b"?")[0] != b"/metrics":
            await send(404, b"only /metrics is here\n")
        elif request.method != b"GET":
            body = b"" if request.method == b"HEAD" else b"only GET is answered\n"
            await send(405, body, extra=[("allow", "GET")])
        else:
            await send(200, self._metrics.render(), content_type=CONTENT_TYPE)


async def _request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    """What is asked, without a body, which nobody reads; None when the client has gone.  Raises RemoteProtocolError."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await stream.receive_some(_READ_BYTES))


async def _send(
    stream: trio.SocketStream,
    connection: h11.Connection,
    status: int,
    body: bytes,
    *,
    content_type: str = "text/plain; charset=utf-8",
    extra: list[tuple[str, str]] | None = None,
) -> None:
    headers = [("content-type", content_type), ("content-length", str(len(body))), ("connection", "close")]
    response = connection.send(h11.Response(status_code=status, headers=headers + (extra or [])))
    data = connection.send(h11.Data(data=body))
    await stream.send_all((response or b"") + (data or b""))
    with suppress(trio.BrokenResourceError):
        await stream.send_eof()
    # Until the client has closed, too: closed at once, with a body of its own unread, it would lose the answer.
    left = REQUEST_BYTES_MAX
    while left > 0 and (more := await stream.receive_some(_READ_BYTES)):
        left -= len(more)
