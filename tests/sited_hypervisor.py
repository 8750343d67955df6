"""A hypervisor whose questions and answers carry site tags, as calls on files and stores do.

``hypervisor.X.asked`` is before the question X reaches it, ``hypervisor.X.answered`` after it did what it was asked:
a daemon that dies there, or never hears the answer, does not know.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from vmfs_stub.core.sites import FileCalls
from vmfs_stub.core.usage import Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.services.hypervisor import WatchedHypervisor

T = TypeVar("T")

HYPERVISOR = "hypervisor."
"""What the tags begin with."""
ANSWERED = ".answered"


class SitedHypervisor:
    """Implements services.hypervisor.WatchedHypervisor for one life of a daemon."""

    def __init__(self, inner: WatchedHypervisor, files: FileCalls) -> None:
        self._inner = inner
        self._files = files

    async def _ask(self, what: str, question: Callable[[], Awaitable[T]]) -> T:
        self._files.call(f"{HYPERVISOR}{what}.asked", _nothing)
        answer = await question()
        self._files.call(f"{HYPERVISOR}{what}{ANSWERED}", _nothing)
        return answer

    @property
    def is_away(self) -> bool:
        return self._inner.is_away

    @property
    def is_used(self) -> bool:
        return self._inner.is_used

    @property
    def changes(self) -> int:
        return self._inner.changes

    async def wait_changed(self, seen: int) -> None:
        await self._inner.wait_changed(seen)

    async def domains(self) -> Sequence[Domain]:
        return await self._ask("domains", self._inner.domains)

    async def readings(self) -> Mapping[str, Reading]:
        return await self._ask("readings", self._inner.readings)

    async def shut_down(self, uuid: str, *, limit_s: float) -> bool:
        return await self._ask("shut_down", lambda: self._inner.shut_down(uuid, limit_s=limit_s))

    async def save(self, uuid: str, *, limit_s: float) -> None:
        await self._ask("save", lambda: self._inner.save(uuid, limit_s=limit_s))

    async def start(self, uuid: str) -> None:
        await self._ask("start", lambda: self._inner.start(uuid))

    async def freeze(self, uuid: str) -> bool:
        return await self._ask("freeze", lambda: self._inner.freeze(uuid))

    async def thaw(self, uuid: str) -> None:
        await self._ask("thaw", lambda: self._inner.thaw(uuid))

    async def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        await self._ask("note", lambda: self._inner.set_note(uuid, note))


def _nothing() -> None:
    pass
