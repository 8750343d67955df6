"""Failures that structured concurrency has wrapped.

A nursery raises an ExceptionGroup even for one failure; whoever reports a failure wants the failure.
"""

from __future__ import annotations


def unwrapped(error: BaseException) -> BaseException:
    """The one exception that ``error``, and every group in it, consists of; a real group stays what it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
