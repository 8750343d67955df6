"""The mark by which a daemon knows that no other host serves its backing directory."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from vmfs_stub.core.errors import DatastoreLocked, PrimaryIOError
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.primary.serving_mark import (
    MARK,
    SPARE,
    Machine,
    Mark,
    OwnCalls,
    Pace,
    ServingMark,
    decode_mark,
    encode_mark,
    mark_in,
)
from vmfs_stub.services.datastore_lock import served_elsewhere

OURS = Machine("ours", "aa" * 16, "host1")
OTHERS = Machine("others", "bb" * 16, "host2")
REBOOTED = Machine("ours", "cc" * 16, "host1")
PACE = Pace(interval_s=0.05, held_s=0.3, still_s=0.5)
FAR = Pace(interval_s=60, held_s=180, still_s=240)


def take(place: Path, machine: Machine = OURS, *, pace: Pace = PACE, files: FileCalls = PLAIN) -> ServingMark:
    return ServingMark.take(place, place, machine=machine, pace=pace, files=files)


@contextmanager
def taken(
    place: Path, machine: Machine = OURS, *, pace: Pace = PACE, files: FileCalls = PLAIN
) -> Iterator[ServingMark]:
    mark = take(place, machine, pace=pace, files=files)
    try:
        yield mark
    finally:
        mark.end()


def leave_mark(place: Path, machine: Machine) -> None:
    (place / MARK).write_bytes(encode_mark(Mark(machine, "dd" * 16, 1_700_000_000, 7)))


class SteppedIn(FileCalls):
    """Calls ``then`` right before the ``number``-th call at ``site`` is made."""

    def __init__(self, site: str, then: object, *, number: int = 1) -> None:
        self._site, self._then, self._number = site, then, number

    def call(self, site, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        if site == self._site:
            self._number -= 1
            if self._number == 0:
                self._then()  # type: ignore[operator]
        return function(*args, **kwargs)


def test_a_clean_start_takes_no_time_and_an_end_leaves_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    with taken(tmp_path, pace=FAR) as mark:
        assert time.monotonic() - began < 5
        found = mark_in(tmp_path)
        assert found is not None
        assert (found.machine, found.counter) == (OURS, 0)
        assert mark.renew()
        assert decode_mark((tmp_path / MARK).read_bytes()).counter == 1
    assert [path.name for path in tmp_path.iterdir()] == [SPARE]
    with taken(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_what_was_killed_in_this_boot_is_replaced_at_once(tmp_path: Path) -> None:
    leave_mark(tmp_path, OURS)
    left = (tmp_path / MARK).stat()
    began = time.monotonic()
    with taken(tmp_path, pace=FAR):
        assert time.monotonic() - began < 5
        assert [path.name for path in tmp_path.iterdir()] == [MARK]
        assert os.path.samestat(left, (tmp_path / MARK).stat()), "which needs no room"


@pytest.mark.parametrize("content", [OTHERS, REBOOTED, None], ids=["other host", "other boot", "unreadable"])
def test_what_stands_still_is_replaced_after_a_while(
    tmp_path: Path, content: Machine | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        (tmp_path / MARK).write_bytes(b"")  # after a power loss, say
    else:
        leave_mark(tmp_path, content)
    began = time.monotonic()
    with taken(tmp_path) as mark:
        assert time.monotonic() - began >= PACE.still_s
        assert not mark.is_overdue
        assert decode_mark((tmp_path / MARK).read_bytes()).machine == OURS
    assert "taking over" in caplog.text


def test_one_that_moves_is_refused_and_named(tmp_path: Path) -> None:
    lost: list[str] = []
    with take(tmp_path, OTHERS).kept(lost.append), pytest.raises(DatastoreLocked, match=r"host 'host2' \(since 20"):
        take(tmp_path)
    assert lost == []
    assert [path.name for path in tmp_path.iterdir()] == [SPARE]


def test_one_that_ends_while_it_is_watched_is_followed(tmp_path: Path) -> None:
    leave_mark(tmp_path, OTHERS)
    threading.Timer(0.1, (tmp_path / MARK).unlink).start()
    with taken(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [MARK]


@pytest.mark.parametrize("site", ["serving.list", "serving.create", "serving.link"])
def test_of_two_starts_that_meet_one_is_refused(tmp_path: Path, site: str) -> None:
    with ExitStack() as stack:
        files = SteppedIn(site, lambda: stack.enter_context(taken(tmp_path, OTHERS)))
        with pytest.raises(DatastoreLocked, match="host2"):
            take(tmp_path, files=files)
        assert decode_mark((tmp_path / MARK).read_bytes()).machine == OTHERS


def test_of_two_that_take_over_at_once_at_most_one_goes_on(tmp_path: Path) -> None:
    """Whoever takes the name from the other's fresh mark notices, and gives it back."""
    leave_mark(tmp_path, REBOOTED)
    lost: list[bool] = []
    with ExitStack() as stack:

        def other() -> None:
            mark = stack.enter_context(taken(tmp_path, OTHERS))
            stack.callback(lambda: lost.append(not mark.renew()))

        with pytest.raises(DatastoreLocked, match="host2"):
            take(tmp_path, files=SteppedIn("serving.set_aside", other))
    assert lost == [False]


