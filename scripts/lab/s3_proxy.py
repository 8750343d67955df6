"""A proxy before an S3 server that delays, refuses, cuts and forgets, as networks and busy servers do.

Requests go on byte for byte, with the signature that the client made, so the server answers as it would without it.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to one request: after ``delay_s`` it is answered with ``status``, or lost, or its answer is.

    ``loses``: the connection ends before the server has the request; ``forgets``: after the server has done it, without
    an answer; ``cuts``: in the middle of the answer's body.
    """

    delay_s: float = 0.0
    status: int = 0
    loses: bool = False
    forgets: bool = False
    cuts: bool = False


NOTHING: Final = Trouble()
Plan = Callable[[str, str], Trouble]
"""From method and path (with its query) to what happens."""


class S3Proxy:
    """The proxy; ``plan`` may be replaced at any time."""

    def __init__(self, endpoint: str) -> None:
        self.plan: Plan = lambda method, path: NOTHING
        self.troubles = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._server.upstream = urlsplit(endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more requests are taken."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: S3Proxy
    upstream: str

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *args: object) -> None:
        """Nothing is logged."""

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        trouble = self.server.proxy.plan(self.command, self.path)
        self.server.proxy.troubles += trouble != NOTHING
        time.sleep(trouble.delay_s)
        if trouble.status:
            self._answer_status(trouble.status)
        elif trouble.loses:
            self._hang_up()
        else:
            self._pass_on(body, trouble)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _relay  # noqa: N815 - http.server's names

    def _answer_status(self, status: int) -> None:
        code = "SlowDown" if status == 503 else "InternalError"
        text = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _pass_on(self, body: bytes, trouble: Trouble) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            if trouble.forgets:
                answer.read()
                self._hang_up()
                return
            self._return(answer, cuts=trouble.cuts)
        finally:
            upstream.close()

    def _return(self, answer: http.client.HTTPResponse, *, cuts: bool) -> None:
        body = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cuts else body)
        if cuts:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_proxy(endpoint: str) -> Iterator[S3Proxy]:
    """A proxy within the block."""
    proxy = S3Proxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
