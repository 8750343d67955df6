"""The stores in which soaks without a daemon play: the fake, or a real one; an S3 server is started for them."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lab.s3_server import new_bucket, shared_s3
from tests.store_places import PLACES, InBucket, Place

_S3: Final = "s3"
_TROUBLED: Final = "troubled-s3"


def add_store(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument(
        "--store",
        choices=[*PLACES, _S3, _TROUBLED],
        default="fake",
        help="where (default: a fake; troubled-s3 is behind a proxy that refuses, cuts, forgets and lists late)",
    )


@contextmanager
def store_place(options: argparse.Namespace) -> Iterator[Place]:
    """What the option names, within the block; may be sent to other processes."""
    name: str = options.store
    if name in PLACES:
        yield PLACES[name]
        return
    with shared_s3(Path(tempfile.gettempdir()) / f"vmfs-stub-s3-{os.getpid()}") as account:
        yield InBucket(new_bucket(account), troubled=name == _TROUBLED)
