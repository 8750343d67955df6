"""A store that is opened late, and again after its filesystem has gone."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store_fakes import FakeObjects
from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.store.late import LateObjects
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import ObjectStore


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


CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda objects: objects.get("folder/key"),
    "size": lambda objects: objects.size("folder/key"),
    "put": lambda objects: objects.put("folder/other", b"y"),
    "delete": lambda objects: objects.delete("folder/key"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_directory_that_was_removed_and_restored_is_opened_anew(tmp_path: Path, name: str) -> None:
    """The descriptor of the removed one found nothing for ever, and objects counted as lost."""
    root, copy = tmp_path / "store", tmp_path / "copy"
    late = LateObjects(lambda: LocalObjects(root))
    late.put("folder/key", b"x")
    shutil.copytree(root, copy)
    shutil.rmtree(root)
    with pytest.raises(StoreUnavailable, match="removed"):
        CALLS[name](late)
    shutil.rmtree(root, ignore_errors=True)
    copy.rename(root)
    CALLS[name](late)
    assert sorted(info.key for info in late.list("folder/")) == {
        "put": ["folder/key", "folder/other"],
        "delete": [],
    }.get(name, ["folder/key"])


def test_a_removed_directory_is_not_listed_as_an_empty_one(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    objects.put("folder/key", b"x")
    shutil.rmtree(tmp_path / "store")
    for prefix in ("", "folder/"):
        with pytest.raises(StoreUnavailable, match="removed"):
            list(objects.list(prefix))
