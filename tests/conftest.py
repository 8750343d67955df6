"""Puts this folder on the import path, so that all kinds of tests share the fakes in it; and the S3 server of all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab.s3_server import Bucket, S3Account, new_bucket, shared_s3

# tmp_path on a filesystem that a backing directory can be on: /tmp may be tmpfs.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")


@pytest.fixture(scope="session")
def s3_account(testrun_uid: str) -> Iterator[S3Account]:
    """A real S3 server, shared by the processes of this run of the tests."""
    with shared_s3(Path(tempfile.gettempdir()) / f"vmfs-stub-s3-{testrun_uid[:12]}") as account:
        yield account


@pytest.fixture
def bucket(s3_account: S3Account) -> Bucket:
    """A new, empty bucket."""
    return new_bucket(s3_account)
