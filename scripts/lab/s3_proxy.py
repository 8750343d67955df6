"""A proxy before an S3 server that delays, refuses, cuts, forgets and lists late, as networks and busy servers do.

Requests go on byte for byte, with the signature that the client made, so the server answers as it would without it.
What happened to requests is counted where it happens: a plan that had no effect proves nothing.  Run as a program
(`delaying_proxy`) it is a process of its own that only delays, for measurements.
"""

from __future__ import annotations

import http.client
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

from scripts.lab.failure import LabError
from scripts.lab.s3_listings import LateListings

_NOT_PASSED_ON: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to one request: after ``delay_s`` it is answered with ``status``, or lost, or its answer is.

    ``loses``: the connection ends before the server has the request; ``forgets``: after the server has done it, without
    an answer; ``cuts``: in the middle of the answer's body.  ``holds_s`` delays what comes after the server has done
    it.  ``lists_late``: a listing does not know of the last changes yet.
    """

    delay_s: float = 0.0
    status: int = 0
    loses: bool = False
    forgets: bool = False
    cuts: bool = False
    holds_s: float = 0.0
    lists_late: bool = False


NOTHING: Final = Trouble()
Plan = Callable[[str, str], Trouble]
"""From method and path (with its query) to what happens."""


class S3Proxy:
    """The proxy; ``plan`` may be replaced at any time.

    Attributes: ``happened`` counts what requests met, by kind; ``listings`` what a listing may leave out.
    """

    def __init__(self, endpoint: str, *, lag_s: float = 0.0) -> None:
        self.plan: Plan = lambda method, path: NOTHING
        self.happened: Counter[str] = Counter()
        self.listings = LateListings(lag_s)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._server.upstream = urlsplit(endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def troubles(self) -> int:
        """How often anything happened."""
        return self.happened.total()

    def note(self, what: str) -> None:
        """This happened to a request."""
        with self._lock:
            self.happened[what] += 1

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
        self._wait(trouble.delay_s)
        if trouble.status:
            self._note(f"answered {trouble.status}")
            self._answer_status(trouble.status)
        elif trouble.loses:
            self._note("lost")
            self._hang_up()
        else:
            self._pass_on(body, trouble)

    def _wait(self, seconds: float) -> None:
        if not seconds:
            return
        time.sleep(seconds)
        self._note("given up" if self._is_client_gone() else "delayed")

    def _is_client_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        with suppress(OSError):
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def _note(self, what: str) -> None:
        self.server.proxy.note(what)

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
            data = answer.read()
        finally:
            upstream.close()
        listings, is_done = self.server.proxy.listings, 200 <= answer.status < 300
        if is_done:
            listings.note(self.command, self.path, body, data, is_new=self.headers.get("If-None-Match") == "*")
            if trouble.lists_late and (late := listings.late(self.path, data)) is not None:
                self._note("listed late")
                data = late
        self._wait(trouble.holds_s)
        if trouble.forgets:
            self._note(f"forgotten {self.command}" if is_done else "forgotten refusal")
            self._hang_up()
        else:
            self._return(answer, data, cuts=trouble.cuts and is_done and len(data) > 1)

    def _return(self, answer: http.client.HTTPResponse, body: bytes, *, cuts: bool) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _NOT_PASSED_ON:
                self.send_header(name, value)
        # That of a HEAD is of the body which a GET would have.
        size = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", size or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cuts else body)
        if cuts:
            self._note("cut")
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_proxy(endpoint: str, *, lag_s: float = 0.0) -> Iterator[S3Proxy]:
    """A proxy within the block; a listing that comes late is as it may have been up to ``lag_s`` ago."""
    proxy = S3Proxy(endpoint, lag_s=lag_s)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def delaying_proxy(endpoint: str, *, delay_s: float) -> Iterator[str]:
    """A process within the block that passes each request on ``delay_s`` after it came; its endpoint."""
    command = [sys.executable, "-m", "scripts.lab.s3_proxy", endpoint, str(delay_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not (answer := process.stdout.readline().strip()):
                raise LabError("the delaying proxy did not start")
            yield answer
        finally:
            process.kill()


if __name__ == "__main__":
    with s3_proxy(sys.argv[1]) as running:
        delays = Trouble(delay_s=float(sys.argv[2]))
        running.plan = lambda method, path: delays
        print(running.endpoint, flush=True)
        sys.stdin.read()  # until whoever wanted it is gone
