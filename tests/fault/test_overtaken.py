"""A fetch of the background that hangs, or comes late, beside the guest that has its chunks fetched a second time."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from vmfs_stub.core.errors import StoreDenied, StoreError, StoreUnavailable
from vmfs_stub.services import recall as recall_service
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.recall import RecallService

DISK = "vm/disk.img"
CONTENT = random.Random(4).randbytes(4 * CHUNK)


class Store:
    """Reads of the store, by number from 1, that wait until they are let go, and then may fail."""

    def __init__(self) -> None:
        self.fetches = 0
        self.gates: dict[int, threading.Event] = {}
        self.errors: dict[int, StoreError] = {}

    def hang(self, number: int, error: StoreError | None = None) -> threading.Event:
        self.gates[number] = threading.Event()
        if error is not None:
            self.errors[number] = error
        return self.gates[number]

    def before(self, call: str, key: str) -> None:
        if call == "get_range":
            self.fetches += 1
            number = self.fetches
            assert number not in self.gates or self.gates[number].wait(10)
            if number in self.errors:
                raise self.errors[number]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(recall_service, "MOVER_PATIENCE_S", 0.2)
    yield 0.2


@contextmanager
def archived() -> Iterator[Rig]:
    with temporary_rig() as rig:
        rig.make_disk(DISK, CONTENT)
        yield rig


@asynccontextmanager
async def background(
    rig: Rig, store: Store, chunks: list[int]
) -> AsyncIterator[tuple[Services, Disk, RecallService, trio.Nursery]]:
    """These chunks of the disk are under way in the background; all is over at the end of the block."""
    async with rig.running() as services:
        await services.archive("vm")
        disk, recall = await services.open(DISK), services.connected.recall
        placeholder = disk.placeholder
        assert placeholder is not None
        rig.objects.before = store.before
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(recall.recall_chunks, placeholder, chunks, demand=False))
            await until(lambda: store.fetches > 0)
            yield services, disk, recall, nursery
        await until(lambda: not recall._flights)
        if disk.open_count:
            await services.disks.release(disk)


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not is_so():  # noqa: ASYNC110 - nobody is told
            await trio.sleep(0.01)


async def _read(disk: Disk, chunk: int, found: list[float]) -> None:
    started_s = trio.current_time()
    assert await disk.read(chunk * CHUNK, BLOCK) == CONTENT[chunk * CHUNK : chunk * CHUNK + BLOCK]
    found.append(trio.current_time() - started_s)


async def test_a_guest_overtakes_it_and_what_comes_late_fills_nothing() -> None:
    store = Store()
    first = store.hang(1)
    with archived() as rig:
        async with background(rig, store, [1]) as (_, disk, recall, _):
            assert await disk.read(CHUNK, BLOCK) == CONTENT[CHUNK : CHUNK + BLOCK]
            await disk.write(CHUNK + BLOCK, b"g" * BLOCK)
            assert store.fetches == 2
            first.set()
            await until(lambda: recall.counters.background_bytes > 0)
            found = await disk.read(CHUNK, CHUNK)
            assert found == CONTENT[CHUNK : CHUNK + BLOCK] + b"g" * BLOCK + CONTENT[CHUNK + 2 * BLOCK : 2 * CHUNK]


@pytest.mark.parametrize("error", [None, StoreDenied("denied")])
async def test_a_guest_has_what_comes_late_when_its_own_fetch_hangs_or_fails(error: StoreError | None) -> None:
    store, took = Store(), list[float]()
    first, second = store.hang(1), store.hang(2, error)
    with archived() as rig:
        async with background(rig, store, [1]) as (services, disk, _, nursery):
            nursery.start_soon(_read, disk, 1, took)
            await until(lambda: store.fetches == 2)
            if error is not None:
                second.set()
            first.set()
            await until(lambda: len(took) == 1)
            second.set()
        assert services.findings.all() == []


async def test_a_guest_that_joins_later_has_what_the_other_fetch_brings(patience: float) -> None:
    store, took = Store(), list[float]()
    first = store.hang(1)
    with archived() as rig:
        async with background(rig, store, [1]) as (_, disk, _, nursery):
            nursery.start_soon(_read, disk, 1, took)
            await trio.sleep(patience * 0.7)
            nursery.start_soon(_read, disk, 1, took)
            await until(lambda: len(took) == 2)
            assert store.fetches == 2
            first.set()


async def test_it_is_waited_for_once_not_in_each_read(patience: float) -> None:
    store, took = Store(), list[float]()
    first = store.hang(1)
    with archived() as rig:
        async with background(rig, store, [0, 1, 2, 3]) as (_, disk, recall, _):
            for chunk in range(4):
                await _read(disk, chunk, took)
            assert took[0] >= patience > sum(took[1:])
            first.set()
            await until(lambda: not recall._is_mover_late)


async def test_its_late_failure_is_no_finding() -> None:
    store = Store()
    first = store.hang(1, StoreUnavailable("away"))
    with archived() as rig:
        async with background(rig, store, [1]) as (services, disk, recall, _):
            await disk.read(0, 4 * CHUNK)
            await services.disks.release(disk)
            assert not rig.is_placeholder(DISK)
            first.set()
        assert (services.findings.all(), recall.counters.failures) == ([], 0)
