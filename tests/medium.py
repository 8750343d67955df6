"""What a power loss leaves of a backing directory: a journalled filesystem, as bad as it may be.

`Medium` is told of every file call (`calling`, `called`), knows what was made durable, and at a power loss takes back
any part of the rest.  What it may take back is what ext4 (data=ordered, delayed allocation), XFS and Btrfs may between
them, and more, never less:

* **Data**: each block of 4 KiB on its own is what it was when last synced, or what it is; in between, a write-back by
  the kernel (`write_back`) may have brought any block to the medium.
* **Size**: what it was or what it is; a file that grew may end at any block in between, since delayed allocation moves
  the end of file block by block.
* **The record** (an extended attribute): what it was or what it is, apart from data and names.  fdatasync does not make
  it durable, fsync does.
* **Names**: link, unlink, rename and creation are each whole or undone, a rename that replaces or exchanges included.
  What shares a name or an inode happens in order; for the rest, half of the power losses cut history at one moment, as
  the journals of ext4 and XFS do, and half lose any subset, as Btrfs's log tree may.  An inode number that is used
  again is shared with the inode before it.
* A synced directory has all names that it had; what these depend on is durable, too.  A synced file has its data, size
  and creation; after fsync also its other names.  POSIX promises less of a synced file, but all three filesystems keep
  the name of what fsync was called on: it is in the same transaction, or logged with the inode.  The real ones make
  more durable with every sync; `commit` is that, when fate chooses.
* **A failed sync** drops what was dirty: it stays in the page cache and is what reads return, but counts as clean, and
  no later sync brings it to the medium until it is written again.

Directories themselves are durable as soon as they are made; the rename of one is a change of all names below it, and
whole or undone like every other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.inventory.identity import generation
from vmfs_stub.mount import entries, syscalls
from vmfs_stub.primary import durable_map
from vmfs_stub.primary.files import punch_hole, rename_new, sync_directory, sync_filesystem, write_fully
from vmfs_stub.primary.identity import InodeIdentity, inode_identity
from vmfs_stub.primary.record import decode_record, encode_record

BLOCK = 4096
SYNCS: tuple[Callable[..., Any], ...] = (os.fdatasync, os.fsync)
DIRECTORY_SYNCS: tuple[Callable[..., Any], ...] = (sync_directory, entries.sync_directory)
ALL_SYNCS = (*SYNCS, *DIRECTORY_SYNCS, sync_filesystem)
"""Calls that need not really be made."""


class Key(NamedTuple):
    """One inode for as long as it lives; the file handle tells it from another one of the same number."""

    ino: int
    handle: str


@dataclass
class _Inode:
    """What of one inode is certain to be on the medium; ``dropped`` are blocks that a failed sync left behind, as they
    were then; ``held`` is an O_PATH descriptor once it has lost its last name."""

    content: bytes = b""
    record: bytes | None = None
    identity: InodeIdentity | None = None
    dropped: dict[int, bytes] = field(default_factory=dict)
    held: int = -1


@dataclass(frozen=True)
class _Change:
    """One operation on names: what each is from then on, the inodes that it concerns, and whether it makes one.

    ``directory`` is what a renamed directory was called, and is.
    """

    names: dict[Path, Key | None]
    inodes: frozenset[int]
    creates: bool = False
    directory: tuple[Path, Path] | None = None

    @property
    def parts(self) -> Iterable[Path]:
        """The names that the operation itself is about."""
        return self.names if self.directory is None else self.directory

    def meets(self, names: set[Path], inodes: set[int]) -> bool:
        return not names.isdisjoint(self.names) or not inodes.isdisjoint(self.inodes)


class Medium:
    """The medium below one backing directory."""

    def __init__(self, backing: Path) -> None:
        self._backing = backing
        self._inodes: dict[Key, _Inode] = {}
        self._names: dict[Path, Key] = {}
        """What is certain to be there."""
        self._changes: list[_Change] = []
        """What is not certain yet, in the order in which it was done."""
        self._lock = threading.RLock()

    # Being told

    def calling(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Change | None:
        """A call is about to be made; what it does to names goes to `called` when it was."""
        change = self._change(function, args, kwargs)
        if change is not None:
            with self._lock:
                stays = set(change.names.values())
                for path in change.names:
                    old = key_of(path)
                    if old is not None and old not in stays:
                        self._hold_if_last(path, old)
        return change

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], change: _Change | None) -> None:
        """The call was made."""
        with self._lock:
            is_sync = function in SYNCS
            if is_sync and stat.S_ISREG(os.fstat(args[0]).st_mode):
                self._sync_file(args[0], is_whole=function is os.fsync)
            elif is_sync or function in DIRECTORY_SYNCS:
                self._sync_directory(args[0])
            elif function is sync_filesystem:
                self.commit(with_data=True)
            elif change is not None:
                self._note_change(change)

    def note(self, path: Path) -> None:
        """This file and its name are on the medium now."""
        with self._lock, _opened(path) as fd:
            self._make_durable(lambda change: path in change.names)
            self._names[path] = key_of_fd(fd)
            self._note(fd, is_whole=True)

    def drop_dirty(self, fd: int) -> None:
        """A sync of this file failed: what was dirty will not be written."""
        with self._lock:
            inode = self._inode(fd)
            now = os.pread(fd, os.fstat(fd).st_size, 0)
            for at in _differing(inode.content, now):
                inode.dropped[at] = now[at : at + BLOCK]

    def held(self) -> set[int]:
        """Descriptors that are open for files that are not quite gone."""
        with self._lock:
            return {inode.held for inode in self._inodes.values() if inode.held >= 0}

    # What happens by itself

    def commit(self, *, with_data: bool = False) -> None:
        """The journal is written: names and records are durable; ``with_data`` as by syncfs also all else."""
        with self._lock:
            self._make_durable(lambda change: True)
            for path in self._files():
                if with_data:
                    with _opened_gently(path) as fd:
                        self._note(fd, is_whole=True)
                elif (key := key_of(path)) in self._inodes:
                    self._inodes[key].record = _record(path)

    def write_back(self, chosen: random.Random) -> None:
        """The kernel writes some blocks of some file."""
        with self._lock:
            path = chosen.choice(self._files())
            with _opened(path) as fd:
                inode = self._inode(fd)
                now, kept = os.pread(fd, os.fstat(fd).st_size, 0), bytearray(inode.content)
                for at in _differing(inode.content, now[: len(kept)]):
                    if chosen.random() < 0.5 and inode.dropped.get(at) != now[at : at + BLOCK]:
                        part = now[at : at + BLOCK]
                        kept[at : at + len(part)] = part
                inode.content = bytes(kept)

    def lose_power(self, chosen: random.Random) -> dict[Key, Key]:
        """Take back some of what is not durable.  Returns what inodes are now that had to be made again."""
        with self._lock:
            names = dict(self._names)
            kept = _kept(self._changes, chosen)
            for change in kept:
                _apply(change, names)
            for change in reversed([change for change in self._changes if change not in kept]):
                if change.directory is not None:
                    old, new = change.directory
                    old.parent.mkdir(parents=True, exist_ok=True)
                    new.rename(old)
            renumbered = self._put_names(names)
            for path in self._files():
                with _opened(path) as fd:
                    self._roll_back(fd, chosen)
            self._forget_all()
            for path in self._files():
                self.note(path)
            return renumbered

    # Names

    def _change(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Change | None:
        """What a call does to names of regular files in the backing directory, if it does."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, Path):
            change = _unlinked(owner) if function == owner.unlink else None
        elif function is os.unlink:
            change = _unlinked(_path(kwargs.get("dir_fd"), args[0]))
        elif function is os.link:
            path = _path(kwargs.get("dst_dir_fd"), args[1])
            change = _linked(args[0], path) if self._backing in path.parents else None
        elif function is os.rename:
            change = _renamed(Path(args[0]), Path(args[1]), exchanges=False)
        elif function is syscalls.rename:
            old, new = _path(args[0], args[1]), _path(args[2], args[3])
            change = _renamed(old, new, exchanges=kwargs.get("flags") == syscalls.RENAME_EXCHANGE)
        elif function is rename_new:
            change = _renamed_new(_path(args[0], args[1]), _path(args[2], args[3]))
        elif function is entries.make_node and stat.S_ISREG(args[2]):
            change = _created(_path(args[0], args[1]))
        elif function is os.open and args[1] & os.O_CREAT:
            path = _path(kwargs.get("dir_fd"), args[0])
            change = None if path.exists() else _created(path)
        else:
            change = None
        inside = change is not None and all(self._backing in path.parents for path in change.names)
        return change if inside else None

    def _note_change(self, change: _Change) -> None:
        if change.creates:
            path = next(iter(change.names))
            key = key_of(path)
            if key is None:
                return
            inode = self._inodes[key] = _Inode()
            with contextlib.suppress(OSError), _opened(path) as fd:
                inode.identity = inode_identity(fd)
            change = _Change({path: key}, frozenset([key.ino]), creates=True)
        self._changes.append(change)

    def _hold_if_last(self, path: Path, key: Key) -> None:
        inode = self._inodes.get(key)
        if inode is not None and inode.held < 0 and path.stat().st_nlink == 1:
            inode.held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _make_durable(self, wanted: Callable[[_Change], bool]) -> None:
        """Make changes durable, and those before on which they depend."""
        durable: list[_Change] = []
        names: set[Path] = set()
        inodes: set[int] = set()
        for change in reversed(self._changes):
            if wanted(change) or change.meets(names, inodes):
                durable.append(change)
                names.update(change.names)
                inodes.update(change.inodes)
        for change in reversed(durable):
            _apply(change, self._names)
        self._changes = [change for change in self._changes if not any(change is done for done in durable)]
        self._forget_unneeded()

    def _forget_unneeded(self) -> None:
        """An inode that has durably lost its last name is gone, and its number free."""
        needed = set(self._names.values())
        for change in self._changes:
            needed.update(key for key in change.names.values() if key is not None)
        for key, inode in list(self._inodes.items()):
            if inode.held >= 0 and key not in needed:
                os.close(inode.held)
                del self._inodes[key]

    def _forget_all(self) -> None:
        for inode in self._inodes.values():
            if inode.held >= 0:
                os.close(inode.held)
        self._inodes.clear()
        self._names.clear()
        self._changes.clear()

    close = _forget_all

    def _put_names(self, names: dict[Path, Key]) -> dict[Key, Key]:
        """Give the directory these names.  A file that is gone is made again, and what speaks of its inode follows."""
        renumbered: dict[Key, Key] = {}
        there = {key: path for path in self._files() if (key := key_of(path)) is not None}
        spare = self._backing.parent / "spare"
        spare.mkdir()
        for number, key in enumerate(set(names.values())):
            if key in there:
                os.link(there[key], spare / str(number))
            elif (inode := self._inodes.get(key)) is not None and inode.held >= 0:
                made = self._make_again(spare / str(number), inode)
                renumbered[key] = made
                self._inodes[made] = inode
                os.close(inode.held)
                inode.held = -1
            else:
                continue
            there[key] = spare / str(number)
        for path in self._files():
            if names.get(path) != key_of(path):
                path.unlink()
        for path, key in names.items():
            if key in there and not path.exists():
                path.parent.mkdir(exist_ok=True)  # it was removed, and that is undone, too
                os.link(there[key], path)
        for path in spare.iterdir():
            path.unlink()
        spare.rmdir()
        return renumbered

    def _make_again(self, path: Path, inode: _Inode) -> Key:
        with _opened(Path(f"/proc/self/fd/{inode.held}")) as gone:
            content, record, st = os.pread(gone, os.fstat(gone).st_size, 0), _record(gone), os.fstat(gone)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IMODE(st.st_mode))
        try:
            identity, before = inode_identity(fd), inode.identity
            _write_sparse(fd, content)
            if before is not None:
                record, inode.record = (_with_identity(each, before, identity) for each in (record, inode.record))
                self._renumber_maps(before, identity)
            if record is not None:
                os.setxattr(fd, PLACEHOLDER_XATTR, record)
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            inode.identity = identity
            return key_of_fd(fd)
        finally:
            os.close(fd)

    def _renumber_maps(self, before: InodeIdentity, now: InodeIdentity) -> None:
        for path in self._files():
            if path.suffix in (".map", durable_map.NEW_SUFFIX):
                with _opened(path) as fd:
                    inode = self._inode(fd)
                    content = bytearray(inode.content)
                    for at in (0, durable_map.UNIT):
                        write_fully(fd, _header_with_identity(os.pread(fd, durable_map.UNIT, at), before, now), at)
                        content[at : at + durable_map.UNIT] = _header_with_identity(
                            inode.content[at : at + durable_map.UNIT], before, now
                        )
                    inode.content = bytes(content)

    def _files(self) -> list[Path]:
        """Every file that is there, in an order that does not depend on the filesystem."""
        return sorted(path for path in self._backing.rglob("*") if path.is_file() and not path.is_symlink())

    # Inodes

    def _inode(self, fd: int) -> _Inode:
        key = key_of_fd(fd)
        found = self._inodes.get(key)
        if found is None:
            found = self._inodes[key] = _Inode(identity=inode_identity(fd))
        return found

    def _sync_file(self, fd: int, *, is_whole: bool) -> None:
        self._note(fd, is_whole=is_whole)
        ino = os.fstat(fd).st_ino
        # Not the name of a directory above it.
        self._make_durable(
            lambda change: ino in change.inodes and change.directory is None and (is_whole or change.creates)
        )

    def _sync_directory(self, fd_or_path: int | Path) -> None:
        path = Path(f"/proc/self/fd/{fd_or_path}").readlink() if isinstance(fd_or_path, int) else fd_or_path
        self._make_durable(lambda change: any(name.parent == path for name in change.parts))

    def _note(self, fd: int, *, is_whole: bool) -> None:
        inode = self._inode(fd)
        before, now = inode.content, os.pread(fd, os.fstat(fd).st_size, 0)
        inode.content = now
        if inode.dropped:
            content = bytearray(now)
            for at, dropped in list(inode.dropped.items()):
                if now[at : at + BLOCK] == dropped:
                    content[at : at + len(dropped)] = before[at : at + BLOCK].ljust(len(dropped), b"\0")[: len(dropped)]
                else:
                    del inode.dropped[at]
            inode.content = bytes(content)
        if is_whole:
            inode.record = _record(fd)

    def _roll_back(self, fd: int, chosen: random.Random) -> None:
        inode = self._inode(fd)
        sizes = [len(inode.content), os.fstat(fd).st_size]
        if sizes[0] // BLOCK < sizes[1] // BLOCK:
            sizes.append(chosen.randint(sizes[0] // BLOCK + 1, sizes[1] // BLOCK) * BLOCK)
        size = chosen.choice(sizes)
        if size != sizes[1]:
            os.ftruncate(fd, size)  # which changes times also when it changes nothing else
        now = os.pread(fd, size, 0)
        bias = chosen.random()
        for at in _differing(inode.content, now):
            if at < size and (chosen.random() < bias or at in inode.dropped):
                old = inode.content[at : at + BLOCK].ljust(BLOCK, b"\0")[: size - at]
                if any(old):
                    os.pwrite(fd, old, at)
                else:
                    punch_hole(fd, at, BLOCK)
        if _record(fd) != inode.record and chosen.random() < 0.5:
            if inode.record is None:
                os.removexattr(fd, PLACEHOLDER_XATTR)
            else:
                os.setxattr(fd, PLACEHOLDER_XATTR, inode.record)


# Changes of names


def _unlinked(path: Path) -> _Change | None:
    key = key_of(path)
    return None if key is None else _Change({path: None}, frozenset([key.ino]))


def _linked(source: str, path: Path) -> _Change | None:
    with _path_opened(Path(source), follow=True) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        key = key_of_fd(fd)
    return _Change({path: key}, frozenset([key.ino]))


def _created(path: Path) -> _Change:
    return _Change({path: None}, frozenset(), creates=True)


def _renamed(old: Path, new: Path, *, exchanges: bool) -> _Change | None:
    source, target = key_of(old), key_of(new)
    if source is None or source == target:
        return None
    inodes = frozenset(key.ino for key in (source, target) if key is not None)
    return _Change({old: target if exchanges else None, new: source}, inodes)


def _renamed_new(old: Path, new: Path) -> _Change | None:
    """One that replaces nothing, of a file or of a directory with all that is in it."""
    if os.path.lexists(new) or not old.is_dir():
        return _renamed(old, new, exchanges=False)
    below = {path: key for path in old.rglob("*") if (key := key_of(path)) is not None}
    names: dict[Path, Key | None] = {
        **dict.fromkeys(below),
        **{new / path.relative_to(old): key for path, key in below.items()},
    }
    return _Change(names, frozenset(key.ino for key in below.values()), directory=(old, new))


def _apply(change: _Change, names: dict[Path, Key]) -> None:
    for path, key in change.names.items():
        if key is None:
            names.pop(path, None)
        else:
            names[path] = key


def _kept(changes: list[_Change], chosen: random.Random) -> list[_Change]:
    """What reached the medium: all before one moment, or any subset in which nothing precedes what it depends on."""
    if chosen.random() < 0.5:
        return changes[: chosen.randint(0, len(changes))]
    kept: list[_Change] = []
    names: set[Path] = set()
    inodes: set[int] = set()
    for change in changes:
        if chosen.random() < 0.5 or change.meets(names, inodes):
            names.update(change.names)
            inodes.update(change.inodes)
        else:
            kept.append(change)
    return kept


# Small things


def _path(dir_fd: int | None, name: bytes | str | Path) -> Path:
    path = Path(os.fsdecode(name))
    return path if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_gently(path: Path) -> Iterator[int]:
    """By a descriptor that this process has already, if it has one: to open the file anew would break a lease."""
    fd = _own_descriptor(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _own_descriptor(path: Path) -> int:
    """A copy of one; a new one where there is none.  The copy is looked at again: threads close and open meanwhile."""
    key = key_of(path)
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names alone
        try:
            fd = os.dup(int(number))
        except OSError:
            continue
        is_writable = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_PATH | os.O_ACCMODE) == os.O_RDWR
        if is_writable and key is not None and os.fstat(fd).st_ino == key.ino and key_of_fd(fd) == key:
            return fd
        os.close(fd)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


@contextlib.contextmanager
def _path_opened(path: Path, *, follow: bool = False) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        yield fd
    finally:
        os.close(fd)


def key_of(path: Path) -> Key | None:
    """The regular file of that name; opens nothing, since that would break a lease."""
    try:
        with _path_opened(path) as fd:
            return key_of_fd(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except FileNotFoundError:
        return None


def key_of_fd(fd: int) -> Key:
    return Key(os.fstat(fd).st_ino, generation(fd))


def _record(file: int | Path) -> bytes | None:
    try:
        return os.getxattr(file, PLACEHOLDER_XATTR)
    except OSError:
        return None


def _differing(old: bytes, new: bytes) -> list[int]:
    """Offsets of the blocks that differ; what one of them lacks is zeros."""
    if old == new:
        return []
    size = max(len(old), len(new))
    old, new = old.ljust(size, b"\0"), new.ljust(size, b"\0")
    return [at for at in range(0, size, BLOCK) if old[at : at + BLOCK] != new[at : at + BLOCK]]


def _write_sparse(fd: int, content: bytes) -> None:
    os.ftruncate(fd, len(content))
    for at in range(0, len(content), BLOCK):
        part = content[at : at + BLOCK]
        if any(part):
            os.pwrite(fd, part, at)


def _with_identity(raw: bytes | None, before: InodeIdentity, now: InodeIdentity) -> bytes | None:
    if raw is None:
        return None
    try:
        record = decode_record(raw, label="")
    except VmfsStubError:
        return raw
    if record.identity != before:
        return raw  # a copy's
    return encode_record(replace(record, **asdict(now)))


def _header_with_identity(raw: bytes, before: InodeIdentity, now: InodeIdentity) -> bytes:
    found = durable_map._decode_header(raw, "")
    if found is None or found[1].identity != before:
        return raw
    return durable_map._encode_header(replace(found[1], identity=now), found[0])
