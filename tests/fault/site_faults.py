"""Scenarios in which each file call is made to fail, or the daemon is killed at it, and what must hold afterwards.

A scenario prepares a datastore, then does one thing (`act`).  A first run without faults counts the calls of each site;
then every one of them is spoiled in a datastore of its own:

* an error: what was done fails or not, but no read returns a wrong byte; after a restart (a reboot, when a sync failed)
  the VM is whole, and archiving and bringing it back work;
* a kill, perhaps with the power going: the same, and the start finds nothing that it cannot explain.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, Services, survives_kill, temporary_rig
from vmfs_stub.core.errors import MapFrozen, VmfsStubError
from vmfs_stub.store.keys import pin_key

PATHS = ("vm/disk.img", "vm/second.img")
DISK = PATHS[0]


class NotWhole(AssertionError):
    """A disk is not what it should be after a failure."""


@dataclass(frozen=True)
class Scenario:
    """``prepare`` leaves the state in which ``act`` is spoiled; ``act`` returns nothing and may raise.

    ``writes`` are what a guest writes to the first disk in `act`; where act failed, any of them may have been done.
    """

    name: str
    prepare: Callable[[Rig], Awaitable[None]]
    act: Callable[[Services], Awaitable[None]]
    writes: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Spoiling:
    """The ``number``-th call at ``site`` goes wrong: an errno, or a kill, perhaps with the power going."""

    site: str
    number: int
    error: int = 0
    power: bool = False

    def plan(self, files: RigFiles) -> None:
        error = OSError(self.error, os.strerror(self.error)) if self.error else Killed()
        files.fail(self.site, self.number, error)


Contents = dict[str, list[bytes]]
"""What each disk may hold."""


def first_contents() -> dict[str, bytes]:
    chosen = random.Random(5)
    large = chosen.randbytes(2 * CHUNK) + bytes(CHUNK) + chosen.randbytes(CHUNK + 3 * BLOCK + 512)
    return {DISK: large, PATHS[1]: chosen.randbytes(CHUNK + 100)}


async def run(scenario: Scenario, spoiling: Spoiling | None) -> dict[str, int]:
    """Run a scenario with one call spoiled, and check everything after; returns the calls that `act` made, by site."""
    with temporary_rig(head=BLOCK) as rig:
        contents = first_contents()
        for path, content in contents.items():
            rig.make_disk(path, content)
        await scenario.prepare(rig)
        files = RigFiles(rig.medium)
        possible, counts = await _life(scenario, rig, files, spoiling, contents)
        if spoiling is not None:
            if spoiling.power:
                rig.lose_power(random.Random(f"{spoiling}"))
            await _check_next_life(scenario, rig, possible, spoiling)
        return counts


async def _life(
    scenario: Scenario, rig: Rig, files: RigFiles, spoiling: Spoiling | None, contents: dict[str, bytes]
) -> tuple[Contents, dict[str, int]]:
    before = {path: [content] for path, content in contents.items()}
    versions = [contents[DISK]]
    for offset, data in scenario.writes:
        changed = bytearray(versions[-1])
        changed[offset : offset + len(data)] = data
        versions.append(bytes(changed))
    during: Contents = {**before, DISK: versions}
    if spoiling is not None:
        spoiling.plan(files)
    done = False
    with survives_kill():
        async with rig.running(files=files) as services:
            try:
                await scenario.act(services)
                done = True
            except (VmfsStubError, OSError):
                if spoiling is None:
                    raise
            if not files.dead:
                possible = {**before, DISK: versions[-1:]} if done else during
                await _check_no_wrong_byte(services, possible)
    return ({**before, DISK: versions[-1:]} if done else during), dict(files.counts)


async def _check_no_wrong_byte(services: Services, possible: Contents) -> None:
    """A disk may be refused here, or all it says is true."""
    for path, versions in possible.items():
        try:
            found = await _read(services, path)
        except (VmfsStubError, OSError):
            continue
        _expect_one_of(found, versions, path)


async def _check_next_life(scenario: Scenario, rig: Rig, possible: Contents, spoiling: Spoiling) -> None:
    async with rig.running() as services:
        if not spoiling.error and services.recovered.findings:
            raise NotWhole(f"after a kill: {services.recovered.findings}")
        try:
            await _check_whole(services, possible)
        except MapFrozen:
            rig.lose_power(random.Random(f"{spoiling}"))
    async with rig.running() as services:
        if services.recovered.findings:
            raise NotWhole(f"after a restart: {services.recovered.findings}")
        await services.wait_hydrated()  # one that an operator had asked for goes on, and has the disk open
        await _check_whole(services, possible)
        whole = {path: await _read(services, path) for path in possible}
        await services.archive("vm")
        await _check_whole(services, {path: [content] for path, content in whole.items()})
        for path in possible:
            await services.bring_back(path)
        # A kill between the pin and the map that remembers it leaves a pin too many: a point is kept, nothing is lost.
        was_killed = not spoiling.error or "kill" in scenario.name
        if rig.maps() or len(rig.pins()) > (len(possible) if was_killed else 0):
            raise NotWhole(f"left over: {rig.maps()} {rig.pins()}")
    for path, content in whole.items():
        if (rig.backing / path).read_bytes() != content:
            raise NotWhole(f"{path} as an ordinary file differs")


async def _check_whole(services: Services, possible: Contents) -> None:
    for path, versions in possible.items():
        st = (services.rig.backing / path).stat()
        known = services.disks.placeholders.get(st.st_ino)
        if services.rig.is_placeholder(path) != (known is not None):
            raise NotWhole(f"{path}: the index does not know what it is")
        if known is not None and known.record is not None:
            record = known.record
            if pin_key(record.vm_id, record.point_id, record.placeholder_id) not in services.rig.pins():
                raise NotWhole(f"{path} is a placeholder whose restore point is not pinned")
        _expect_one_of(await _read(services, path), versions, path)


async def _read(services: Services, path: str) -> bytes:
    disk = await services.open(path)
    try:
        return bytes(await disk.read(0, 1 << 24))
    finally:
        await services.disks.release(disk)


def _expect_one_of(found: bytes, versions: list[bytes], path: str) -> None:
    if len(found) not in {len(version) for version in versions}:
        raise NotWhole(f"{path} has {len(found)} bytes")
    for at in range(0, len(found), BLOCK):
        if not any(found[at : at + BLOCK] == version[at : at + BLOCK] for version in versions):
            zeros = "" if any(found[at : at + BLOCK]) else ", zeros"
            raise NotWhole(f"{path}: block {at // BLOCK} is wrong{zeros}")


# The scenarios


async def _nothing(rig: Rig) -> None:
    """Plain files."""


async def _archived(rig: Rig) -> None:
    async with rig.running() as services:
        await services.archive("vm")


async def _partly_recalled(rig: Rig) -> None:
    await _archived(rig)
    async with rig.running() as services:
        disk = await services.open(DISK)
        await disk.read(CHUNK, 1)
        await disk.sync(data_only=True)
        await services.disks.release(disk)


async def _killed_while_punching(rig: Rig) -> None:
    await _killed_at(rig, "archive.punch", _archive)


async def _killed_at_commit(rig: Rig) -> None:
    await _killed_at(rig, "archive.record_sync", _archive)


async def _killed_at_second_commit(rig: Rig) -> None:
    await _partly_recalled(rig)
    await _killed_at(rig, "archive.record_sync", _archive)


async def _killed_before_commit(rig: Rig) -> None:
    await _killed_at(rig, "archive.record", _archive)


async def _killed_while_graduating(rig: Rig) -> None:
    await _archived(rig)
    await _killed_at(rig, "graduate.record", _bring_back)


async def _killed_after_graduation(rig: Rig) -> None:
    await _archived(rig)
    await _killed_at(rig, "graduate.sync", _bring_back)


async def _killed_at(rig: Rig, site: str, act: Callable[[Services], Awaitable[None]]) -> None:
    files = RigFiles(rig.medium)
    files.fail(site, 1, Killed())
    with survives_kill():
        async with rig.running(files=files) as services:
            await act(services)
    if not files.dead:
        raise NotWhole(f"{site} was never called")


async def _archive(services: Services) -> None:
    report = await services.archive("vm")
    if report.abandoned:
        raise OSError(errno.EIO, report.abandoned)


async def _read_first(services: Services) -> None:
    _expect_one_of(await _read(services, DISK), [first_contents()[DISK]], DISK)


async def _bring_back(services: Services) -> None:
    for path in PATHS:
        await services.bring_back(path)


async def _start_only(services: Services) -> None:
    """The start is what is spoiled."""


WRITES = ((3 * BLOCK, b"w" * BLOCK), (CHUNK - 10, b"across a border of chunks"), (2 * CHUNK, b"z" * CHUNK))


async def _write_and_sync(services: Services) -> None:
    disk = await services.open(DISK)
    try:
        for offset, data in WRITES:
            await disk.write(offset, data)
        await disk.sync(data_only=False)
    finally:
        await services.disks.release(disk)


SCENARIOS = [
    Scenario("archive", _nothing, _archive),
    Scenario("archive_again", _partly_recalled, _archive),
    Scenario("recall", _archived, _read_first),
    Scenario("write_and_sync", _archived, _write_and_sync, WRITES),
    Scenario("graduate", _partly_recalled, _bring_back),
    Scenario("start_after_kill_while_punching", _killed_while_punching, _start_only),
    Scenario("start_after_kill_at_commit", _killed_at_commit, _start_only),
    Scenario("start_after_kill_at_second_commit", _killed_at_second_commit, _start_only),
    Scenario("start_after_kill_before_commit", _killed_before_commit, _start_only),
    Scenario("start_after_kill_while_graduating", _killed_while_graduating, _start_only),
    Scenario("start_after_kill_after_graduation", _killed_after_graduation, _start_only),
]
