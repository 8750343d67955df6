"""The mover's end: does what the daemon asks for, with a mover of its own process.

Each conversation is a task, so that one that waits for the store holds up no other; how many there can be, and how
much each has in memory, the daemon bounds by what it asks for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

import trio

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.mover.channel import Channel, ChannelClosed
from vmfs_stub.mover.messages import (
    AllParts,
    Aside,
    BeginBackup,
    BeginCopying,
    Cancel,
    Commit,
    Committed,
    Copied,
    Copy,
    Ended,
    Failed,
    Fetch,
    Fetched,
    Files,
    Message,
    NewClients,
    Ping,
    Pong,
    Ready,
    Replicate,
    Replicated,
)
from vmfs_stub.mover.shared_slots import SharedSlots
from vmfs_stub.paced_io import pace
from vmfs_stub.services import memory
from vmfs_stub.services.local_mover import LocalMover
from vmfs_stub.services.mover import Backup, Copying, Part, PointFile
from vmfs_stub.services.single_error import single_error
from vmfs_stub.store.clients import StoreClients

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Task:
    """One conversation."""

    number: int
    send: trio.MemorySendChannel[Message]
    requests: trio.MemoryReceiveChannel[Message]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def copy(self) -> Copy:
        """The order to copy a file, which comes next."""
        request = await self.requests.receive()
        assert isinstance(request, Copy)
        return request

    async def parts(self) -> AsyncIterator[Part]:
        """The parts of a file, as they are told."""
        while isinstance(part := await self.requests.receive(), Part):
            yield part
        assert isinstance(part, AllParts)


class Server:
    """Answers on a channel."""

    def __init__(self, channel: Channel, mover: LocalMover, slots: SharedSlots, clients: StoreClients) -> None:
        self._channel = channel
        self._clients = clients
        self._mover = mover
        self._slots = slots
        self._tasks: dict[int, _Task] = {}
        self._has_worked = False

    async def run(self) -> None:
        """Serve until the daemon closes the channel."""
        async with trio.open_nursery() as nursery:
            with suppress(ChannelClosed):
                while True:
                    number, message, fd = await self._channel.receive()
                    self._hear(nursery, number, message if fd is None else _with_descriptor(message, fd))
            nursery.cancel_scope.cancel()

    def _hear(self, nursery: trio.Nursery, number: int, message: Message) -> None:
        task = self._tasks.get(number)
        if isinstance(message, Ping):
            pace.beside_guests = message.beside_guests
            self._channel.post(number, Pong(self._clients.errors()))
            self._rest()
        elif isinstance(message, NewClients):
            self._clients.prepare(message.store, message.replica).take()
        elif isinstance(message, (BeginBackup, Fetch, Replicate)):
            self._has_worked = True
            task = self._tasks[number] = _Task(number, *trio.open_memory_channel[Message](math.inf))
            nursery.start_soon(self._converse, task, message)
        elif task is None:
            _drop(message)  # it crossed with the end of its conversation
        elif isinstance(message, Cancel):
            task.scope.cancel()
        else:
            task.send.send_nowait(message)

    def _rest(self) -> None:
        """With nothing to do, return the memory that work has left."""
        if self._has_worked and not self._tasks:
            self._has_worked = False
            memory.give_back()

    async def _converse(self, task: _Task, request: BeginBackup | Fetch | Replicate) -> None:
        last: Message = Ended()
        try:
            with task.scope, single_error():
                if isinstance(request, Fetch):
                    last = await self._fetch(request)
                elif isinstance(request, Replicate):
                    last = await self._replicate(task, request)
                else:
                    last = await self._back_up(task)
        except VmfsStubError as exc:
            last = Failed(exc)
        except Exception:
            log.exception("a programming error")
            last = Failed(None)
        finally:
            del self._tasks[task.number]
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    _drop(task.requests.receive_nowait())
        self._channel.post(task.number, last)
        await self._mover.end_leases()

    async def _fetch(self, request: Fetch) -> Fetched:
        # Laid down here, never by a thread that nobody may be waiting for any more: the slot is the next fetch's then.
        async with self._mover.fetch(request.frames) as raws:
            self._slots.write(request.slot, raws)
        return Fetched()

    async def _replicate(self, task: _Task, request: Replicate) -> Replicated:
        def progress(size: int) -> None:
            self._channel.post(task.number, Copied(size))

        await self._mover.replicate(request.vm_id, request.points, progress)
        return Replicated()

    async def _back_up(self, task: _Task) -> Committed:
        async with self._mover.backup() as backup:
            self._channel.post(task.number, Ready())
            begin = await task.requests.receive()
            assert isinstance(begin, BeginCopying)
            await self._copy(task, backup, verify=begin.verify)
            self._channel.post(task.number, Ready())
            files: list[PointFile] = []
            while isinstance(request := await task.requests.receive(), Files):
                files += request.files
            assert isinstance(request, Commit)
            return Committed(await backup.commit(request.order, files))

    async def _copy(self, task: _Task, backup: Backup, *, verify: bool) -> None:
        def progress(size: int) -> None:
            self._channel.post(task.number, Copied(size))

        async with backup.copying(verify=verify) as copying:
            while isinstance(request := await task.requests.receive(), (Aside, Copy)):
                await self._copy_file(task, copying, request, progress)
                self._channel.post(task.number, Ready())

    async def _copy_file(
        self, task: _Task, copying: Copying, request: Aside | Copy, progress: Callable[[int], None]
    ) -> None:
        with ExitStack() as stack:
            stack.callback(os.close, request.fd)
            aside_fd: int | None = None
            if isinstance(request, Aside):
                aside_fd = request.fd
                request = await task.copy()
                stack.callback(os.close, request.fd)
            await copying.copy(request.fd, request.order, task.parts(), progress, aside_fd=aside_fd)


def _with_descriptor(message: Message, fd: int) -> Message:
    if isinstance(message, (Aside, Copy)):
        return replace(message, fd=fd)
    os.close(fd)
    return message


def _drop(message: Message) -> None:
    if isinstance(message, (Aside, Copy)):
        os.close(message.fd)
