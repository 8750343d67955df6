"""Blocking file calls in worker threads, each under a site tag by which a test makes exactly that call fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vmfs_stub.mount.disks import FileCalls, FileThreads

P = ParamSpec("P")
T = TypeVar("T")


class Runner:
    """Runs file calls off the event loop."""

    def __init__(self, threads: FileThreads, files: FileCalls) -> None:
        self._threads = threads
        self._files = files

    async def __call__(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in a thread; raises what it raises."""
        return await self._threads.files(self._files.call, site, function, *args, **kwargs)

    def now(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` here and now: before anything is served, nobody else waits."""
        return self._files.call(site, function, *args, **kwargs)
