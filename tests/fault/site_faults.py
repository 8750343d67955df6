"""Runs a scenario with one call spoiled, and checks what must hold afterwards.

A first run without faults counts the calls of each site; then each is spoiled in a datastore of its own:

* an error, for once or for good: what was done fails or not, but no read returns a wrong byte; when it is repaired, the
  same is done again and succeeds; so it does after a restart (a reboot, when a sync failed), where the VM is whole and
  archiving and bringing it back work;
* a kill, perhaps with the power going: the VM is whole at the next start, which finds nothing that it cannot explain;
* where a job stops or freezes guests, the hypervisor goes away, until the next life: then the guest runs, and is not
  frozen, or its VM is archived, and the next job finishes (`guests`).

At the end nothing is left over: no map, pin, half-made file or descriptor.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Rig, RigFiles, Services, survives_kill, temporary_rig
from tests.fault.datastores import NotWhole
from tests.fault.guests import check_guest, guest_of, is_left_archived, lose_guests, start_by_user
from tests.fault.scenarios import BY_NAME, SCENARIOS, Scenario, adopt, contents_of, expect, make_vm
from tests.fault.spoilings import Spoiling, kinds_at, numbers
from tests.seeded_ids import ids_from
from tests.store_places import Place, in_fake
from vmfs_stub.core.errors import MapFrozen, PointNotFound, VmfsStubError
from vmfs_stub.core.ids import PointId
from vmfs_stub.core.names import ADOPTING_DIR, PRIVATE_DIR
from vmfs_stub.services import frozen_guests, hydration, recall, verify
from vmfs_stub.store.keys import pin_key
from vmfs_stub.store.manifest import FileKind
from vmfs_stub.store.store import Store

__all__ = [
    "BY_NAME",
    "SCENARIOS",
    "Calls",
    "NotWhole",
    "Scenario",
    "Spoiling",
    "calls_of",
    "run",
    "said_of",
    "spoilings",
]

GUEST_WAITS_S = (0.05, 1.0, 10.0)
"""How long a recall is tried while something is broken for good; longer where one gives up before it is broken."""

Contents = dict[str, list[bytes]]
"""What each disk may hold."""


@dataclass(slots=True)
class Calls:
    """What a scenario called: how often each site, from which places, and the first call of a site from each."""

    counts: dict[str, int]
    places: dict[tuple[str, str], int] = field(default_factory=dict)
    has_guest: bool = False


@functools.cache
def calls_of(name: str) -> Calls:
    """What a scenario calls when nothing goes wrong; found out once.  Not from within trio."""
    return trio.run(run, BY_NAME[name], None)


def spoilings(calls: Calls, *, every: bool = False) -> Iterator[Spoiling]:
    """All ways in which a scenario can be spoiled that made these calls.

    Of a site: its first, second and last call, and the first from each place; with ``every`` all of them.
    """
    for site, count in sorted(calls.counts.items()):
        firsts = [number for (other, _), number in calls.places.items() if other == site]
        for number in range(1, count + 1) if every else numbers(count, firsts):
            for kind, for_good in kinds_at(site, has_guest=calls.has_guest):
                yield Spoiling(site, number, kind, for_good)


class NoSuchCall(NotWhole):
    """The call that was to go wrong was not made."""


async def run(scenario: Scenario, spoiling: Spoiling | None, *, place: Place = in_fake, seed: int = 0) -> Calls:
    """Run a scenario with one call spoiled, and check everything after.  Raises NotWhole.

    The store is at a ``place``, whose own troubles ``seed`` decides.  Ids are the same in each run of a scenario: packs
    whose ids begin alike share a folder, which is listed once.
    """
    *shorter, longest = GUEST_WAITS_S
    for wait_s in shorter if spoiling is not None and spoiling.for_good else ():
        with contextlib.suppress(NoSuchCall):
            return await _run(scenario, spoiling, place, seed, wait_s)
    return await _run(scenario, spoiling, place, seed, longest)


async def _run(scenario: Scenario, spoiling: Spoiling | None, place: Place, seed: int, wait_s: float) -> Calls:
    with ids_from(scenario.name), short_waits(), temporary_rig(head=BLOCK, place=place, seed=seed) as rig:
        descriptors = _descriptors()
        rig.inline = True
        contents = make_vm(rig)
        await scenario.prepare(rig)
        files = RigFiles(rig.medium)
        files.watches_places = spoiling is None
        if spoiling is not None:
            spoiling.plan(files, guest_of(rig) if scenario.has_guest else None)
        outcome = await _life(scenario, rig, files, spoiling, contents, wait_s)
        if spoiling is not None:
            if spoiling.power:
                _lose_power(rig, scenario, spoiling)
            await _check_next_life(scenario, rig, outcome, spoiling)
            rig.close()
            left = set(_descriptors().items()) - set(descriptors.items())
            if not spoiling.is_kill and "kill" not in scenario.name and left:
                raise NotWhole(f"descriptors are still open: {left}")
        return outcome.calls


async def said_of(name: str, site: str, kind: str) -> str:
    """What is found wrong when the first call of this site does so in this scenario; empty when all is well."""
    try:
        await run(BY_NAME[name], Spoiling(site, 1, kind))
    except (NotWhole, BaseExceptionGroup) as exc:
        found, rest = BaseExceptionGroup("found", [exc]).split(NotWhole)
        if found is None or rest is not None:
            raise
        return repr(found)
    return ""


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """A guest's patience, and the pauses between tries, are a test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "RETRY_PAUSE_S", 0.005)
        patch.setattr(recall, "SECOND_TRY_S", 0.0)
        patch.setattr(hydration, "RETRY_INTERVAL_S", 0.005)
        patch.setattr(frozen_guests, "PAUSES_S", (0.0, 0.0))
        patch.setattr(frozen_guests, "FREEZE_COMES_S", 0.0)
        yield


