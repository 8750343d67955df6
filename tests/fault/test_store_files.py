"""Every file call of a store in a directory fails, once: what was acknowledged is there, and nothing else is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.site_tags import OS_FUNCTIONS
from vmfs_stub.core.errors import ObjectExists, StoreError, StoreFull, StoreUnavailable
from vmfs_stub.store import local
from vmfs_stub.store.local import TEMPORARY, LocalObjects
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy

OLD, NEW = b"o" * 5000, b"n" * 7000
ALLOCATING = ("open", "pwritev", "mkdir", "link", "rename", "fsync")


class FailingOs:
    """Stands in for the os module: the ``number``-th call of a file function fails with ``code``."""

    def __init__(self, number: int = 0, code: int = errno.EIO) -> None:
        self.number = number
        self.code = code
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in OS_FUNCTIONS:
            return function

        def call(*args: object, **kwargs: object) -> object:
            self.made.append(name)
            if len(self.made) == self.number:
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return call


def store(root: Path) -> None:
    """What was there before: two objects, one of which is replaced and one removed."""
    objects = LocalObjects(root)
    for key in ("pins/a/replaced", "pins/a/removed"):
        objects.put(key, OLD)
    objects.close()


def act(root: Path, known: dict[str, set[bytes | None]]) -> None:
    """Use every call; ``known`` holds what may be found under each name, which is one thing once it is acknowledged."""
    objects = LocalObjects(root)
    try:
        for key, data, if_absent in (("packs/aa/new", NEW, True), ("pins/a/replaced", NEW, False)):
            known.setdefault(key, {None}).add(data)
            objects.put(key, data, if_absent=if_absent)
            known[key] = {data}
        with pytest.raises(ObjectExists):
            objects.put("packs/aa/new", OLD)
        known["pins/a/removed"].add(None)
        objects.delete("pins/a/removed")
        known["pins/a/removed"] = {None}
        assert objects.get("pins/a/replaced") == NEW
        assert objects.get_range("packs/aa/new", offset=1, length=5) == NEW[1:6]
        assert {info.key for info in objects.list("")} == {"packs/aa/new", "pins/a/replaced"}
        objects.drop_cache("packs/aa/new")
        assert objects.size("packs/aa/new") == len(NEW)
    finally:
        objects.close()


def run(root: Path, failing: FailingOs, monkeypatch: pytest.MonkeyPatch) -> None:
    store(root)
    known: dict[str, set[bytes | None]] = {"pins/a/replaced": {OLD}, "pins/a/removed": {OLD}}
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", failing)
        try:
            act(root, known)
        except StoreError as exc:
            assert failing.number
            wanted = StoreFull if failing.code == errno.ENOSPC else StoreUnavailable
            assert isinstance(exc, wanted), exc
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208
    left = [*(root / TEMPORARY).iterdir()]
    assert not left or failing.made[failing.number - 1] == "unlink", "only what could not be removed is left"
    for key, possible in known.items():
        path = root / key
        assert (path.read_bytes() if path.exists() else None) in possible, key
    if failing.number:
        again = RetryingObjects(LocalObjects(root), RetryPolicy(pause_s=0))
        for key, if_absent in (("packs/aa/new", True), ("pins/a/replaced", False)):
            try:
                again.put(key, NEW, if_absent=if_absent)
            except ObjectExists:
                assert again.get(key) == NEW
        again.delete("pins/a/removed")
        assert {info.key: info.size for info in again.list("")} == {
            "packs/aa/new": len(NEW),
            "pins/a/replaced": len(NEW),
        }
        again.inner.close()  # type: ignore[attr-defined]


def made_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counting = FailingOs()
    run(tmp_path / "counted", counting, monkeypatch)
    return counting.made


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_what_was_acknowledged_is_there_whatever_call_fails(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = made_calls(tmp_path, monkeypatch)
    assert len(calls) > 40
    for number, name in enumerate(calls, start=1):
        if code == errno.EIO or name in ALLOCATING:
            run(tmp_path / f"{number}", FailingOs(number, code), monkeypatch)


def test_every_file_function_that_a_store_uses_is_made_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(local.__file__).read_text(encoding="utf-8")
    used = {name for name in OS_FUNCTIONS if f"os.{name}(" in source}
    # At the start only, for what a crash has left: what cannot be looked at or removed stays for the next start.
    assert used - set(made_calls(tmp_path, monkeypatch)) == {"stat"}


def test_a_store_that_cannot_be_opened_keeps_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again and again; the daemon ran out of descriptors."""
    store(tmp_path / "store")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in (2, 3, 4):
        with monkeypatch.context() as patch, pytest.raises(StoreUnavailable):
            patch.setattr(local, "os", FailingOs(number))
            LocalObjects(tmp_path / "store")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_call_that_is_believed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that ignores a failed write acknowledges what is not there."""

    def careless(self: LocalObjects, name: str, data: bytes) -> None:
        (self.root / TEMPORARY / name).write_bytes(b"")

    monkeypatch.setattr(LocalObjects, "_write_temporary", careless)
    noticed: Callable[[], object] = lambda: run(tmp_path / "store", FailingOs(), monkeypatch)  # noqa: E731
    with pytest.raises(AssertionError):
        noticed()
