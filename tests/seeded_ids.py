"""Ids that a seed decides: they order files and objects, so what a run meets depends on them."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def ids_from(seed: int | str) -> Iterator[None]:
    """New ids come one after the other from ``seed``."""
    before, chosen = secrets.token_hex, random.Random(seed)

    def token_hex(size: int = 16) -> str:
        return chosen.randbytes(size).hex()

    secrets.token_hex = token_hex  # type: ignore[assignment]
    try:
        yield
    finally:
        secrets.token_hex = before
