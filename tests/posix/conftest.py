"""One datastore with the real daemon for all tests of a module, and a directory of the same filesystem beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import Places

from tests.e2e.live_datastore import QUIET, LiveDatastore, remove_base


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    base = Path(tempfile.mkdtemp(prefix="vmfs-stub-", dir="/var/tmp"))
    base.chmod(0o755)  # other users may enter
    datastore = LiveDatastore(base)
    try:
        datastore.init(QUIET)
        datastore.start()
        made = Places(datastore.mountpoint / "vm", base / "plain", datastore)
        made.mounted.mkdir()
        made.plain.mkdir()
        yield made
        made.assert_no_bugs()
    finally:
        datastore.tear_down()
        remove_base(base)
