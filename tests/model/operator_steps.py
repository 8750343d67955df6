"""What operators, the daemon itself, other hosts and fate do in a play."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import trio

from tests.datastore_harness import BLOCK, CHUNK, DEADLINE_S, Killed
from tests.model import guest_steps
from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import ClaimedElsewhere, IdentityMismatch, RecallError, StoreError, StoreFull
from vmfs_stub.core.ids import DatastoreId, PointId, VmId
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.restore import restore_point
from vmfs_stub.store.claims import ClaimState, put_claim

if TYPE_CHECKING:
    from tests.model.play import Play

TURNING_POINTS = ("archive.record_sync", "graduate.sync", "remove.sync", "replaced.sync", "map.remove")
"""Sites of calls: between what they make durable and what comes before and after, order is everything."""

THEIRS = DatastoreId("0" * 32)
"""Of another host."""

# Operators


async def archive(play: Play) -> None:
    await _job(play, archive=True)


async def back_up(play: Play) -> None:
    await _job(play, archive=False)


async def _job(play: Play, *, archive: bool) -> None:
    vm = play.chosen.choice(play.vms)
    await play.close_all_of(vm)
    inside = {path: contents for path, contents in play.names.now.items() if path.startswith(f"{vm}/")}
    if any(contents.is_copy for contents in inside.values()):
        try:
            await play.services.archive(vm, archive=archive)
        except IdentityMismatch:
            return
        play.expect(False, "a copy of a placeholder was backed up")
    await _take_what_was_left(play, vm)
    report = await play.services.archive(vm, archive=archive)
    play.expect(not report.abandoned, f"abandoned: {report.abandoned}")
    for contents in dict.fromkeys(inside.values()):
        names = play.names.paths_of(contents)
        is_worth_it = bool((play.rig.backing / names[0]).stat().st_size)
        # It may be an ordinary file by now, where nothing of it was to be absent.
        was_made = not set(report.placeholders).isdisjoint(names)
        play.expect(was_made == (archive and is_worth_it), f"placeholders {report.placeholders}, not {names}")
        if archive and is_worth_it and contents.is_settled:
            play.synced(contents)
    await play.check_point(vm, report.point_id, settles=not archive)
    if archive:
        play._check_nothing_left()


async def _take_what_was_left(play: Play, vm: str) -> None:
    """Where no placeholder is left of a VM that another host had, an operator has to say that this is its state now.

    A disk with a name in another VM, too, may have become a placeholder of that one.
    """
    vm_id = play.rig.vm(vm, files=play.life).id
    claim = play.newest_claim(vm_id)
    if claim is None or claim.datastore_id != THEIRS:
        return
    records = [play.record(path) for path in play.disks() if path.startswith(f"{vm}/")]
    left = {record.point_id for record in records if record is not None and record.vm_id == vm_id}
    if claim.point_id not in left:
        await play.services.claims.take(vm_id, PointId("0" * 32), force=True)


async def back_up_in_vain(play: Play) -> None:
    """A backup that fails, and then one that does not: what changed before the first is in the second."""
    vm = play.chosen.choice(play.vms)
    if any(contents.is_copy for path, contents in play.names.now.items() if path.startswith(f"{vm}/")):
        return
    await play.close_all_of(vm)
    await _take_what_was_left(play, vm)
    play.life.fail(f"store.{play.chosen.choice(('pack', 'segment', 'pending', 'manifest'))}.put", 1, StoreFull("full"))
    try:
        await play.services.archive(vm, archive=False)
    except StoreFull:
        pass
    finally:
        play.life.repair()
    if play.chosen.random() < 0.7:
        await back_up(play)


async def back_up_in_use(play: Play) -> None:
    """A VM that a guest has open, and changes after the moment: the restore point is what all was then."""
    vm = play.chosen.choice(play.vms)
    inside = {path: contents for path, contents in play.names.now.items() if path.startswith(f"{vm}/")}
    if not inside or any(contents.is_copy for contents in inside.values()):
        return
    await _take_what_was_left(play, vm)
    handle = await play.open(play.chosen.choice(sorted(inside)))
    then = {path: bytes(contents.content) for path, contents in inside.items() if contents.is_settled}
    changed = play.services.archiver._last_points.changed_in_use

    async def change_and_go_on(disks: Sequence[Disk]) -> list[Changed | None]:
        found = await changed(disks) if play.chosen.random() < 0.5 else None
        for _ in range(play.chosen.randint(0, 4)):
            size = len(handle.contents.content)
            offset = play.chosen.randrange(size + 1)
            if play.chosen.random() < 0.2:
                await guest_steps.truncate_to(play, handle, offset)
            else:
                aligned = offset - offset % BLOCK if play.chosen.random() < 0.6 else offset
                await guest_steps.write_at(play, handle, aligned, play.chosen.choice((1, BLOCK, 2 * BLOCK, CHUNK)))
        return await changed(disks) if found is None else found

    with patch.object(play.services.archiver._last_points, "changed_in_use", change_and_go_on):
        report = await play.services.back_up_in_use(vm)
    play.check_files_of_point(vm, report.point_id, then)


async def archive_amid_recalls(play: Play) -> None:
    """Recalls that began for an opening which is over when the archive begins."""
    handle = await play.handle()
    if handle is None or handle.disk.placeholder is None:
        return
    placeholder = handle.disk.placeholder
    absent = placeholder.absent_chunks(0, len(handle.contents.content))
    play.life.fetch_s = 0.003
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(play.services.recall.recall_chunks, placeholder, absent, demand=False))
            await trio.lowlevel.checkpoint()
            await archive(play)
    finally:
        play.life.fetch_s = 0


async def archive_again(play: Play) -> None:
    """A placeholder of which a guest has written a block: cut short, or with its earlier pin left, or well."""
    path = next((path for path in play.disks() if play.is_placeholder(play.names.now[path])), None)
    if path is None:
        return
    handle = await play.open(path)
    size = len(handle.contents.content)
    if size >= BLOCK:
        # In the first chunk: all of it must come back to be copied, and a part of that may have to stay.
        last = min(size // BLOCK, CHUNK // BLOCK) - 1
        await guest_steps.write_at(play, handle, play.chosen.randint(min(1, last), last) * BLOCK, BLOCK)
    fate = play.chosen.randrange(3)
    if fate == 0:
        play.life.fail(TURNING_POINTS[0], 1, Killed())
        play.ends_soon = True
    elif fate == 1:
        await refuse_to_unpin(play)
    await archive(play)
    if fate == 1:
        await play.services.bring_back(path)
        play.ends_soon = play.chosen.random() < 0.7


async def bring_back(play: Play) -> None:
    path = play.disk()
    if path is not None:
        await play.services.bring_back(path)
        play.expect(not play.rig.is_placeholder(path), "still a placeholder")
        play._check_nothing_left()


async def restore(play: Play) -> None:
    """Any restore point that is there can be restored; what a placeholder stands for is compared elsewhere."""
    points = [key.split("/")[1:] for key in play.rig.objects.contents if key.startswith("manifests/")]
    points = [ids for ids in points if len(ids) == 2 and len(ids[1]) == 32]
    if points:
        vm_id, point_id = play.chosen.choice(points)
        to = play.rig.base / "restored"
        point = play.quiet_store.open_point(VmId(vm_id), PointId(point_id))
        await trio.to_thread.run_sync(restore_point, play.quiet_store, point, to)
        shutil.rmtree(to)


# The daemon


async def sync_all(play: Play) -> None:
    await play.services.disks.sync_dirty()


# Fate


async def outage(play: Play) -> None:
    """The store is away: what is here works, the rest is an error, and then it is back."""
    handle = await play.handle()
    if handle is None:
        return
    await play.end_hydration()
    content, chosen, recall = handle.contents.content, play.chosen, play.services.recall
    offset = chosen.randrange(len(content) + 1)
    play.life.is_store_away, recall.deadline_s = True, 0.02
    try:
        with contextlib.suppress(StoreError, RecallError):
            found = await play.guest.read(handle, offset, 3 * BLOCK)
            play.expect(found == content[offset : offset + 3 * BLOCK], "read without a store differs")
        for flight in list(recall._flights.values()):  # else who joins one later is told that the store is away
            await flight.landed.wait()
        for attempt in list(recall.claims._attempts.values()):
            await attempt.over.wait()
    finally:
        play.life.is_store_away, recall.deadline_s = False, DEADLINE_S
        recall._timed_out_s.clear()


async def prune(play: Play) -> None:
    """Another host removes restore points that no placeholder needs, as it may at any time."""
    play.prune()


async def other_host(play: Play) -> None:
    """Another host takes a VM that is free, and gives it back unchanged: nothing absent is used here meanwhile."""
    free = [path for path in play.disks() if play.is_free(path)]
    if not free or play.is_shaken:
        return
    path = play.chosen.choice(free)
    record = play.record(path)
    claim = None if record is None else play.newest_claim(record.vm_id)
    assert claim is not None
    handle = await play.open(path)
    objects, theirs = play.quiet_store.objects, replace(claim, datastore_id=THEIRS, host="host2")
    put_claim(objects, replace(theirs, epoch=claim.epoch + 1, state=ClaimState.HELD, point_id=None))
    try:
        absent = None if handle.disk.placeholder is None else handle.disk.placeholder.next_absent(0)
        if absent is not None:
            await _refused(play, partial(play.guest.read, handle, absent * CHUNK, CHUNK))
        written = guest_steps.data(play, BLOCK)
        handle.contents.begin_writes([(0, written)])
        await _refused(play, partial(play.guest.write, handle, 0, written))
        handle.contents.not_done()
    finally:
        put_claim(objects, replace(theirs, epoch=claim.epoch + 2))


async def _refused(play: Play, use: Callable[[], Awaitable[object]]) -> None:
    try:
        await use()
    except ClaimedElsewhere:
        return
    play.expect(False, "a VM that another host has was used")


async def write_back(play: Play) -> None:
    play.rig.medium.write_back(play.chosen)


async def commit_journal(play: Play) -> None:
    play.rig.medium.commit()


async def kill_soon(play: Play) -> None:
    """At any call, at one that changes or syncs a file, or at one of the store."""
    counter, count = play.chosen.choice(
        (("kill_in", 60), ("kill_in_writes", 12), ("kill_in_syncs", 12), ("kill_in_store", 12))
    )
    setattr(play.life, counter, play.chosen.randint(1, count))


async def crash_in_job(play: Play) -> None:
    """The power goes when something is to be made durable, often at a turning point."""
    if play.chosen.random() < 0.5:
        play.life.kill_in_syncs = play.chosen.randint(1, 24)
    else:
        play.life.fail(play.chosen.choice(TURNING_POINTS), 1, Killed())
    play.ends_soon = True
    await play.chosen.choice((archive, bring_back))(play)


async def fail_a_record(play: Play) -> None:
    """An archive whose commit point is set and cannot be made durable."""
    play.life.fail("archive.record_sync", 1, OSError(errno.EIO, "planted"))
    play.is_shaken = True
    await archive(play)


async def refuse_to_unpin(play: Play) -> None:
    """The store takes no pins away, for the rest of this life."""
    play.life.refuses_to_unpin = True


async def fail_a_sync(play: Play) -> None:
    play.life.fail_sync_in = play.chosen.randint(1, 6)


STEPS: tuple[tuple[int, Callable[[Play], Awaitable[None]]], ...] = (
    (12, archive),
    (2, archive_amid_recalls),
    (3, archive_again),
    (4, back_up),
    (1, back_up_in_vain),
    (4, back_up_in_use),
    (3, bring_back),
    (1, restore),
    (3, sync_all),
    (2, outage),
    (2, prune),
    (8, other_host),
    (3, write_back),
    (2, commit_journal),
    (4, kill_soon),
    (4, crash_in_job),
    (1, fail_a_record),
    (1, refuse_to_unpin),
    (1, fail_a_sync),
)
