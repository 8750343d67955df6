"""The mover's process: ``python -m vmfs_stub.mover.main SOCKET MEMORY PARENT``, started by the daemon only.

What it does is for no guest that waits: it has what the disk has left, and what the daemon gives it of the processor.
It ends with the daemon, at once, whatever its threads are in.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

import trio

from vmfs_stub.core.errors import PrimaryError
from vmfs_stub.mover.channel import Channel
from vmfs_stub.mover.messages import IndexState, MoverSettings, Started
from vmfs_stub.mover.server import Server
from vmfs_stub.mover.shared_slots import SharedSlots
from vmfs_stub.paced_io import pace
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services import memory
from vmfs_stub.services.copying import batches_at_once
from vmfs_stub.services.local_mover import LocalMover
from vmfs_stub.services.mover import FETCHES_AT_ONCE
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.worker_pool import stand_back
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.clients import StoreClients
from vmfs_stub.store.fallback import ReplicatedStore
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.replica import Replication
from vmfs_stub.store.store import Store

_PR_SET_PDEATHSIG = 1
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s [mover]: %(message)s"


async def serve(sock: socket.socket, memory_fd: int) -> None:
    """Do what the daemon at the other end of ``sock`` asks for, until it closes it."""
    channel = Channel(trio.socket.from_stdlib_socket(sock))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run_sender)
        _, settings, _ = await channel.receive()
        assert isinstance(settings, MoverSettings)
        threads = _threads(settings)
        clients = StoreClients(settings.store, settings.replica)
        store = Store(clients.store, settings.store_description, settings.store_key)
        files = FileCalls()
        index = await threads.files(_open_index, settings, files, channel, trio.lowlevel.current_trio_token())
        channel.post(0, Started())
        replicated = ReplicatedStore.at(store, settings.replica, objects=clients.replica)
        mover = LocalMover(
            files=files,
            threads=threads,
            store=store,
            chunk_index=index,
            workers=settings.workers,
            reading=replicated,
            begin_replication=None if replicated is None else await threads.files(_runs, settings, replicated),
        )
        slots = SharedSlots(memory_fd, count=FETCHES_AT_ONCE, size=settings.slot_bytes)
        await Server(channel, mover, slots, clients).run()
        nursery.cancel_scope.cancel()


def _runs(settings: MoverSettings, store: ReplicatedStore) -> Callable[[], Replication]:
    """Makes runs, which share what is known to be read back."""
    assert settings.replica is not None
    return partial(
        Replication, store.plain, store.replica, ReadBack(settings.read_back_path, store.id, settings.replica.url)
    )


def _threads(settings: MoverSettings) -> Threads:
    return Threads(
        files_max=settings.files_threads,
        store_max=settings.store_threads,
        compute_max=batches_at_once(settings.workers, beside_guests=False),
        store_timeout_s=settings.store.timeout_s,
        transfer_timeout_s=settings.store.transfer_timeout_s,
    )


def _open_index(
    settings: MoverSettings, files: FileCalls, channel: Channel, token: trio.lowlevel.TrioToken
) -> ChunkIndex:
    def tell(error: PrimaryError | None = None) -> None:
        token.run_sync_soon(channel.post, 0, IndexState(error))

    store_id = settings.store_description.store_id
    return ChunkIndex(settings.index_path, store_id, files=files, on_lost=tell, on_regained=tell)


def main() -> None:
    """Run the process; never returns."""
    sock_fd, memory_fd, parent = map(int, sys.argv[1:])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be asked to take this one with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the daemon
    stand_back()
    pace.takes_turns = True
    memory.limit_arenas()
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    try:
        trio.run(serve, socket.socket(fileno=sock_fd), memory_fd)
    except BaseException:
        logging.getLogger(__name__).exception("the data mover ends")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
