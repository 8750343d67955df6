"""A store call outlives its time limit, and takes effect when nobody waits for it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio

from tests.datastore_harness import BLOCK, RigFiles, Services, temporary_rig
from tests.fault.scenarios import BY_NAME, first_contents, make_vm
from tests.fault.site_faults import check_ordinary, check_works, short_waits
from vmfs_stub.core.errors import VmfsStubError

LIMIT_S = 0.4
CASES = [
    ("archive", "store.pack.put"),
    ("archive", "store.pack.get_range"),
    ("archive", "store.segment.put"),
    ("archive", "store.pin.put"),
    ("archive", "store.pending.put"),
    ("archive", "store.manifest.put"),
    ("archive", "store.pending.delete"),
    ("archive", "store.index.put"),
    ("archive", "store.claim.put"),
    ("recall", "store.claim.list"),
    ("recall", "store.claim.put"),
    ("recall", "store.manifest.get"),
    ("recall", "store.segment.get"),
    ("recall", "store.pack.get_range"),
    ("graduate", "store.pin.delete"),
]


class Hanging:
    """Stands in for the first call of a site: it does not answer before it is told to, and then does what it should."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.done = threading.Event()
        self._first = True

    def __call__(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        if not self._first:
            return function(*args, **kwargs)
        self._first = False
        self.go_on.wait(60)
        try:
            return function(*args, **kwargs)
        finally:
            self.done.set()


@pytest.mark.parametrize(("name", "site"), CASES, ids=lambda value: value)
async def test_what_a_store_does_too_late_does_no_harm(name: str, site: str) -> None:
    scenario, hanging = BY_NAME[name], Hanging()
    with short_waits(), temporary_rig(head=BLOCK) as rig:
        contents = {path: [content] for path, content in make_vm(rig).items()}
        await scenario.prepare(rig)
        files = RigFiles(rig.medium)
        files.instead[site] = hanging
        rig.store_timeout_s = LIMIT_S
        async with rig.running(files=files) as services:
            services.recall.deadline_s = LIMIT_S
            await _expect_to_end(services, scenario.act)
            assert not hanging.done.is_set(), "nothing hung"
            services.threads.be_patient()
            services.recall.deadline_s = 30
            hanging.go_on.set()
            await trio.to_thread.run_sync(hanging.done.wait)
            await scenario.act(services)
        rig.store_timeout_s = 60
        async with rig.running() as services:
            await check_works(services, contents, was_killed=False)
            await check_ordinary(services, contents, staging_may_stay=False)
            assert set(contents) == set(first_contents())


async def _expect_to_end(services: Services, act: Callable[[Services], object]) -> None:
    """It fails, or does without the answer; it does not wait for ever."""
    with trio.fail_after(30):
        try:
            await act(services)  # type: ignore[misc]
        except VmfsStubError:
            return
