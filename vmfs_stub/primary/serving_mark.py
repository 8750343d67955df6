"""The serving mark: by which a daemon knows that no other host serves the same backing directory.

A flock excludes processes of one host, and on shared storage perhaps no others.  Whoever serves therefore keeps
`.vmfs-stub/serving`: who it is, and a counter that it moves on.  A start that finds the mark of another host watches it
on its own clock: while the counter moves it is refused, and once it has stood still for `Pace.still_s` the mark is
replaced.  No times of different clocks are compared.

Invariants, which need a filesystem that shows all hosts the same names and bytes at any time:

* a mark is made with its session in it, under a name that was free, and is written by its own session alone; so two
  starts never both succeed, and a session that wakes up late writes into a file that has lost its name;
* a session that could not renew its mark for `Pace.held_s` makes no further call on the backing filesystem (`OwnCalls`)
  until it has; `held_s` is well below `still_s`, so it had stopped before anybody replaced its mark;
* it counts as renewed from before the write, and only if the mark still has its name after it.

Not excluded: a call that is in the kernel already, and the moments until a machine whose clocks stood still together
with its processes (a paused or restored VM) looks again, at most `Pace.interval_s`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from vmfs_stub.core.errors import DatastoreLocked, PrimaryIOError
from vmfs_stub.core.names import RESERVE_FILE
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.core.times import time_text
from vmfs_stub.primary.envelope import Body, Damaged, NewerVersion, seal, unseal
from vmfs_stub.primary.files import FileCalls, write_fully
from vmfs_stub.primary.identity import boot_id
from vmfs_stub.primary.reserve import Reserve

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

MARK: Final = "serving"
MAGIC: Final = b"VSTBSRV\0"
VERSION: Final = 1
SPARE: Final = "serving.spare"
"""What an orderly end leaves, so that the next start needs no room."""
SINCE_S_MAX: Final = 10**11
"""Unix time in the year 5138: what is later is damage."""
OVER_SUFFIX: Final = ".over"
_ALWAYS_MADE: Final = ("read.", "hydrate.space")
"""How sites begin of calls that change nothing and are made on the event loop, where nothing is waited for."""
_SIZE: Final = 4096
"""Bytes of the file: one block, which it has for good."""
_MACHINE_ID: Final = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds: between two renewals; after how long without one the holder stops; how long others watch."""

    interval_s: float = 5.0
    held_s: float = 15.0
    still_s: float = 20.0


PACE: Final = Pace()


@dataclass(frozen=True, slots=True)
class Machine:
    """A host in one boot: the id that its system has (empty where there is none), its boot's, and its name."""

    machine_id: str
    boot_id: str
    host: str

    @classmethod
    def this(cls) -> Machine:
        """The machine that this process runs on."""
        machine_id = ""
        with suppress(OSError):
            machine_id = _MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()[:255]
        return cls(machine_id, boot_id(), socket.gethostname()[:255])


@dataclass(frozen=True, slots=True)
class Mark:
    """What a serving mark says: who serves, in which session (id), since when (Unix time, for people), the counter."""

    machine: Machine
    session: str
    since_s: int
    counter: int = 0

    def __str__(self) -> str:
        return f"host {self.machine.host!r} (since {time_text(self.since_s)} by its clock)"


def encode_mark(mark: Mark) -> bytes:
    """The bytes of a mark, without the zeros that fill up its file."""
    body = {
        "machine": mark.machine.machine_id,
        "boot_id": mark.machine.boot_id,
        "host": mark.machine.host,
        "session": mark.session,
        "since_s": mark.since_s,
        "counter": mark.counter,
    }
    return seal(MAGIC, VERSION, body)


def decode_mark(raw: bytes) -> Mark:
    """Parse a mark.  Raises Damaged, NewerVersion."""
    body = Body(unseal(raw, magic=MAGIC, version=VERSION))
    machine = Machine(body.text("machine"), body.identifier("boot_id"), body.text("host"))
    session, since_s = body.identifier("session"), body.integer("since_s", high=SINCE_S_MAX)
    mark = Mark(machine, session, since_s, body.integer("counter"))
    body.finish()
    return mark


def mark_in(private_dir: Path) -> Mark | None:
    """The mark that is there; None when there is none that can be read.  Raises OSError."""
    raw = _read(PLAIN, private_dir / MARK)
    return None if raw is None else _decoded(raw)


