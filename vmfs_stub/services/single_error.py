"""One error out of a group: callers of a service tell failures apart by type, not by how many tasks it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def single_error() -> Iterator[None]:
    """Raise the first real error of an exception group instead of the group; a cancellation stays one."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = _first_error(group)
        if error is None:
            raise
        raise error from group


def _first_error(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _first_error(inner)) is not None), None)
    return None if isinstance(error, trio.Cancelled) else error