def _descriptors() -> dict[str, str]:
    """What this process has open below temporary directories, by descriptor."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[path.name] = str(path.readlink())
    return {fd: target for fd, target in found.items() if "vmfs-stub-rig-" in target}


# The life in which something goes wrong


@dataclass(slots=True)
class Outcome:
    """What the disks may hold after a life; ``told`` is whether its start said that it could not look at something.

    ``calls`` are those until the scenario had acted: at the end of the life nothing goes wrong any more.
    """

    possible: Contents
    told: bool
    calls: Calls


async def _life(
    scenario: Scenario,
    rig: Rig,
    files: RigFiles,
    spoiling: Spoiling | None,
    contents: dict[str, bytes],
    wait_s: float,
) -> Outcome:
    during = _versions(scenario, contents)
    after = {path: versions[-1:] for path, versions in during.items()}
    done, told, calls = False, False, Calls({})
    with survives_kill():
        try:
            async with rig.running(files=files, hydrates=scenario.hydrates) as services:
                told = bool(services.recovered.findings)
                if spoiling is not None and spoiling.for_good:
                    services.recall.deadline_s = wait_s
                done = await _act(scenario, services, must_work=spoiling is None)
                calls = Calls(dict(files.counts), files.places.copy(), scenario.has_guest)
                _check_second_copies(services)  # before reads bring all of it back
                if not files.dead and spoiling is not None:
                    is_archived = scenario.has_guest and is_left_archived(services)
                    await _check_no_wrong_byte(services, after if done else during)
                    files.repair()
                    services.recall.deadline_s = 30
                    if is_archived:
                        await start_by_user(services)  # which is who has read it
                    done = await _act_again(scenario, services, done=done)
        except (VmfsStubError, OSError):
            # The start itself failed, which is told, and tried again.
            if spoiling is None:
                raise
    if spoiling is not None and not files.spoiled:
        raise NoSuchCall(f"{spoiling}: there was no such call")
    return Outcome(after if done else during, told, calls)


def _versions(scenario: Scenario, contents: dict[str, bytes]) -> Contents:
    """What each disk may hold at some time while the scenario acts, the last being what it then holds."""
    (first, *_) = contents
    versions = [contents[first]]
    for offset, data in scenario.writes:
        changed = bytearray(versions[-1])
        changed[offset : offset + len(data)] = data
        versions.append(bytes(changed))
    cut = [version[:size] for size in scenario.sizes for version in versions]
    return {**{path: [content] for path, content in contents.items()}, first: [versions[0], *cut, *versions[1:]]}


async def _act(scenario: Scenario, services: Services, *, must_work: bool) -> bool:
    try:
        await scenario.act(services)
    except (VmfsStubError, OSError):
        if must_work:
            raise
        return False
    return True


async def _act_again(scenario: Scenario, services: Services, *, done: bool) -> bool:
    """What failed is tried again now that nothing is broken.

    Only a disk that is frozen may refuse, and one that the start could not look at, which it said.
    """
    if done or not scenario.again:
        return done
    try:
        await scenario.act(services)
    except MapFrozen:
        return False
    except (VmfsStubError, OSError) as exc:
        if services.recovered.findings:
            return False
        raise NotWhole(f"the next try failed: {exc!r}") from exc
    return True


async def _check_no_wrong_byte(services: Services, possible: Contents) -> None:
    """A disk may be refused here, or all it says is true."""
    for path, versions in possible.items():
        if not (services.rig.backing / path).exists():
            continue
        try:
            found = await contents_of(services, path)
        except (VmfsStubError, OSError):
            continue
        _expect_one_of(found, versions, path)


# The next life


async def _check_next_life(scenario: Scenario, rig: Rig, outcome: Outcome, spoiling: Spoiling) -> None:
    if scenario.brings:
        await _bring(rig, outcome, spoiling)
    left = {path: versions for path, versions in outcome.possible.items() if (rig.backing / path).exists()}
    gone = set(outcome.possible) - set(left)
    if gone - set(scenario.gone):
        raise NotWhole(f"{gone} is gone")
    was_killed = spoiling.is_kill or "kill" in scenario.name
    async with rig.running() as services:
        if services.recovered.findings and was_killed:
            raise NotWhole(f"after a kill: {services.recovered.findings}")
        if gone and outcome.told:
            # A disk that the start could not look at was removed: its restore point stays, which is told.
            await _check_whole(services, left)
            return
        try:
            await _check_guest(scenario, services)
            await check_works(services, left, was_killed=was_killed)
        except MapFrozen:
            if spoiling.is_kill:
                raise
        else:
            await check_ordinary(services, left, staging_may_stay=was_killed or spoiling.site == "restore.clean")
            return
    _lose_power(rig, scenario, spoiling)
    async with rig.running() as services:
        await _check_guest(scenario, services)
        await check_works(services, left, was_killed=was_killed)
        await check_ordinary(services, left, staging_may_stay=was_killed or spoiling.site == "restore.clean")


def _lose_power(rig: Rig, scenario: Scenario, spoiling: Spoiling) -> None:
    rig.lose_power(random.Random(f"{spoiling}"))
    if scenario.has_guest:
        lose_guests(rig)


async def _check_guest(scenario: Scenario, services: Services) -> None:
    if scenario.has_guest:
        await check_guest(services)


async def _bring(rig: Rig, outcome: Outcome, spoiling: Spoiling) -> None:
    """Of a VM that was to come all is here, or nothing; then it comes now."""
    here = {path for path in outcome.possible if (rig.backing / path).exists()}
    async with rig.running() as services:
        names = {path.name for path in rig.backing.iterdir()} - {PRIVATE_DIR}
        if here not in (set(), set(outcome.possible)) or bool(here) != bool(names):
            raise NotWhole(f"half of a VM is here: {here or names}")
        if not here and (rig.maps() or rig.pins()) and not spoiling.is_kill:
            raise NotWhole(f"left over of what did not come: {rig.maps()} {rig.pins()}")
        if any((rig.backing / PRIVATE_DIR / ADOPTING_DIR).iterdir()):
            raise NotWhole("a folder of an adoption is left")
        await adopt(services)


async def check_works(services: Services, possible: Contents, *, was_killed: bool) -> None:
    """The VM is whole, can be archived and brought back, and leaves nothing."""
    if services.recovered.findings:
        raise NotWhole(f"after a restart: {services.recovered.findings}")
    await services.wait_hydrated()  # one that an operator had asked for goes on, and has the disk open
    await _check_whole(services, possible)
    for path in possible:
        possible[path] = [await contents_of(services, path)]
    report = await services.archive("vm", archive=False)
    check_point(services, report.point_id, possible)
    await services.archive("vm")
    await _check_whole(services, possible)
    for path in possible:
        await services.bring_back(path)
    rig = services.rig
    # A kill between the pin and the map that remembers it leaves a pin too many: a point is kept, nothing is lost.
    if rig.maps() or len(rig.pins()) > (len(possible) if was_killed else 0):
        raise NotWhole(f"left over: {rig.maps()} {rig.pins()}")


async def check_ordinary(services: Services, possible: Contents, *, staging_may_stay: bool) -> None:
    rig = services.rig
    for path, (content,) in possible.items():
        if (rig.backing / path).read_bytes() != content:
            raise NotWhole(f"{path} as an ordinary file differs")
    volatile = [path.name for path in (rig.runtime / "maps").iterdir()]
    restored = rig.base / "restored"
    staging = [path.name for path in restored.iterdir() if path.name.startswith(".")] if restored.exists() else []
    if volatile or (staging and not staging_may_stay):
        raise NotWhole(f"left over: {volatile} {staging}")


def check_point(services: Services, point_id: PointId, contents: Contents) -> None:
    """The restore point has of each disk what it is."""
    rig = services.rig
    store = Store(rig.objects, rig.store.description)
    point = store.open_point(rig.vm("vm").id, point_id)
    for number, stored in enumerate(point.manifest.files):
        if stored.kind is FileKind.FILE:
            (wanted,), table = contents[f"vm/{stored.path}"], point.chunks(number)
            parts = [
                bytes(CHUNK) if ref is None else store.fetch([ref])[0] for ref in table.locate(0, table.chunk_count)
            ]
            expect(b"".join(parts)[: table.size], wanted, f"{stored.path} in the restore point")


async def _check_whole(services: Services, possible: Contents) -> None:
    _check_second_copies(services)
    for path, versions in possible.items():
        st = (services.rig.backing / path).stat()
        known = services.disks.placeholders.get(st.st_ino)
        if services.rig.is_placeholder(path) != (known is not None):
            raise NotWhole(f"{path}: the index does not know what it is")
        if known is not None and known.record is not None:
            record = known.record
            if pin_key(record.vm_id, record.point_id, record.placeholder_id) not in services.rig.pins():
                raise NotWhole(f"{path} is a placeholder whose restore point is not pinned")
        _expect_one_of(await contents_of(services, path), versions, path)


def _check_second_copies(services: Services) -> None:
    """Where two copies are asked for, nothing was released of which the replica alone does not give all."""
    replica = services.rig.replica()
    for _, known in services.disks.placeholders.items() if replica is not None else ():
        if known.record is not None:
            assert replica is not None
            try:
                vm_id, point_id = known.record.vm_id, known.record.point_id
                findings = verify.verify(replica, vm_id=vm_id, point_id=point_id, workers=1).findings
            except PointNotFound as exc:
                raise NotWhole(f"{known.label} is a placeholder without a second copy") from exc
            if findings:
                raise NotWhole(f"{known.label} is a placeholder without a whole second copy: {findings[0]}")


def _expect_one_of(found: bytes, versions: list[bytes], path: str) -> None:
    lengths = sorted(len(version) for version in versions)
    # What grows reaches the medium block by block.
    is_between = lengths[0] < len(found) < lengths[-1] and len(found) % BLOCK == 0
    if len(found) not in lengths and not is_between:
        raise NotWhole(f"{path} has {len(found)} bytes")
    for at in range(0, len(found), BLOCK):
        block = found[at : at + BLOCK]
        if not any(block == version[at : at + BLOCK].ljust(len(block), b"\0") for version in versions):
            zeros = "" if any(block) else ", zeros"
            raise NotWhole(f"{path}: block {at // BLOCK} is wrong{zeros}")
