"""What several unit tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.store_fakes import FakeObjects
from tests.store_points import KEY_SOURCE
from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.store.key_sources import KeySource


@pytest.fixture
def objects() -> FakeObjects:
    """Where a store may be made."""
    return FakeObjects()


@pytest.fixture(params=[None, KEY_SOURCE], ids=["plain", "encrypted"])
def source(request: pytest.FixtureRequest) -> KeySource | None:
    """What opens the store: each test runs with one that is encrypted, too."""
    found: KeySource | None = request.param
    return found


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint that `init` may make immutable; the flag would stop the clean-up."""
    path = tmp_path / "vms"
    yield path
    if path.is_dir():
        with suppress(OSError):
            mountpoints.clear_immutable(path)
