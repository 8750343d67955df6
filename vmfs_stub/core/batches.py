"""Long sequences are dealt with in batches, which bounds memory and the time of one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """The items in their order, at most ``count`` at a time; as itertools has it from Python 3.12 on."""
    left = iter(items)
    while batch := list(islice(left, count)):
        yield batch
