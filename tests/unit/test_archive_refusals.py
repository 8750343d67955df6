"""What refuses an operator's `archive`: what the VM's domains say at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.fault.datastores import ROOT_PEER, with_datastore
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.errors import HypervisorAway, InUse, Protected, Refused
from vmfs_stub.core.usage import GuestState
from vmfs_stub.datastore import Datastore

LAX = "lax"


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        made.make_disk("web/disk.img", b"x" * 3 * CHUNK)
        made.make_disk("other/disk.img", b"y" * 3 * CHUNK)
        yield made


def hypervisor_of(rig: Rig, changes: dict[str, Any]) -> FakeHypervisor:
    web = domain("guest", rig.mountpoint / "web/disk.img")
    if changes.pop(LAX, False):
        changes["disks"] = (replace(web.disks[0], stops_on_error=False),)
    rig.hypervisor = FakeHypervisor(replace(web, **changes))
    return rig.hypervisor


async def archived(datastore: Datastore, name: str) -> JobInfo:
    job = await datastore.start_archive([name], peer=ROOT_PEER)
    with trio.fail_after(60):
        while (info := await datastore.job(job, wait_s=0)).state == "running":  # noqa: ASYNC110
            await trio.sleep(0.005)
    return info


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({LAX: True}, Refused, "domain guest: vda without error_policy"),
        ({"problems": ("it is transient",)}, Refused, "domain guest: it is transient"),
        ({"metadata": {"protected": "yes"}}, Protected, "metadata of domain guest says that it is protected"),
        ({"state": GuestState.RUNNING}, InUse, "domain guest is running"),
        ({"state": GuestState.PAUSED}, InUse, "domain guest is paused"),
    ],
)
async def test_archives_are_refused(rig: Rig, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    hypervisor_of(rig, dict(changes))
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            with pytest.raises(error, match=message):
                await datastore.start_archive(["web"], peer=ROOT_PEER)
            assert (await archived(datastore, "other")).state == "done"

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("web/disk.img")
    assert rig.is_placeholder("other/disk.img")


@pytest.mark.parametrize(
    ("changes", "text"),
    [({LAX: True}, "[libvirt]\nrequire_stop_on_error = false\n"), ({"state": GuestState.SAVED}, "")],
)
async def test_archives_are_allowed_where_nothing_is_against_it(rig: Rig, changes: dict[str, Any], text: str) -> None:
    hypervisor_of(rig, dict(changes))
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            assert (await archived(datastore, "web")).state == "done"

        await with_datastore(services, text, act)
    assert rig.is_placeholder("web/disk.img")


async def test_archives_are_refused_where_it_is_not_known(rig: Rig) -> None:
    hypervisor_of(rig, {}).away = True
    async with rig.running() as services:

        async def act(datastore: Datastore, _: object) -> None:
            for name in ("web", "other"):
                with pytest.raises(HypervisorAway):
                    await datastore.start_archive([name], peer=ROOT_PEER)

        await with_datastore(services, "", act)
    assert not rig.is_placeholder("web/disk.img")
