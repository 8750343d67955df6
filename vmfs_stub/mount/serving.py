"""A mount that is being served: from mounting to the last answer.

pyfuse3 keeps its session in module globals, so a process serves one mount.  At the end new requests are no longer
read, those in progress get a grace time, and closing the descriptor fails what is left, so that no caller waits for
ever.  No code of this process may touch the mount while it serves it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from vmfs_stub.core.errors import InUse
from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.mount import session
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.fuse import Faults, FuseOperations
from vmfs_stub.mount.nodes import NODES_SHARE, ROOT
from vmfs_stub.mount.settings import MountSettings

_log = logging.getLogger(__name__)
_WORKERS_IDLE_MAX = 16
"""pyfuse3's tasks that wait for a request; each that ends frees a buffer of 1 MiB, which the next makes anew."""

_KERNEL_ENDS_S = 5.0
"""How long after it was unmounted the kernel may take to end the connection."""
_RELIEF_INTERVAL_S = 0.1
"""Between two times that the kernel is made to forget what nobody uses."""

_serving = False


class Mount:
    """Handle of a mount that is being served.

    ``ended`` is set when the kernel's side is gone or serving has stopped, ``faults`` counts failures of handlers,
    ``channel`` is the kernel's end of it.
    """

    def __init__(self, channel: session.KernelChannel, filesystem: Filesystem, faults: Faults) -> None:
        self._filesystem = filesystem
        self.channel = channel
        self.faults = faults
        self.ended = trio.Event()
        self._unmounting = trio.Lock()

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted."""
        return self.channel.mountpoint

    async def unmount(self, *, force: bool = False) -> None:
        """Unmount, after which serving can end.  InUse when something is open there and not ``force``.

        Another mount namespace (libvirt makes one for each guest) may have a copy of the mount, and keep it where no
        unmounting reaches it: then the kernel ends nothing, and ending to serve makes every call on that copy fail.
        """
        async with self._unmounting:
            if force:
                await trio.to_thread.run_sync(lambda: mountpoints.detach(self.mountpoint, abort=True))
            else:
                await trio.to_thread.run_sync(mountpoints.unmount, self.mountpoint)
            with trio.move_on_after(_KERNEL_ENDS_S):
                await self.ended.wait()
                return
            _log.warning(
                "%s is still mounted in another mount namespace; what uses it there will fail", self.mountpoint
            )

    async def wait_over(self) -> None:
        """Wait until it has ended, and whoever unmounts it knows: the kernel then lets go of pages for a while."""
        await self.ended.wait()
        async with self._unmounting:
            pass

    def attributes_changed(self, ino: int) -> None:
        """Say that attributes or xattrs of an inode changed behind the mount; does not sleep."""
        node = self._filesystem.inodes.nodes.find(ino)
        if node is None or self.ended.is_set():
            return
        node.xattrs_changed()
        with _unknown_is_fine():
            pyfuse3.invalidate_inode(ino, attr_only=True)

    async def name_appeared(self, name: bytes) -> None:
        """Say that a name at the top appeared behind the mount: the kernel may have been told that there is none."""
        if self.ended.is_set():
            return
        with _unknown_is_fine():
            # It waits for requests that look at the directory, which are answered meanwhile.
            invalidate = partial(pyfuse3.invalidate_entry, pyfuse3.ROOT_INODE, name)
            await trio.to_thread.run_sync(invalidate, abandon_on_cancel=True)
        self.attributes_changed(ROOT)


@asynccontextmanager
async def open_mount(filesystem: Filesystem, *, mountpoint: Path, settings: MountSettings) -> AsyncIterator[Mount]:
    """Mount and serve until the block is left; ``Mount.ended`` tells when it was unmounted from outside.

    Leaving unmounts: cleanly if nothing is open there, else the mount is taken out of the tree, and files that are
    still open fail from then on.  Raises InUse, AlreadyExists, ConfigError, Unsupported or PrimaryIOError when it
    cannot be mounted; what leaves the block comes in an ExceptionGroup, as from a nursery.
    """
    await _prepare(mountpoint, settings.start_timeout_s)
    channel = await trio.to_thread.run_sync(session.mount_channel, mountpoint, settings)
    try:
        async with serve_channel(filesystem, channel, settings=settings) as mount:
            try:
                yield mount
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(session.take_away, channel)
    finally:
        # Again for a failure before serving began; then the last close fails every request that is left.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(session.take_away, channel)
        os.close(channel.fd)


@asynccontextmanager
async def serve_channel(
    filesystem: Filesystem, channel: session.KernelChannel, *, settings: MountSettings
) -> AsyncIterator[Mount]:
    """Serve a mounted channel until the block is left; neither unmounts nor closes it.

    Leaving stops reading requests; those in progress get ``shutdown_grace_s``, then they are given up unanswered.
    """
    server = _Server(filesystem, channel, settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        try:
            yield server.mount
        finally:
            with trio.CancelScope(shield=True):
                await server.stop()


async def _prepare(mountpoint: Path, timeout_s: float) -> None:
    # Abandoned in its thread at the end of the time: looking at a mount that does not answer cannot be interrupted.
    with trio.move_on_after(timeout_s):
        await trio.to_thread.run_sync(mountpoints.prepare, mountpoint, abandon_on_cancel=True)
        return
    raise InUse(f"{mountpoint} has a mount that does not answer: end what serves it, or detach it with umount -l")


class _Server:
    """One run of pyfuse3 on a channel."""

    def __init__(self, filesystem: Filesystem, channel: session.KernelChannel, settings: MountSettings) -> None:
        self._channel = channel
        self._settings = settings
        self._libfuse_fd = -1
        self._started = trio.Event()
        self._failure: OSError | None = None
        # Shielded: requests are answered until `stop` says otherwise, whoever is cancelled around it.
        self._scope = trio.CancelScope(shield=True)
        self._operations = FuseOperations(
            filesystem, negative_timeout_s=settings.attr_timeout_s, on_init=self._swap_descriptors
        )
        self.mount = Mount(channel, filesystem, self._operations.faults)
        filesystem.attributes_changed = self.mount.attributes_changed
        self._nodes = filesystem.inodes.nodes
        self._crowded = trio.Event()
        self._relief = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        global _serving  # noqa: PLW0603 - it mirrors pyfuse3's own module state
        if _serving:
            raise RuntimeError("pyfuse3 serves one mount in a process")
        _serving = True
        _survive_vanished_requests()
        with session.libfuse_end(self._channel) as self._libfuse_fd:
            pyfuse3.init(self._operations, f"/dev/fd/{self._libfuse_fd}", set())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve)
                nursery.start_soon(self._relieve)
                with trio.fail_after(self._settings.start_timeout_s):
                    await self._started.wait()
                if self._failure is not None:
                    raise self._failure
                task_status.started()
        finally:
            pyfuse3.close(unmount=False)
            _serving = False

    async def stop(self) -> None:
        """Stop reading requests and wait for those in progress, for the grace time; then give them up."""
        if not self.mount.ended.is_set():
            pyfuse3.terminate()
            with trio.move_on_after(self._settings.shutdown_grace_s):
                await self.mount.ended.wait()
        self._scope.cancel()

    async def _serve(self) -> None:
        try:
            with self._scope:
                await pyfuse3.main(min_tasks=_WORKERS_IDLE_MAX, max_tasks=self._settings.requests_max)
        finally:
            self.mount.ended.set()
            self._relief.cancel()

    async def _relieve(self) -> None:
        """Whenever the kernel knows of many inodes, each of which takes a descriptor: have it forget the unused ones.

        It keeps them until memory is short, which may be long after descriptors are.  This begins well before
        the table refuses more.
        """
        wanted_max = min(self._settings.nodes_wanted_max, int(session.descriptors_max() * NODES_SHARE / 2))
        self._nodes.crowded_at, self._nodes.on_crowded = wanted_max, self._ask_for_relief
        with self._relief:
            while True:
                await self._crowded.wait()
                try:
                    # Abandoned at the end: it waits for requests, which are not answered then.
                    await trio.to_thread.run_sync(session.have_unused_forgotten, self._channel, abandon_on_cancel=True)
                except OSError as exc:
                    _log.warning("the kernel keeps %d inodes: forgetting them failed (%s)", len(self._nodes), exc)
                # What it told is read soon; what is left then is in use, and asking again at once would not help.
                await trio.sleep(_RELIEF_INTERVAL_S)
                self._nodes.crowded_at = max(wanted_max, len(self._nodes) + wanted_max // 8)
                self._crowded = trio.Event()

    def _ask_for_relief(self) -> None:
        self._crowded.set()

    def _swap_descriptors(self) -> None:
        # Called from C, where an exception would be lost.
        try:
            session.swap_in(self._channel, self._libfuse_fd)
        except OSError as exc:
            self._failure = exc
        self._started.set()


def _survive_vanished_requests() -> None:
    """Make pyfuse3 go on when a request is gone by the time it is read.

    The kernel takes back a request whose caller was killed.  If that happens between poll and read, the read gives
    EAGAIN, which pyfuse3 raises as an OSError that would end the mount.  pyfuse3 starts its tasks by this name.
    """
    original: Callable[..., Awaitable[None]] = pyfuse3._session_loop  # type: ignore[attr-defined]
    if getattr(original, "survives", False):
        return

    async def session_loop(nursery: trio.Nursery, min_tasks: int, max_tasks: int) -> None:
        while True:
            try:
                await original(nursery, min_tasks, max_tasks)
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    raise
                _log.debug("a request was taken back before it was read")
            else:
                return

    session_loop.survives = True  # type: ignore[attr-defined]
    pyfuse3._session_loop = session_loop  # type: ignore[attr-defined]


@contextlib.contextmanager
def _unknown_is_fine() -> Iterator[None]:
    """The kernel answers ENOENT for what it does not know, and there is nothing to tell once the mount has ended."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in {errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EBADF}:
            raise
