"""A store that is opened late, and again after its filesystem has gone."""

from __future__ import annotations

import errno

import pytest

from tests.store_fakes import FakeObjects
from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.store.late import LateObjects


def test_it_is_opened_by_the_first_call_that_can() -> None:
    inner, tries = FakeObjects(), 0

    def opener() -> FakeObjects:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailable("not mounted yet")
        return inner

    late = LateObjects(opener)
    assert tries == 0
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            late.put("key", b"x")
    late.put("key", b"x")
    assert (late.get("key"), late.size("key"), tries) == (b"x", 1, 3)


@pytest.mark.parametrize(("code", "opened"), [(errno.ENOTCONN, 2), (errno.ESTALE, 2), (errno.EIO, 1)])
def test_a_dead_mount_is_let_go_and_a_failing_disk_is_not(code: int, opened: int) -> None:
    made: list[FakeObjects] = []

    def opener() -> FakeObjects:
        made.append(FakeObjects())
        made[-1].put("key", b"x")
        return made[-1]

    late = LateObjects(opener)
    assert late.get("key") == b"x"

    def dead(call: str, key: str) -> None:
        raise StoreUnavailable("gone") from OSError(code, "gone")

    made[0].before = dead
    with pytest.raises(StoreUnavailable):
        late.get("key")
    made[0].before = lambda call, key: None
    assert late.get("key") == b"x"
    assert len(made) == opened