class ServingMark:
    """The mark of this process's session: taken at the start, renewed by `kept`, removed by `end`."""

    def __init__(self, mark: Mark, directory_fd: int, *, backing: Path, pace: Pace, files: FileCalls) -> None:
        """For `take` alone; owns ``directory_fd``."""
        self._mark = mark
        self._backing = backing
        self._pace = pace
        self._files = files
        self._directory_fd = directory_fd
        self._path = _in(directory_fd)
        self._written = self._writing = _block(mark)
        self._held_until_s = 0.0
        self._tries = 0
        self._tried = threading.Condition()
        self._wanted = threading.Event()
        self._ended = False

    @classmethod
    def take(
        cls, backing: Path, private_dir: Path, *, machine: Machine, pace: Pace = PACE, files: FileCalls = PLAIN
    ) -> ServingMark:
        """Make the mark in the private directory; the datastore's flock is held already.

        At once where there is none, or one that this machine left in this boot, which the flock shows to be over; else
        after watching it.  Raises DatastoreLocked, PrimaryIOError.
        """
        try:
            directory_fd = files.call(
                "serving.directory", os.open, private_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
        except OSError as exc:
            raise _failed(backing, exc) from exc
        try:
            mark = Mark(machine, secrets.token_hex(16), int(time.time()))
            self = cls(mark, directory_fd, backing=backing, pace=pace, files=files)
            self._take()
        except BaseException as exc:
            os.close(directory_fd)
            if isinstance(exc, OSError):
                raise _failed(backing, exc) from exc
            raise
        return self

    def _take(self) -> None:
        found = _read(self._files, self._path)
        if found is None:
            self._put_back()
            found = _read(self._files, self._path)
        is_over = found is not None and self._is_over(found)
        if found is not None and not is_over:
            found = self._watch(found)
        self._clean()
        if found is not None:
            self._set_aside(found, is_over=is_over)
        new = self._path.with_name(f"{MARK}.{self._mark.session}")
        reserve = Reserve(self._path.with_name(RESERVE_FILE))
        try:
            reserve.lend(self._files, lambda: self._write_new(new))
            self._held_until_s = _now_s() + self._pace.held_s
            self._files.call("serving.link", os.link, new, self._path)
        except (FileExistsError, FileNotFoundError) as exc:  # the latter: a start elsewhere has tidied up
            now = _read(self._files, self._path)
            if now != self._written:
                raise self._refused(now, "has just begun to serve") from exc
        finally:
            with suppress(OSError):
                self._files.call("serving.clean", os.unlink, new)

    def _put_back(self) -> None:
        """Give a mark its name again that a start has set aside which was cut short: somebody may serve by it."""
        for name in self._files.call("serving.put_back", os.listdir, self._directory_fd):
            if name.startswith(f"{MARK}.") and name.endswith(OVER_SUFFIX):
                with suppress(FileExistsError, FileNotFoundError):
                    self._files.call("serving.put_back", os.link, self._path.with_name(name), self._path)

    def _write_new(self, path: Path) -> None:
        # Not synced: after a power loss nobody serves, and what is left of it stands still.
        with suppress(FileNotFoundError):
            self._files.call("serving.create", os.rename, self._path.with_name(SPARE), path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self._files.call("serving.create", os.open, path, flags, 0o600)
        try:
            self._files.call("serving.create", write_fully, fd, self._written, 0)
        finally:
            os.close(fd)

    def _is_over(self, found: bytes) -> bool:
        mark, ours = _decoded(found), self._mark.machine
        return mark is not None and (mark.machine.machine_id, mark.machine.boot_id) == (ours.machine_id, ours.boot_id)

    def _watch(self, found: bytes) -> bytes | None:
        """Wait until the mark has stood still for long enough; what it says, or None when it goes.  DatastoreLocked."""
        log.warning("%s serves %s, or did: watching for %g s", _who(found), self._backing, self._pace.still_s)
        end_s = _now_s() + self._pace.still_s
        is_last = False
        while not is_last:
            time.sleep(self._pace.interval_s / 10)
            is_last = _now_s() >= end_s  # before the look, which is then one after the end
            now = _read(self._files, self._path)
            if now is None:
                log.warning("it has ended")
                return None
            if now != found:
                raise self._refused(now, "serves")
        log.warning("%s has not served it for %g s: taking over", _who(found), self._pace.still_s)
        return found

    def _clean(self) -> None:
        """Remove what starts left that were cut short; one that is under way elsewhere is refused by that."""
        for name in self._files.call("serving.list", os.listdir, self._directory_fd):
            if name.startswith(f"{MARK}.") and name != SPARE:
                with suppress(FileNotFoundError):
                    self._files.call("serving.clean", os.unlink, self._path.with_name(name))

    def _set_aside(self, found: bytes, *, is_over: bool) -> None:
        """Take the name from the mark that was found; DatastoreLocked when it is not that one any more.

        One that is over for certain (``is_over``) becomes the spare one; into any other its holder may yet write.
        """
        aside = self._path.with_name(f"{MARK}.{self._mark.session}{OVER_SUFFIX}")
        try:
            self._files.call("serving.set_aside", os.rename, self._path, aside)
        except FileNotFoundError:
            return
        now = _read(self._files, aside)
        if now != found:
            with suppress(OSError):
                self._files.call("serving.link", os.link, aside, self._path)
        if now == found and is_over:
            self._files.call("serving.set_aside", os.rename, aside, aside.with_name(SPARE))
            return
        self._files.call("serving.clean", os.unlink, aside)
        if now != found:
            raise self._refused(now, "serves")

    def _refused(self, found: bytes | None, does: str) -> DatastoreLocked:
        return DatastoreLocked(f"{_who(found)} {does} {self._backing}; `vmfs-stub unmount` there ends it")

    # While it serves

    @property
    def is_overdue(self) -> bool:
        """Whether the mark was not renewed for so long that another host may be about to replace it."""
        return _now_s() >= self._held_until_s

    def renew(self) -> bool:
        """Move the counter on; False when the mark is not this session's any more.  Raises OSError."""
        began_s = _now_s()
        try:
            fd = self._files.call("serving.renew", os.open, self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            if self._files.call("serving.renew", os.pread, fd, _SIZE, 0) not in (self._written, self._writing):
                return False
            self._mark = replace(self._mark, counter=self._mark.counter + 1)
            self._writing = _block(self._mark)
            self._files.call("serving.renew", write_fully, fd, self._writing, 0)
            self._written = self._writing
            # Whoever replaces a mark takes its name first, and looks at what it says then.
            named = self._files.call("serving.renew", os.stat, self._path, follow_symlinks=False)
            if not os.path.samestat(named, os.fstat(fd)):
                return False
        except FileNotFoundError:
            return False
        finally:
            os.close(fd)
        self._held_until_s = began_s + self._pace.held_s
        return True

    @contextmanager
    def kept(self, on_lost: Callable[[str], None]) -> Iterator[None]:
        """Renew it within the block, then end it.

        ``on_lost`` is called, in a thread of its own, with what to tell when another session has replaced the mark.
        """
        keeper = threading.Thread(target=self._keep, args=(on_lost,), name="serving mark", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            self._ended = True
            self._wanted.set()
            keeper.join(self._pace.interval_s)
            if not keeper.is_alive():  # else the filesystem hangs, and the mark stays
                self.end()

    def _keep(self, on_lost: Callable[[str], None]) -> None:
        failed = False
        while True:
            self._wanted.wait(self._pace.interval_s)
            self._wanted.clear()
            if self._ended:
                return
            try:
                if not self.renew():
                    self._ended, self._held_until_s = True, 0.0
                    who = _who(_read(PLAIN, self._path))
                    on_lost(
                        f"{who} has replaced this daemon, which stood still for too long, and serves {self._backing}"
                    )
                    return
                if failed:
                    log.warning("the serving mark of %s is renewed again", self._backing)
                failed = False
            except OSError as exc:
                if not failed:
                    log.warning(
                        "the serving mark of %s cannot be renewed (%s): after %g s nothing is written there any more",
                        self._backing, exc.strerror, self._pace.held_s,
                    )  # fmt: skip
                failed = True
            with self._tried:
                self._tries += 1
                self._tried.notify_all()

    def wait_held(self) -> None:
        """Wait while an overdue renewal is under way, which takes as long as any call there; raises OSError (EIO)."""
        with self._tried:
            tries = self._tries
            while self.is_overdue:
                if self._ended or self._tries > tries + 1:  # one that began after this call
                    raise OSError(errno.EIO, "the backing directory may be served by another host by now")
                self._wanted.set()
                self._tried.wait(self._pace.interval_s)

    def end(self) -> None:
        """Take it away, if it is still this session's; from then on it is overdue."""
        was_overdue = self.is_overdue
        self._ended, self._held_until_s = True, 0.0
        try:
            if not was_overdue and _read(self._files, self._path) in (self._written, self._writing):
                self._files.call("serving.end", os.rename, self._path, self._path.with_name(SPARE))
        except OSError as exc:
            log.warning("the serving mark of %s stays: %s", self._backing, exc.strerror)
        finally:
            os.close(self._directory_fd)


class OwnCalls(FileCalls):
    """File calls of a daemon whose mark this is: made only while no other host can have begun to serve."""

    def __init__(self, mark: ServingMark) -> None:
        self._mark = mark

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As described in the base class; raises OSError (EIO) instead when the mark is overdue and stays so.

        Guests' reads are made, and looks at free space: they change nothing, and the event loop makes them.
        """
        if self._mark.is_overdue and not site.startswith(_ALWAYS_MADE):
            self._mark.wait_held()
        return function(*args, **kwargs)


def _block(mark: Mark) -> bytes:
    return encode_mark(mark).ljust(_SIZE, b"\0")


def _in(directory_fd: int) -> Path:
    """The mark's path, which leads there whatever becomes of the directory's names and mounts."""
    return Path(f"/proc/self/fd/{directory_fd}") / MARK


def _read(files: FileCalls, path: Path) -> bytes | None:
    try:
        fd = files.call("serving.read", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return files.call("serving.read", os.pread, fd, _SIZE, 0)
    finally:
        os.close(fd)


def _decoded(raw: bytes) -> Mark | None:
    try:
        return decode_mark(raw)
    except (Damaged, NewerVersion):
        return None


def _who(raw: bytes | None) -> str:
    mark = None if raw is None else _decoded(raw)
    return "another host" if mark is None else str(mark)


def _failed(backing: Path, exc: OSError) -> PrimaryIOError:
    return PrimaryIOError(
        f"cannot tell whether another host serves {backing}: {exc.strerror}; is the backing filesystem mounted, "
        "writable and whole, and does it have room?"
    )


def _now_s() -> float:
    """A clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
