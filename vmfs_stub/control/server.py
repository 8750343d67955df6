"""Serves the control API on a unix socket, with each caller's credentials from the kernel.

hypercorn's worker hides the connection from the application, so connections are accepted here and given one by one
to hypercorn's per-connection server, behind a wrapper that puts the Peer into the request's scope
(docs/adr/control-socket.md).  The socket is 0600, and a caller that is neither root nor the daemon's own user is
refused all the same.  Must not know what the API does.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from vmfs_stub.control.api import PEER_KEY, ControlApi
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.peer import peer_of
from vmfs_stub.control.target import ControlTarget
from vmfs_stub.core.errors import AlreadyExists, ConfigError, DatastoreLocked, PrimaryIOError

_BACKLOG = 64
_GOODBYE_S = 3.0
"""How long requests in progress may go on after the server was told to stop: the reply to `unmount` is one."""

log = logging.getLogger(__name__)


class _OrderedStream(trio.abc.HalfCloseableStream):
    """Sends one thing after the other: hypercorn may end a connection while a reply is still going out.

    Attributes: ``socket`` is what hypercorn asks for addresses.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._turn = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As of a SocketStream."""
        async with self._turn:
            await self._stream.send_all(data)

    async def send_eof(self) -> None:
        """As of a SocketStream."""
        async with self._turn:
            await self._stream.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        """As of a SocketStream."""
        async with self._turn:
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As of a SocketStream."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """As of a SocketStream."""
        await self._stream.aclose()


class _Http1Server(TCPServer):
    """Speaks HTTP/1.1 alone: hypercorn would go over to HTTP/2 when asked to, and then keep whoever says nothing."""

    async def _read_data(self) -> None:
        async def go_on(request: object) -> None:
            """In place of looking whether the client asks for another protocol."""

        self.protocol.protocol._check_protocol = go_on  # type: ignore[union-attr, method-assign]
        await super()._read_data()


class ControlServer:
    """Accepts connections up to a limit and serves the application on each."""

    def __init__(
        self, target: ControlTarget, metrics: Metrics, *, backing: Path, connections_max: int, idle_s: float
    ) -> None:
        self._app: Any = ControlApi(target, metrics, backing=backing).application()
        self._connections_max = connections_max
        self._connection_count = 0
        self._context = WorkerContext(None)
        self._config = HypercornConfig()
        self._config.alpn_protocols = ["http/1.1"]
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger(f"{__name__}.http")
        self._config.keep_alive_timeout = idle_s  # also how long a connection lingers whose client left unheard

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends; never raises but for cancellation."""
        if self._connection_count >= self._connections_max:
            log.warning("more than %d connections to the control socket: one was closed", self._connections_max)
            await stream.aclose()
            return
        self._connection_count += 1
        try:
            await self._serve(stream)
        except Exception:  # a broken connection must not end the daemon
            log.exception("a connection to the control socket failed")
        finally:
            self._connection_count -= 1
            with suppress(trio.BrokenResourceError):
                await trio.aclose_forcefully(stream)

    async def stop(self) -> None:
        """Let idle connections end."""
        await self._context.terminated.set()

    async def _serve(self, stream: trio.SocketStream) -> None:
        raw = stream.socket
        peer = peer_of(raw)
        if peer.uid not in (0, os.geteuid()):
            log.warning("uid %d (pid %d) was refused at the control socket", peer.uid, peer.pid)
            return

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self._app({**scope, PEER_KEY: peer}, receive, send)

        state = ConnectionState({})
        ordered = _OrderedStream(stream)
        await _Http1Server(ASGIWrapper(app), self._config, self._context, state, ordered)  # type: ignore[arg-type]


@asynccontextmanager
async def open_control(
    target: ControlTarget,
    metrics: Metrics,
    *,
    backing: Path,
    socket_path: Path,
    connections_max: int = 64,
    idle_s: float = 5.0,
) -> AsyncIterator[None]:
    """Serve ``target``, the datastore of ``backing``, on ``socket_path`` while inside; call it with its lock held.

    ``idle_s`` is how long a connection may say nothing.  Leaving it without cancellation lets requests in progress
    finish for a few seconds, so that the reply to `unmount` still goes out.  Raises ConfigError, AlreadyExists,
    DatastoreLocked, PrimaryIOError.
    """
    server = ControlServer(target, metrics, backing=backing, connections_max=connections_max, idle_s=idle_s)
    sock, inode = _listen(socket_path)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    try:
        async with trio.open_nursery() as connections, trio.open_nursery() as accepting:
            accepting.start_soon(partial(trio.serve_listeners, server.handle, [listener], handler_nursery=connections))
            try:
                yield
            finally:
                connections.cancel_scope.deadline = trio.current_time() + _GOODBYE_S
                accepting.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await server.stop()
    finally:
        listener.socket.close()
        _remove(socket_path, inode)


def _remove(path: Path, inode: int) -> None:
    with suppress(FileNotFoundError):
        if path.lstat().st_ino == inode:  # a successor may have its own there already
            path.unlink()


def _listen(path: Path) -> tuple[socket.socket, int]:
    """A listening socket at ``path``, and its inode; it has its mode of 0600 before anyone can connect."""
    _clear(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        sock.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        sock.listen(_BACKLOG)
        temporary.rename(path)
        inode = path.lstat().st_ino
    except OSError as exc:
        sock.close()
        with suppress(OSError):
            temporary.unlink()
        if exc.errno is None:  # Python's own check of the length
            raise ConfigError(
                f"the control socket's path is too long for a unix socket ({path}): set control.socket to a path of "
                "fewer than 90 bytes"
            ) from exc
        raise PrimaryIOError(f"cannot listen on the control socket {path}: {exc.strerror}") from exc
    return sock, inode


def _clear(path: Path) -> None:
    """Refuse to replace anything but the socket of a daemon that is gone."""
    try:
        st = path.lstat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise PrimaryIOError(f"cannot look at the control socket {path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(st.st_mode):
        raise AlreadyExists(f"{path} is no socket: move it away, or set control.socket to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except OSError as exc:
            if exc.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
            raise PrimaryIOError(f"cannot tell whether a daemon listens on {path}: {exc}") from exc
    raise DatastoreLocked(
        f"another daemon answers on {path}: stop it first, or give this datastore another datastore.runtime_dir"
    )
