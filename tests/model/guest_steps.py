"""What guests do in a play, and their directories."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.datastore_harness import BLOCK, CHUNK, Killed
from tests.model.contents import Contents, Write
from tests.model.guest import Handle
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

if TYPE_CHECKING:
    from tests.model.play import Play

SIZE_MAX = 8 * CHUNK
NAMES_PER_VM = 5


def data(play: Play, size: int) -> bytes:
    """Bytes as guests write them: some random, some zeros, some seen before."""
    chosen, parts = play.chosen, bytearray()
    while len(parts) < size:
        length = chosen.choice((100, BLOCK, CHUNK))
        kind = chosen.randrange(4)
        if kind == 0:
            parts += bytes(length)
        elif kind == 1:
            parts += bytes([chosen.randrange(3)]) * length
        else:
            parts += chosen.randbytes(length)
    return bytes(parts[:size])


def paths(play: Play) -> list[str]:
    """All names that files may have; few, so that they meet."""
    return [f"{vm}/disk{number}" for vm in play.vms for number in range(NAMES_PER_VM)]


def _place(play: Play, size: int, *, beyond: int = 0) -> tuple[int, int]:
    """Offset and length of an access; often at the borders of blocks and chunks."""
    chosen = play.chosen
    unit = chosen.choice((1, 512, BLOCK, CHUNK))
    offset = chosen.randrange(max(1, (size + beyond) // unit)) * unit
    length = chosen.choice((1, 100, BLOCK, 3 * BLOCK, CHUNK, CHUNK + BLOCK + 5))
    if chosen.random() < 0.5:
        length = chosen.randint(1, length)
    return offset, min(length, SIZE_MAX - offset) if offset < SIZE_MAX else 1


# Files


async def read(play: Play) -> None:
    handle = await play.handle()
    if handle is not None:
        content = handle.contents.content
        offset, length = _place(play, len(content), beyond=BLOCK)
        found = await play.guest.read(handle, offset, length)
        play.expect(found == content[offset : offset + length], f"read of {length} at {offset} differs")


async def write(play: Play) -> None:
    handle = await play.handle()
    if handle is not None:
        beyond = 2 * BLOCK if play.chosen.random() < 0.9 else 2 * CHUNK
        offset, length = _place(play, len(handle.contents.content), beyond=beyond)
        await _write(play, handle, offset, data(play, length))


async def write_at(play: Play, handle: Handle, offset: int, length: int) -> None:
    """Write new bytes at a chosen place."""
    await _write(play, handle, offset, data(play, length))


async def _write(play: Play, handle: Handle, offset: int, written: bytes) -> None:
    started_ns = time.time_ns()
    handle.contents.begin_writes([(offset, written)])
    await play.guest.write(handle, offset, written)
    handle.contents.done()
    play.modified(handle.contents, started_ns, handle.disk.fstat())


async def truncate_to(play: Play, handle: Handle, size: int) -> None:
    """Cut or extend an open file."""
    await _truncate(play, handle, handle.contents, size)


async def truncate(play: Play) -> None:
    """By handle, or by path while it is perhaps closed."""
    path = play.disk()
    if path is None:
        return
    contents = play.names.now[path]
    if not contents.is_settled or play.chosen.random() < 0.5:
        handle = await play.handle()
        assert handle is not None
        contents, target = handle.contents, handle
        await _truncate(play, target, contents, _new_size(play, contents))
    else:
        await _truncate(play, path, contents, _new_size(play, contents))


def _new_size(play: Play, contents: Contents) -> int:
    return play.chosen.randrange(len(contents.content) + CHUNK) % SIZE_MAX


async def _truncate(play: Play, target: str | Handle, contents: Contents, size: int) -> None:
    started_ns = time.time_ns()
    contents.begin_truncate(size)
    await play.guest.truncate(target, size)
    contents.done()
    st = (play.rig.backing / target).stat() if isinstance(target, str) else target.disk.fstat()
    play.modified(contents, started_ns, st)


async def cut_and_grow(play: Play) -> None:
    """What was cut off must not come back when the file grows again."""
    handle = await play.handle()
    if handle is None or len(handle.contents.content) < BLOCK:
        return
    size = len(handle.contents.content)
    await _truncate(play, handle, handle.contents, play.chosen.randrange(size))
    await _truncate(play, handle, handle.contents, size)
    found = await play.guest.read(handle, 0, size)
    play.expect(found == handle.contents.content, "what was cut off has come back")


async def grow_at_the_end(play: Play) -> None:
    """Into the last block, behind what was archived of it; nothing of that is durable when the power goes."""
    for path in play.disks():
        contents = play.names.now[path]
        size = len(contents.content)
        if play.is_placeholder(contents) and size % BLOCK:
            handle = await play.open(path)
            size = len(contents.content)
            written = data(play, BLOCK + play.chosen.randrange(BLOCK))
            await _write(play, handle, size // BLOCK * BLOCK, written)
            play.ends_soon = play.chosen.random() < 0.7
            return


async def sync(play: Play) -> None:
    handle = await play.handle()
    if handle is not None:
        await play.guest.sync(handle, data_only=play.chosen.random() < 0.5)
        play.synced(handle.contents)


async def failing_sync(play: Play) -> None:
    """The kernel tells of a failed sync once; whoever is told later that all is well must not be deceived."""
    handle = await play.handle()
    if handle is None or not handle.contents.content:
        return
    offset, length = _place(play, len(handle.contents.content))
    await _write(play, handle, offset, data(play, length))
    play.life.fail_sync_in = 1
    try:
        await play.guest.sync(handle, data_only=True)
    except (VmfsStubError, OSError):
        play.note_failed_sync()
    play.life.fail_sync_in = 0
    play.ends_soon = True
    await play.guest.sync(handle, data_only=True)
    play.synced(handle.contents)


async def close(play: Play) -> None:
    if play.guest.handles:
        await play.guest.close(play.chosen.choice(play.guest.handles))


async def set_times(play: Play) -> None:
    path = play.disk()
    if path is not None:
        contents = play.names.now[path]
        time_ns = play.chosen.choice((1, 10**18, 1_700_000_000_123_456_789))
        handle = next((handle for handle in play.guest.handles if handle.contents is contents), None)
        contents.mtime_ns = None
        await play.guest.set_mtime(path if handle is None else handle, time_ns)
        contents.mtime_ns = time_ns if contents.is_settled else None


async def storm(play: Play) -> None:
    """Writers that share blocks, and readers, and perhaps a hydration, at the same time."""
    handle = await play.handle()
    if handle is None or len(handle.contents.content) < 16:
        return
    contents, chosen = handle.contents, play.chosen
    size, before = len(contents.content), bytes(contents.content)
    cuts = sorted(chosen.sample(range(size), k=min(size, chosen.randint(4, 9))))
    spans = [(start, min(end - start, CHUNK)) for start, end in itertools.pairwise(cuts)]
    writes: list[Write] = [(start, data(play, length)) for start, length in spans[::2]]
    started_ns = time.time_ns()
    names = play.names.paths_of(contents)
    contents.begin_writes(writes)
    async with trio.open_nursery() as nursery:
        if names and chosen.random() < 0.4:
            nursery.start_soon(play.services.bring_back, names[0])
        for start, written in writes:
            nursery.start_soon(play.guest.write, handle, start, written)
        for start, length in spans[1::2]:
            nursery.start_soon(_stable_read, play, handle, start, before[start : start + length])
        if chosen.random() < 0.3:
            nursery.start_soon(play.services.disks.sync_dirty)
    contents.done()
    play.modified(contents, started_ns, handle.disk.fstat())


async def storm_and_kill(play: Play) -> None:
    """A kill among writes: what its threads were at may still happen."""
    play.life.kill_in_writes = play.chosen.randint(1, 6)
    await storm(play)


async def _stable_read(play: Play, handle: Handle, start: int, wanted: bytes) -> None:
    play.expect(await play.guest.read(handle, start, len(wanted)) == wanted, "a read beside writes differs")


async def crossed_syncs(play: Play) -> None:
    """A sync that begins, and then a write and a sync of its own, which must not be served by the first."""
    handle = await play.handle()
    if handle is None:
        return
    offset, length = _place(play, len(handle.contents.content))
    play.life.instead["sync.data"] = _slowly
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(play.guest.sync, handle, data_only=True))
            await trio.testing.wait_all_tasks_blocked()
            await _write(play, handle, offset, data(play, length))
            await play.guest.sync(handle, data_only=True)
            play.synced(handle.contents)
    finally:
        del play.life.instead["sync.data"]
    play.ends_soon = play.chosen.random() < 0.5


def _slowly(function: Callable[[int], None], fd: int) -> None:
    time.sleep(0.003)


# Names


async def create(play: Play) -> None:
    free = [path for path in paths(play) if path not in play.names.now]
    if free:
        path, contents = play.chosen.choice(free), Contents(bytearray())
        with play.names.changing({path: contents}):
            handle = await play.guest.create(path, contents)
            st = handle.disk.fstat()
            contents.key = play.key_of(handle)
        contents.mtime_ns = st.st_mtime_ns
        if play.chosen.random() < 0.7:
            await _write(play, handle, 0, data(play, play.chosen.randint(1, 2 * CHUNK)))


async def unlink(play: Play) -> None:
    """Perhaps while it is open; also of a copy that somebody made behind the daemon."""
    if len(play.disks()) < 2 and not any(contents.is_copy for contents in play.names.now.values()):
        return
    path = play.chosen.choice(sorted(play.names.now))
    if play.chosen.random() < 0.3 and not play.names.now[path].is_copy:
        await play.open(path)
    with play.names.changing({path: None}):
        await play.guest.unlink(path)


async def unlink_cut_short(play: Play) -> None:
    """The end comes when a placeholder's removal has been noted and not been made."""
    path = next((path for path in play.disks() if play.is_placeholder(play.names.now[path])), None)
    if path is not None:
        play.life.fail("mount.unlink", 1, Killed())
        with play.names.changing({path: None}):
            await play.guest.unlink(path)


