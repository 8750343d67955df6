"""Thin adapter between pyfuse3 and Filesystem, and the error boundary.

pyfuse3 ends the whole mount on any exception but FUSEError, so nothing else leaves a handler: known failures become
their errno, anything else is logged with its traceback, counted and answered with EIO.  trio.Cancelled passes: the
request is then answered by the kernel when the descriptor is closed.  Handlers convert types and delegate.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

import pyfuse3

from vmfs_stub.core.errors import IntegrityError, RecallError, StoreError
from vmfs_stub.mount.attributes import Attributes, Change, DirectoryEntry, Requester
from vmfs_stub.mount.errno_table import data_errno, errno_of
from vmfs_stub.mount.filesystem import Filesystem

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


_LOGGED_BY_RECALL: Final = (RecallError, StoreError, IntegrityError)
"""A guest repeats a read that failed, for hours perhaps; what recalls fail of is in the log once already."""


class Faults:
    """Counts of what went wrong in handlers.

    ``errors`` by (operation, errno) are answers to programs, most of them ordinary; ``bugs`` by operation are
    programming errors, of which there should be none.
    """

    def __init__(self) -> None:
        self.errors: Counter[tuple[str, int]] = Counter()
        self.bugs: Counter[str] = Counter()

    def answer(self, operation: str, failure: Exception, *, is_data: bool) -> pyfuse3.FUSEError:
        """What to raise for ``failure``."""
        if isinstance(failure, pyfuse3.FUSEError):
            return failure
        code = errno_of(failure)
        if code is None:
            self.bugs[operation] += 1
            _log.error("programming error in %s; it was answered with EIO", operation, exc_info=failure)
            return pyfuse3.FUSEError(errno.EIO)
        if is_data:
            code = data_errno(code)
            if not isinstance(failure, _LOGGED_BY_RECALL):
                _log.warning("%s failed: %s", operation, failure)
        self.errors[operation, code] += 1
        return pyfuse3.FUSEError(code)


Handler = Callable[Concatenate["FuseOperations", P], Coroutine[object, object, T]]


def _bounded(handler: Handler[P, T]) -> Handler[P, T]:
    """The error boundary around a handler."""
    name = handler.__name__

    @wraps(handler)
    async def bounded(self: FuseOperations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as exc:
            raise self.faults.answer(name, exc, is_data=False) from exc

    return bounded


class FuseOperations(pyfuse3.Operations):
    """Request handlers.  ``on_init`` is called when libfuse has read the INIT request."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, filesystem: Filesystem, *, negative_timeout_s: float, on_init: Callable[[], None]) -> None:
        super().__init__()
        self.faults = Faults()
        self._fs = filesystem
        self._negative_timeout_s = negative_timeout_s
        self._on_init = on_init

    def init(self) -> None:
        self._on_init()

    # Names

    @_bounded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return _entry(await self._fs.lookup(parent_inode, name))
        except FileNotFoundError:
            # Number 0 lets the kernel remember that there is no such name.
            absent = pyfuse3.EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = self._negative_timeout_s
            return absent

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        try:
            fds = [self._fs.inodes.forget(ino, lookups) for ino, lookups in inode_list]
            await self._fs.inodes.close_descriptors([fd for fd in fds if fd is not None])
        except Exception as exc:
            self.faults.answer("forget", exc, is_data=False)

    @_bounded
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _entry(await self._fs.mkdir(parent_inode, name, mode, _requester(ctx)))

    @_bounded
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _entry(await self._fs.mknod(parent_inode, name, mode, rdev, _requester(ctx)))

    @_bounded
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _entry(await self._fs.symlink(parent_inode, name, target, _requester(ctx)))

    @_bounded
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _entry(await self._fs.link(inode, new_parent_inode, new_name))

    @_bounded
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        return await self._fs.readlink(inode)

    @_bounded
    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._fs.unlink(parent_inode, name)

    @_bounded
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._fs.rmdir(parent_inode, name)

    @_bounded
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags=flags)

    # Attributes

    @_bounded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _entry(await self._fs.getattr(inode))

    @_bounded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = Change(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            handle=fh,
        )
        return _entry(await self._fs.setattr(inode, change, _requester(ctx)))

    @_bounded
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._fs.getxattr(inode, name)

    @_bounded
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        return await self._fs.listxattr(inode)

    @_bounded
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        await self._fs.setxattr(inode, name, value, _requester(ctx))

    @_bounded
    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._fs.removexattr(inode, name)

    @_bounded
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Leave it to the kernel, which checks permissions itself and does not ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @_bounded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found, reply = await self._fs.statfs(), pyfuse3.StatvfsData()
        reply.f_bsize, reply.f_frsize, reply.f_namemax = found.f_bsize, found.f_frsize, found.f_namemax
        reply.f_blocks, reply.f_bfree, reply.f_bavail = found.f_blocks, found.f_bfree, found.f_bavail
        reply.f_files, reply.f_ffree, reply.f_favail = found.f_files, found.f_ffree, found.f_favail
        return reply

    # Files.  Reads and writes have the boundary inline: they are the ones that must be quick.

    @_bounded
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return _file_info(await self._fs.open(inode, flags, _requester(ctx)))

    @_bounded
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        handle, attributes = await self._fs.create(parent_inode, name, mode, flags, _requester(ctx))
        return _file_info(handle), _entry(attributes)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes | bytearray:  # type: ignore[override]
        try:
            return await self._fs.read(fh, off, size)
        except Exception as exc:
            raise self.faults.answer("read", exc, is_data=True) from exc

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        try:
            return await self._fs.write(fh, off, buf)
        except Exception as exc:
            raise self.faults.answer("write", exc, is_data=True) from exc

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing is buffered here: a close has nothing to report."""

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        try:
            await self._fs.fsync(fh, data_only=datasync)
        except Exception as exc:
            raise self.faults.answer("fsync", exc, is_data=True) from exc

    @_bounded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        await self._fs.release(fh)

    # Directories

    @_bounded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return await self._fs.opendir(inode)

    @_bounded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def emit(entry: DirectoryEntry) -> bool:
            attributes = _bare_entry(entry.ino) if entry.attributes is None else _entry(entry.attributes)
            return pyfuse3.readdir_reply(token, entry.name, attributes, entry.next_offset)

        await self._fs.readdir(fh, start_id, emit)

    @_bounded
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        await self._fs.releasedir(fh)

    @_bounded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._fs.fsyncdir(fh)


def _requester(ctx: pyfuse3.RequestContext) -> Requester:
    return Requester(ctx.pid, ctx.uid, ctx.gid, ctx.umask)


def _file_info(handle: int) -> pyfuse3.FileInfo:
    # The kernel's pages stay valid across opens: nobody but this mount's users changes the bytes.
    return pyfuse3.FileInfo(fh=handle, keep_cache=True)


def _bare_entry(ino: int) -> pyfuse3.EntryAttributes:
    """For ``.`` and ``..``, of which the kernel takes the number alone."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    entry.st_mode = 0o040000
    return entry


def _entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    ino, st, mode, nlink, blocks, mtime_ns, attr_timeout_s, entry_timeout_s = attributes
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    entry.attr_timeout = attr_timeout_s
    entry.entry_timeout = entry_timeout_s
    entry.st_mode = mode
    entry.st_nlink = nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry
