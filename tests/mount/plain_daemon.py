"""Serves a backing directory with PlainDisks, in a process of its own: the tests touch the mount, it must not.

``python plain_daemon.py BACKING MOUNTPOINT [SETTING=VALUE…]``.  Reads one command a line on stdin and answers one line
of JSON on stdout; end of file unmounts.  First line: {"ready": true} or {"error": …}.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent))
from plain_disks import PlainDisks, PlainOverride, PlainThreads

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.serving import Mount, open_mount
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.primary.files import FileCalls


class SiteFaults(FileCalls):
    """Fails the next call of ``site`` with an exception."""

    def __init__(self) -> None:
        self.planted: dict[str, Exception] = {}

    def call(self, site, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        failure = self.planted.pop(site, None)
        if failure is not None:
            raise failure
        return function(*args, **kwargs)


def answer(value: object) -> None:
    print(json.dumps(value), flush=True)


async def obey(words: list[str], disks: PlainDisks, mount: Mount, files: SiteFaults, filesystem: Filesystem) -> object:
    match words:
        case ["unblock"]:
            disks.unblocked.set()
        case ["blocked"]:
            return disks.blocked
        case ["events"]:
            return disks.events
        case ["callers"]:
            return [[each.pid, each.uid, each.executable, each.cgroup] for each in disks.callers]
        case ["bugs"]:
            return dict(mount.faults.bugs)
        case ["nodes"]:
            return len(filesystem.inodes.nodes)
        case ["open"]:
            return len(disks.open_disks)
        case ["plant", site, number]:
            files.planted[site] = OSError(int(number), "planted") if int(number) else ZeroDivisionError("planted")
        case ["override", ino, blocks, mtime_ns]:
            disks.overrides[int(ino)] = PlainOverride(int(blocks), int(mtime_ns))
            mount.attributes_changed(int(ino))
        case ["unmount", *force]:
            try:
                await mount.unmount(force=bool(force))
            except VmfsStubError as exc:
                return type(exc).__name__
            await trio.sleep_forever()  # the end of serving is the answer
        case _:
            return "unknown command"
    return None


async def serve(backing: Path, mountpoint: Path, settings: MountSettings) -> None:
    threads, files = PlainThreads(), SiteFaults()
    disks = PlainDisks(threads)
    filesystem = Filesystem(backing, disks=disks, threads=threads, files=files, settings=settings)
    try:
        async with open_mount(filesystem, mountpoint=mountpoint, settings=settings) as mount:
            answer({"ready": True})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commands, disks, mount, files, filesystem, nursery.cancel_scope)
                await mount.ended.wait()
                nursery.cancel_scope.cancel()
    finally:
        await filesystem.aclose()
    answer({"ended": True})


async def commands(
    disks: PlainDisks, mount: Mount, files: SiteFaults, filesystem: Filesystem, scope: trio.CancelScope
) -> None:
    pending = b""
    stdin = trio.lowlevel.FdStream(0)
    async for data in stdin:
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            answer(await obey(line.decode().split(), disks, mount, files, filesystem))
    scope.cancel()


def main() -> None:
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    logging.getLogger("pyfuse3").setLevel(logging.INFO)
    backing, mountpoint, *rest = sys.argv[1:]
    settings = MountSettings(**{key: json.loads(value) for key, _, value in (each.partition("=") for each in rest)})
    try:
        trio.run(serve, Path(backing), Path(mountpoint), settings)
    except VmfsStubError as exc:
        answer({"error": type(exc).__name__, "message": str(exc)})


if __name__ == "__main__":
    main()
