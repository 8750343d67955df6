"""Messages over a socket between two processes of this program: a length, the conversation's number, a pickle.

Both ends are ours and run as the same user, so that pickle is no more than a way to write a dataclass down.  A file's
descriptor may come along with a message.  Sending never waits: whoever sends bounds what is on its way by what is
answered.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import struct
from array import array
from collections import deque
from contextlib import suppress

import trio

from vmfs_stub.mover.messages import Message

_HEADER = struct.Struct("<IIB")
"""Bytes of the pickle, number of the conversation, whether a descriptor comes along."""
MESSAGE_BYTES_MAX = 64 << 20
"""A batch of files with the largest attributes that a filesystem takes is smaller."""
_READ_BYTES = 256 << 10
_DESCRIPTOR = socket.CMSG_SPACE(array("i").itemsize)


class ChannelClosed(Exception):
    """The other end has gone, or says what nobody understands."""


class Channel:
    """One end.  `run_sender` must be running for anything to be sent."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._to_send, self._sending = trio.open_memory_channel[tuple[bytes, int | None]](math.inf)
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._is_closed = False

    def post(self, number: int, message: Message, *, fd: int | None = None) -> None:
        """Send a message soon, with a copy of ``fd`` if given.  Never waits; what cannot be sent is lost.

        Raises OSError when there are no descriptors left for the copy.
        """
        if self._is_closed:
            return
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        if len(data) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(data)} bytes")
        header = _HEADER.pack(len(data), number, fd is not None)
        self._to_send.send_nowait((header + data, None if fd is None else os.dup(fd)))

    async def run_sender(self) -> None:
        """Send what is posted, until the other end has gone or this is cancelled."""
        with suppress(OSError):
            async for data, fd in self._sending:
                await self._send(memoryview(data), fd)

    async def _send(self, data: memoryview, fd: int | None) -> None:
        try:
            if fd is not None:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
                data = data[await self._socket.sendmsg([data], ancillary) :]
            while data:
                data = data[await self._socket.send(data) :]
        finally:
            if fd is not None:
                os.close(fd)

    async def receive(self) -> tuple[int, Message, int | None]:
        """The next message: its conversation, itself, and the descriptor that came along, which is the caller's.

        Raises ChannelClosed.
        """
        length, number, has_descriptor = _HEADER.unpack(await self._take(_HEADER.size))
        if length > MESSAGE_BYTES_MAX:
            raise ChannelClosed(f"a message of {length} bytes")
        try:
            message: Message = pickle.loads(await self._take(length))
        except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, TypeError) as exc:
            raise ChannelClosed(f"a message that cannot be read: {exc}") from exc
        if has_descriptor and not self._descriptors:
            raise ChannelClosed("a message without its descriptor")
        return number, message, self._descriptors.popleft() if has_descriptor else None

    async def _take(self, count: int) -> bytes:
        while len(self._received) < count:
            try:
                data, ancillary, _, _ = await self._socket.recvmsg(_READ_BYTES, _DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
            except OSError as exc:
                raise ChannelClosed(str(exc)) from exc
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array("i")
                    found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
                    self._descriptors.extend(found)
            if not data:
                raise ChannelClosed("the other end has gone")
            self._received += data
        taken = bytes(memoryview(self._received)[:count])
        del self._received[:count]
        return taken

    def close(self) -> None:
        """Close the socket, and descriptors that came and were not taken, or were to be sent.

        None may stay: a file that is open somewhere cannot be archived.
        """
        self._is_closed = True
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        with suppress(trio.WouldBlock):
            while True:
                _, fd = self._sending.receive_nowait()
                if fd is not None:
                    os.close(fd)