def test_one_that_wakes_up_while_it_is_replaced_is_not(tmp_path: Path) -> None:
    """It moved its counter on after the last look, and before its mark lost the name."""
    with taken(tmp_path, OTHERS) as asleep:
        with pytest.raises(DatastoreLocked, match="host2"):
            take(tmp_path, files=SteppedIn("serving.set_aside", asleep.renew))
        assert asleep.renew()


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["open", "read", "write", "look"])
def test_one_that_was_replaced_knows_whenever_it_wakes_up(tmp_path: Path, number: int) -> None:
    successor: list[ServingMark] = []
    files = SteppedIn("serving.renew", lambda: successor.append(take(tmp_path)), number=number)
    asleep = take(tmp_path, OTHERS, files=files)
    assert not asleep.renew()
    assert successor[0].renew(), "and does not disturb who came after it"
    asleep.end()
    assert decode_mark((tmp_path / MARK).read_bytes()).machine == OURS
    successor[0].end()


def test_a_start_that_died_while_it_set_a_mark_aside_ends_nobody(tmp_path: Path) -> None:
    with taken(tmp_path, pace=FAR) as mark:
        (tmp_path / MARK).rename(tmp_path / f"{MARK}.{'ee' * 16}.over")
        renewed = SteppedIn("serving.read", mark.renew, number=4)
        with pytest.raises(DatastoreLocked, match="host1"):
            take(tmp_path, OTHERS, files=renewed)
        assert mark.renew()
        assert not mark.is_overdue


def test_who_was_replaced_is_told_and_calls_nothing_more(tmp_path: Path) -> None:
    lost: list[str] = []
    asleep = take(tmp_path, OTHERS)
    calls = OwnCalls(asleep)
    calls.call("a.b", os.stat, tmp_path)
    time.sleep(PACE.held_s)
    with taken(tmp_path):
        with asleep.kept(lost.append):
            with pytest.raises(OSError, match="another host"):
                calls.call("a.b", os.stat, tmp_path)
            while not lost:
                time.sleep(0.01)
        assert "host 'host1'" in lost[0]
        with pytest.raises(OSError, match="another host"):
            calls.call("a.b", os.stat, tmp_path)


def test_who_stood_still_and_was_not_replaced_goes_on_after_a_renewal(tmp_path: Path) -> None:
    lost: list[str] = []
    mark = take(tmp_path, pace=Pace(interval_s=60, held_s=0.1, still_s=120))
    time.sleep(0.2)
    assert mark.is_overdue
    calls = OwnCalls(mark)
    with mark.kept(lost.append):
        calls.call("a.b", os.stat, tmp_path)
        assert decode_mark((tmp_path / MARK).read_bytes()).counter >= 1
    assert lost == []
    with pytest.raises(OSError, match="another host"):
        calls.call("a.b", os.stat, tmp_path)


def test_calls_wait_as_long_as_a_renewal_hangs_and_fail_when_it_fails(tmp_path: Path) -> None:
    released, hangs = threading.Event(), threading.Event()

    class Broken(FileCalls):
        def call(self, site, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            if site == "serving.renew":
                hangs.set()
                released.wait(10)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*args, **kwargs)

    mark = take(tmp_path, files=Broken())
    calls = OwnCalls(mark)
    outcome: list[OSError] = []

    def call() -> None:
        try:
            calls.call("a.b", os.stat, tmp_path)
        except OSError as exc:
            outcome.append(exc)

    with mark.kept(lambda why: None):
        assert hangs.wait(10)
        time.sleep(PACE.held_s)
        calls.call("read.cached", os.stat, tmp_path)
        calls.call("hydrate.space", os.statvfs, tmp_path)  # which the event loop calls
        waiter = threading.Thread(target=call)
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive()
        released.set()
        waiter.join(10)
    assert [exc.errno for exc in outcome] == [errno.EIO]


def test_a_filesystem_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    class ReadOnly(FileCalls):
        def call(self, site, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            if site == "serving.create":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(*args, **kwargs)

    with pytest.raises(PrimaryIOError, match="Read-only"):
        take(tmp_path, files=ReadOnly())
    assert list(tmp_path.iterdir()) == []


def test_a_full_filesystem_has_room_for_it(tmp_path: Path) -> None:
    (tmp_path / "reserve").write_bytes(bytes(4096))

    class Full(FileCalls):
        def call(self, site, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            if site == "serving.create" and (tmp_path / "reserve").stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

    with taken(tmp_path, files=Full()) as mark:
        assert mark.renew()


def test_from_the_second_start_on_no_more_room_is_needed(tmp_path: Path) -> None:
    with taken(tmp_path) as mark:
        place = (tmp_path / MARK).stat()
        assert place.st_size == 4096
    with taken(tmp_path) as mark:
        assert os.path.samestat(place, (tmp_path / MARK).stat())
        assert mark.renew()
        assert (tmp_path / MARK).stat().st_size == 4096


def test_only_the_marks_of_others_are_told_of(tmp_path: Path) -> None:
    assert served_elsewhere(tmp_path) is None
    leave_mark(tmp_path, Machine.this())
    assert served_elsewhere(tmp_path) is None
    leave_mark(tmp_path, OTHERS)
    assert "host2" in str(served_elsewhere(tmp_path))
