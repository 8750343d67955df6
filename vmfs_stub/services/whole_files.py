"""Filling files with all the bytes that a restore point has of them.

Every byte was verified by the store; zeros stay holes.  Blocking code with a few threads.  This module must not know
where the files lie, or what they are called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.primary.files import write_fully
from vmfs_stub.store.chunk_table import ChunkTable, RestorePoint
from vmfs_stub.store.store import Store

RUN_BYTES: Final = 4 * 1024 * 1024
"""Raw bytes per task: large reads of the store, little memory (each worker holds one run)."""
LOCATE_CHUNKS: Final = 4096

Progress = Callable[[int], None]

P = ParamSpec("P")
T = TypeVar("T")


class Ask(Protocol):
    """Makes a call on the store, from any thread, and waits as long as whoever gave it allows."""

    def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def _ask(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    return function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring chunks of a file that lie one after another in one pack; ``offset`` in the file, bytes."""

    offset: int
    refs: list[FrameRef]


class WholeFiles:
    """Fills files of one restore point; ``written_bytes`` counts what was written so far, zeros left out.

    ``progress`` is called with the number of logical bytes just done, from several threads, one call at a time.
    """

    def __init__(
        self,
        store: Store,
        point: RestorePoint,
        *,
        files: FileCalls,
        workers: int,
        progress: Progress | None,
        ask: Ask = _ask,
    ) -> None:
        self._store = store
        self._point = point
        self._files = files
        self._workers = workers
        self._ask = ask
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="restore")
        self.written_bytes = 0

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown()

    def fill(self, fd: int, index: int) -> None:
        """Give the empty file ``fd`` size and bytes of file number ``index``; not synced.

        Raises: OSError; ObjectMissing and the integrity errors; StoreUnavailable.
        """
        table = self._point.chunks(index)
        self._files.call("restore.size", os.ftruncate, fd, table.size)
        running: set[Future[None]] = set()
        try:
            for run in self._runs(table):
                running.add(self._executor.submit(self._write_run, fd, run))
                if len(running) >= 2 * self._workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    _raise_first(done)
            done, running = wait(running)
            _raise_first(done)
        finally:
            for future in running:
                future.cancel()
            wait(running)  # nobody may write to a descriptor that is about to be closed

    def _runs(self, table: ChunkTable) -> Iterator[_Run]:
        """Neighbouring stored chunks of one pack, up to RUN_BYTES; zeros are counted as progress and left out."""
        run: _Run | None = None
        limit = max(1, RUN_BYTES // table.chunk_size)
        for first in range(0, table.chunk_count, LOCATE_CHUNKS):
            end = min(first + LOCATE_CHUNKS, table.chunk_count)
            zeros = 0
            for index, ref in enumerate(self._ask(table.locate, first, end), first):
                if ref is None:
                    zeros += min(table.chunk_size, table.size - index * table.chunk_size)
                elif run is not None and _continues(run, ref, index, table.chunk_size, limit):
                    run.refs.append(ref)
                    continue
                if run is not None:
                    yield run
                run = None if ref is None else _Run(index * table.chunk_size, [ref])
            self._advance(zeros)
        if run is not None:
            yield run

    def _write_run(self, fd: int, run: _Run) -> None:
        chunks = self._ask(self._store.fetch, run.refs)
        total = sum(map(len, chunks))
        self._files.call("restore.write", _write_all, fd, chunks, run.offset, total)
        self._advance(total, written=total)

    def _advance(self, count: int, *, written: int = 0) -> None:
        with self._progress_lock:
            self.written_bytes += written
            if self._progress is not None and count:
                self._progress(count)


def _continues(run: _Run, ref: FrameRef, index: int, chunk_size: int, limit: int) -> bool:
    last = run.refs[-1]
    return (
        len(run.refs) < limit
        and ref.pack_id == last.pack_id
        and ref.offset == last.end
        and run.offset + len(run.refs) * chunk_size == index * chunk_size
    )


def _write_all(fd: int, chunks: Sequence[bytes], offset: int, total: int) -> None:
    written = os.pwritev(fd, chunks, offset)
    if written < total:  # a signal, or the file system is nearly full
        write_fully(fd, memoryview(b"".join(chunks))[written:], offset + written)


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()
