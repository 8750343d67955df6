"""Single files under any operation at any offset, each compared: coming back, resident, and graduating in use.

``scripts/soak fsx`` does the same for as long as one likes.  The exerciser is itself put to the test: a daemon with a
planted fault must be found out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from faulty_daemon import FAULTS
from live_datastore import MIB, LiveDatastore, MakeDatastore

from scripts.lab.file_play import Mismatch
from scripts.lab.soak_fsx import KINDS, SETTINGS, Courses, Kind

SEED = 20
OPERATIONS = 2000
FAULT_OPERATIONS_MAX = 3000
DAEMON = Path(__file__).with_name("faulty_daemon.py")


SMALL_KINDS = (
    Kind(name="hydrating", size=6 * MIB + 1234, round_length=300),
    Kind(name="resident", size=MIB),
    Kind(name="graduating", size=2 * MIB, round_length=200, graduates=True),
)


def courses(datastore: LiveDatastore, kinds: Sequence[Kind] = KINDS) -> Courses:
    return Courses(
        random.Random(SEED),
        mountpoint=datastore.mountpoint,
        backing=datastore.backing,
        client=datastore.client,
        kinds=kinds,
    )


def test_thousands_of_operations_on_each_kind_of_file(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(SETTINGS)
    datastore.start()
    with courses(datastore) as playing:
        for _ in range(OPERATIONS):
            playing.step()
        playing.verify_all()
        hydrating, resident, graduating = playing.all
        print(playing.summary())
    assert hydrating.archives == 3
    assert hydrating.states["recalling"] * 4 > hydrating.states.total()  # else it was hardly what it is to be
    assert set(resident.states) == {"resident"}
    assert (graduating.archives, graduating.graduations) == (4, 6)
    for course in playing.all:
        assert min(play.counts.total() for play in course.plays) > OPERATIONS // 3
        assert all(play.counts[kind.__name__.removeprefix("_")] for play in course.plays for kind in play.kinds)
    backing = [play.backing for course in playing.all for play in course.plays]
    datastore.assert_nothing_left(*backing)  # all was read, and is ordinary when its last handle is closed
    datastore.stop()
    datastore.assert_nothing_left(*backing)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_daemon_is_found_out(make_datastore: MakeDatastore, fault: str) -> None:
    datastore = make_datastore(SETTINGS)
    datastore.start(program=(DAEMON, fault))
    with pytest.raises(Mismatch) as found, courses(datastore, SMALL_KINDS) as playing:
        for _ in range(FAULT_OPERATIONS_MAX):
            playing.step()
    print(found.value)
    lines = str(found.value).splitlines()
    assert len(lines) > 2
    assert all(re.match(r"  \d+: ", line) for line in lines[1:])  # the last operations, numbered
