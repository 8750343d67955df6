"""What checks every call is proven to notice: steps in the wrong order, promises not kept, copies believed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Services, temporary_rig
from tests.fault.scenarios import DISK
from tests.fault.site_faults import BY_NAME, NotWhole, Scenario, Spoiling, run
from vmfs_stub.core.errors import IdentityMismatch
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.primary import placeholder as primary_placeholder
from vmfs_stub.services import recovery
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_maker import PlaceholderMaker

Patch = pytest.MonkeyPatch
EIO, KILL = "error", "kill"


def remove_map_before_record(patch: Patch) -> None:
    remove_record = Placeholder._remove_record

    def early(self: Placeholder) -> None:
        path = self.maps.durable.path
        self._files.call("graduate.map", path.unlink)
        remove_record(self)

    patch.setattr(Placeholder, "_remove_record", early)


def take_back_what_is_committed(patch: Patch) -> None:
    """After a failure, remove map and pin also of what is a placeholder by now."""
    patch.setattr(PlaceholderMaker, "may_be_placeholder", lambda self, source: False)


def leave_replaced_maps(patch: Patch) -> None:
    patch.setattr(primary_placeholder, "_end_replaced", lambda *args, **kwargs: None)


def discard_the_live_map(patch: Patch) -> None:
    """A failed opening takes the volatile map away, which the durable one may name already."""
    update = primary_placeholder.DurableMap.update

    def update_or_discard(self: primary_placeholder.DurableMap, pages: object, header: object) -> None:
        try:
            update(self, pages, header)  # type: ignore[arg-type]
        except OSError:
            for bits in self.path.parents[2].parent.glob("run/maps/*.bits"):
                bits.unlink()
            raise

    patch.setattr(primary_placeholder.DurableMap, "update", update_or_discard)


def end_maps_of_unread_files(patch: Patch) -> None:
    """Take a file whose record could not be read for one without."""
    problem = recovery.Recovery._problem

    def harmless(self: recovery.Recovery, path: str, ino: int, record: object, error: Exception) -> None:
        self._unclear.clear()
        problem(self, path, ino, record, error)  # type: ignore[arg-type]

    patch.setattr(recovery.Recovery, "_problem", harmless)


CASES: list[tuple[Callable[[Patch], None], str, list[Spoiling]]] = [
    (remove_map_before_record, "graduate", [Spoiling("graduate.record", 1, KILL)]),
    (take_back_what_is_committed, "archive", [Spoiling("archive.record_sync", 1, EIO)]),
    (leave_replaced_maps, "archive_again", [Spoiling("archive.record_sync", 1, EIO)]),
    (discard_the_live_map, "recall", [Spoiling("map.write", 2, EIO)]),
    # Which file is looked at first is the filesystem's choice.
    (
        end_maps_of_unread_files,
        "start_after_kill_at_commit",
        [Spoiling("recovery.record", 1, EIO), Spoiling("recovery.record", 2, EIO)],
    ),
]


@pytest.mark.parametrize(("plant", "name", "spoilings"), CASES, ids=[case[0].__name__ for case in CASES])
async def test_what_is_planted_is_noticed(
    plant: Callable[[Patch], None], name: str, spoilings: list[Spoiling], monkeypatch: pytest.MonkeyPatch
) -> None:
    for spoiling in spoilings:
        await run(_once(name), spoiling)
    plant(monkeypatch)
    assert any([await _is_noticed(name, spoiling) for spoiling in spoilings])


def _once(name: str) -> Scenario:
    """Without a second try in the same life, which would mend what a start has to."""
    return replace(BY_NAME[name], again=False)


async def _is_noticed(name: str, spoiling: Spoiling) -> bool:
    try:
        await run(_once(name), spoiling)
    except (NotWhole, ExceptionGroup) as caught:
        error: BaseException = caught
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert not isinstance(error, (TypeError, AttributeError, NameError)), "the plant itself does not work"
        return True
    return False


# A copy of a placeholder


async def copy_is_refused(services: Services) -> bool:
    """Copy an archived disk with its attributes, after the original was written to, and look at the copy."""
    original = services.rig.backing / DISK
    disk = await services.open(DISK)
    await disk.write(BLOCK, b"n" * BLOCK)
    await services.disks.release(disk)
    copy = original.with_name("copy.img")
    shutil.copyfile(original, copy)
    os.setxattr(copy, PLACEHOLDER_XATTR, os.getxattr(original, PLACEHOLDER_XATTR))
    try:
        opened = await services.open("vm/copy.img")
    except IdentityMismatch:
        return True
    await services.disks.release(opened)
    return False


async def _with_a_copy() -> bool:
    with temporary_rig() as rig:
        rig.make_disk(DISK, b"o" * 3 * CHUNK)
        async with rig.running() as services:
            await services.archive("vm")
            return await copy_is_refused(services)


async def test_a_copied_record_is_not_accepted() -> None:
    assert await _with_a_copy()


async def test_the_check_sees_a_copied_record_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primary_placeholder, "check_identity", lambda *args, **kwargs: None)
    assert not await _with_a_copy()


async def test_a_copy_is_a_finding_at_the_start_and_the_original_is_not() -> None:
    with temporary_rig() as rig:
        rig.make_disk(DISK, b"o" * 3 * CHUNK)
        async with rig.running() as services:
            await services.archive("vm")
            await copy_is_refused(services)
        async with rig.running() as services:
            assert [type(error) for _, error in services.recovered.findings] == [IdentityMismatch]
            disk = await services.open(DISK)
            assert await disk.read(0, 3 * BLOCK) == b"o" * BLOCK + b"n" * BLOCK + b"o" * BLOCK
            await services.disks.release(disk)