async def unlink_all_names(play: Play) -> None:
    """Names of one file that go at the same time."""
    placeholders = [path for path in play.disks() if play.is_placeholder(play.names.now[path])]
    if not placeholders or len(play.disks()) < 2:
        return
    path = play.chosen.choice(placeholders)
    names = play.names.paths_of(play.names.now[path])
    free = [other for other in paths(play) if other not in play.names.now]
    if len(names) < 2 and free:
        with play.names.changing({free[0]: play.names.now[path]}):
            await play.guest.link(path, free[0])
        names.append(free[0])
    if len(names) == len(play.disks()):
        return

    async def remove(name: str) -> None:
        with play.names.changing({name: None}):
            await play.guest.unlink(name)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(remove, name)


async def rename(play: Play) -> None:
    """To a free name, over another file, or in exchange."""
    old, new = play.disk(), play.chosen.choice(paths(play))
    if old is None or old == new:
        return
    source, target = play.names.now[old], play.names.now.get(new)
    if target is None:
        flags = play.chosen.choice((0, RENAME_NOREPLACE))
    else:
        flags = 0 if len(play.disks()) > 2 and play.chosen.random() < 0.5 else RENAME_EXCHANGE
    if source is target and flags == 0:
        await play.guest.rename(old, new)  # which does nothing
        return
    with play.names.changing({old: target if flags == RENAME_EXCHANGE else None, new: source}):
        await play.guest.rename(old, new, flags=flags)


async def link(play: Play) -> None:
    path = play.disk()
    free = [other for other in paths(play) if other not in play.names.now]
    if path is not None and free:
        new = play.chosen.choice(free)
        with play.names.changing({new: play.names.now[path]}):
            await play.guest.link(path, new)


async def sync_directory(play: Play) -> None:
    vm = play.chosen.choice(play.vms)
    await play.guest.sync_directory(vm)
    play.names.synced(vm)


STEPS: tuple[tuple[int, Callable[[Play], Awaitable[None]]], ...] = (
    (18, read),
    (20, write),
    (5, truncate),
    (2, cut_and_grow),
    (1, grow_at_the_end),
    (7, sync),
    (1, failing_sync),
    (7, close),
    (3, set_times),
    (5, storm),
    (2, storm_and_kill),
    (3, crossed_syncs),
    (4, create),
    (5, unlink),
    (1, unlink_cut_short),
    (3, unlink_all_names),
    (6, rename),
    (3, link),
    (4, sync_directory),
)
