"""A backup job: every VM has its turn, policy is followed and asked again, guests that are stopped do not stay so."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.backup_jobs import MOUNT, JobRig
from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.core.errors import HypervisorAway, InUse, Protected, Refused, VmfsStubError
from vmfs_stub.core.policy import WhenRunning
from vmfs_stub.core.usage import GuestState
from vmfs_stub.core.windows import Windows
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.backup_job import JobSettings, Placeholders, Watch
from vmfs_stub.services.backup_turn import VmResult
from vmfs_stub.services.hooks import HookCall, Hooks
from vmfs_stub.services.restore import restore_point
from vmfs_stub.services.stopped_guests import LATE_S

BY_POLICY = Placeholders.BY_POLICY


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        made.inline = True
        yield made


def make_vms(rig: Rig, *names: str) -> None:
    for number, name in enumerate(names):
        rig.make_disk(f"{name}/disk.img", bytes([number + 1]) * (2 * CHUNK))


async def run(job: JobRig, placeholders: Placeholders = BY_POLICY, *, tolerant: bool = True) -> dict[str, VmResult]:
    results = await job.jobs().run(job.vms(), placeholders=placeholders, tolerant=tolerant)
    return {result.vm.name: result for result in results}


def outcomes(results: dict[str, VmResult]) -> dict[str, str]:
    return {name: result.outcome for name, result in results.items()}


async def test_what_policy_says_is_archived_and_the_rest_backed_up(rig: Rig) -> None:
    make_vms(rig, "a", "b", "c")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"b": WhenRunning.SKIP}
        results = await run(job)
        assert outcomes(results) == {"a": "backed up", "b": "archived", "c": "backed up"}
        assert results["b"].decision is not None
        assert results["b"].decision.reason == "idle for 20 days"
        assert results["a"].decision is not None
        assert results["a"].decision.reason == "used yesterday"
        assert [rig.is_placeholder(f"{name}/disk.img") for name in "abc"] == [False, True, False]
        assert job.policy.asked == [("a", "b", "c"), ("b",)]
        assert results["a"].done_bytes == 2 * CHUNK


async def test_without_leave_nothing_is_archived_and_policy_is_not_asked(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP}
        assert outcomes(await run(job, Placeholders.NONE)) == {"a": "backed up"}
        assert job.policy.asked == []


async def test_a_dry_run_only_says_what_would_be(rig: Rig) -> None:
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(dry_run=True))
        job.policy.archives = {"a": WhenRunning.SKIP}
        results = await run(job)
        assert outcomes(results) == {"a": "backed up", "b": "backed up"}
        assert results["a"].message == "would be archived, but for [archive] dry_run: idle for 20 days"
        points = len(rig.objects.contents)
        rehearsed = await job.jobs().rehearse(job.vms())
        assert [(each.outcome, each.message) for each in rehearsed] == [
            ("would be archived", "idle for 20 days"),
            ("would be backed up", "used yesterday"),
        ]
        assert len(rig.objects.contents) == points


async def test_a_changed_mind_makes_a_backup_of_it(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.answers = {"a": [True, False]}
        results = await run(job)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].message == "not archived after all: used yesterday"
        assert not rig.is_placeholder("a/disk.img")
        assert rig.maps() == []
        assert rig.pins() == []
        job.policy.archives = {"a": WhenRunning.SKIP}
        assert outcomes(await run(job)) == {"a": "archived"}


async def test_a_policy_that_fails_archives_nothing(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP}
        job.policy.errors = [ValueError("no samples")]
        results = await run(job)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].decision is not None
        assert results["a"].decision.reason == "policy could not decide: no samples"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "planted"), ValueError("a bug")])
async def test_one_failure_spoils_no_others_turn(rig: Rig, error: Exception) -> None:
    make_vms(rig, "a", "b", "c")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(parallel=1))
        services.files.fail("archive.seek", 1, error)
        results = await run(job)
        assert outcomes(results) == {"a": "failed", "b": "backed up", "c": "backed up"}
        assert results["a"].error is not None


@pytest.mark.parametrize("decided", [False, True])
async def test_a_vm_in_use_is_backed_up_while_it_runs(rig: Rig, decided: bool) -> None:
    """Also one that policy would have archived, of which no hypervisor tells that it runs."""
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP} if decided else {}
        disk = await services.open("a/disk.img")
        for tolerant in (True, False):
            results = await run(job, tolerant=tolerant)
            assert outcomes(results) == {"a": "backed up", "b": "backed up"}
            report = results["a"].report
            assert report is not None
            assert report.consistency == "crash"
            assert results["a"].error is None
            assert results["a"].message.endswith("while it was in use (crash)")
            assert ("not archived: " in results["a"].message) is decided
            assert services.store.points(results["a"].vm.id)[-1].point_id == report.point_id
            assert results["b"].message == ""
        assert job.made == {vm.id for vm in job.vms()}
        assert not rig.is_placeholder("a/disk.img")
        await services.disks.release(disk)


async def test_a_snapshot_that_was_made_since_the_job_began_is_in_the_point_of_a_vm_in_use(rig: Rig) -> None:
    for name in ("a.img", "a.snap1"):
        rig.make_disk(name, name.encode() * CHUNK)
    web = domain("web", MOUNT / "a.img", state=GuestState.RUNNING)
    async with rig.running() as services:
        job = JobRig(services, hypervisor=FakeHypervisor(web))
        found = tuple(vm for vm in job.vms() if vm.path == "a.img")
        both = domain("web", rig.mountpoint / "a.img", rig.mountpoint / "a.snap1")
        await services.groups.regroup(job.vms(), [both], await services.chains.look(job.vms(), [both]))
        disk = await services.open("a.img")
        (result,) = await job.jobs().run(found, placeholders=BY_POLICY, tolerant=True)
        await services.disks.release(disk)
        assert result.report is not None
        point = services.store.open_point(found[0].id, result.report.point_id)
        assert sorted(file.path for file in point.manifest.files) == ["a.img", "a.snap1"]


async def test_a_vm_in_use_that_an_operator_names_is_not_archived(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        disk = await services.open("a/disk.img")
        results = await run(job, Placeholders.OF_ALL, tolerant=False)
        assert outcomes(results) == {"a": "skipped"}
        assert isinstance(results["a"].error, InUse)
        assert job.made == set()
        await services.disks.release(disk)


@pytest.mark.parametrize("decided", [False, True])
async def test_a_vm_that_is_in_use_beside_the_mount_is_skipped(rig: Rig, decided: bool) -> None:
    """What is written there is not seen, so that there is no moment at which the VM is whole."""
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP} if decided else {}
        with (rig.backing / "a/disk.img").open("rb"):
            for tolerant in (True, False):
                results = await run(job, tolerant=tolerant)
                assert outcomes(results) == {"a": "skipped", "b": "backed up"}
                assert "open in some program" in results["a"].message
                assert (results["a"].error is None) is tolerant
        assert outcomes(await run(job))["a"] == ("archived" if decided else "backed up")


@pytest.mark.parametrize("answers", [False, True])
async def test_the_agent_of_a_guest_that_runs_is_asked_to_bring_it_to_rest(rig: Rig, answers: bool) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        if answers:
            job.hypervisor.agents.update(job.hypervisor.known)
        disk = await services.open("a/disk.img")
        results = await run(job, Placeholders.NONE)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].message == f"while it was in use ({'quiesced' if answers else 'crash'})"
        assert job.hypervisor.asked == ["domains", "freeze a", *(["thaw a"] if answers else [])]
        await services.disks.release(disk)


async def test_a_backup_of_a_vm_in_use_is_held_to_the_limit_and_whole(
    rig: Rig, autojump_clock: object, tmp_path: Path
) -> None:
    content = random.Random(1).randbytes(16 * CHUNK)
    rig.make_disk("a/disk.img", content)
    async with rig.running() as services:
        rig.bandwidth.windows = Windows(outside=CHUNK)
        disk = await services.open("a/disk.img")
        began_s = trio.current_time()
        result = (await run(JobRig(services), Placeholders.NONE))["a"]
        assert trio.current_time() - began_s >= 16
        assert result.report is not None
        assert (result.report.consistency, result.report.read_bytes) == ("crash", len(content))
        await services.disks.release(disk)
        restore_point(services.store, services.store.open_point(result.vm.id, result.report.point_id), tmp_path / "out")
        assert (tmp_path / "out/disk.img").read_bytes() == content


async def test_so_many_are_in_progress_at_once(rig: Rig) -> None:
    make_vms(rig, *"abcdef")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(parallel=3))
        going: set[str] = set()
        most = 0

        def began(vm: Vm) -> None:
            nonlocal most
            going.add(vm.name)
            most = max(most, len(going))

        watch = Watch(began=began, ended=lambda result: going.discard(result.vm.name))
        results = await job.jobs().run(job.vms(), placeholders=Placeholders.NONE, tolerant=True, watch=watch)
        assert [result.vm.name for result in results] == list("abcdef")
        assert most == 3


async def test_linked_vms_go_alone_and_in_their_order(rig: Rig) -> None:
    make_vms(rig, *"abc")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(parallel=3))
        told: list[str] = []
        watch = Watch(
            began=lambda vm: told.append(f"{vm.name} began"),
            ended=lambda result: told.append(f"{result.vm.name} ended"),
        )
        vms = job.vms()[::-1]
        await job.jobs().run(vms, placeholders=Placeholders.OF_ALL, tolerant=False, watch=watch, alone=True)
        assert told == [f"{name} {what}" for name in "cba" for what in ("began", "ended")]
        assert all(rig.is_placeholder(f"{name}/disk.img") for name in "abc")


async def test_a_large_share_of_failures_ends_the_job(rig: Rig) -> None:
    make_vms(rig, *"abcdef")
    async with rig.running() as services:
        settings = JobSettings(parallel=1, failures_percent_max=50, failures_count_min=2)
        job = JobRig(services, settings=settings)
        services.files.fail("archive.seek", 2, OSError(errno.EIO, "planted"))
        assert outcomes(await run(job))["f"] == "backed up"  # one failure is not two
        rig.make_disk("a/disk.img", bytes(CHUNK))
        job.settings = replace(settings, failures_count_min=1, failures_percent_max=40)
        services.files.fail("archive.lease", 2, OSError(errno.EIO, "planted"))
        results = await run(job)
        assert outcomes(results) == {
            "a": "backed up",
            "b": "failed",
            **dict.fromkeys("cdef", "not tried"),
        }
        assert results["c"].message.startswith("1 of 2 VMs failed")
        assert isinstance(results["c"].error, VmfsStubError)


async def test_a_pause_begins_no_further_vm(rig: Rig) -> None:
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(parallel=1))

        def ended(result: VmResult) -> None:
            job.paused = True

        jobs = job.jobs()
        results = await jobs.run(job.vms(), placeholders=BY_POLICY, tolerant=True, watch=Watch(ended=ended))
        assert [result.outcome for result in results] == ["backed up", "not tried"]
        assert "jobs --unpause" in results[1].message
        named = await run(job, Placeholders.OF_ALL)  # by an operator, who knows
        assert outcomes(named) == {"a": "archived", "b": "archived"}


# Guests that run


def hypervisor_of(*names: str, state: GuestState = GuestState.RUNNING) -> FakeHypervisor:
    return FakeHypervisor(*(domain(name, MOUNT / name / "disk.img", state=state) for name in names))


def state_of(hypervisor: FakeHypervisor) -> GuestState:
    (only,) = hypervisor.known.values()
    return only.state


async def test_an_idle_guest_is_shut_down_and_its_vm_archived(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        results = await run(job)
        assert outcomes(results) == {"a": "archived"}
        assert results["a"].guest == "stopped"
        assert job.hypervisor.asked == ["domains", "domains", "shut down a", "domains"]
        assert state_of(job.hypervisor) is GuestState.OFF
        assert services.private.stopped.all() == []
        await job.guests.settle(job.all_vms)
        assert state_of(job.hypervisor) is GuestState.OFF


async def test_a_rule_that_stops_none_leaves_a_running_guest_alone(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SKIP}
        results = await run(job)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].message == "not archived: its guest runs, and the rule stops none"
        assert job.hypervisor.asked == ["domains", "domains"]


async def test_a_guest_that_does_not_power_off_is_left_alone(rig: Rig, autojump_clock: object) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        (uuid,) = job.hypervisor.known
        job.hypervisor.stubborn.add(uuid)
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        disk = await services.open("a/disk.img")
        results = await run(job)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].guest == ""
        assert "still running" in results["a"].message
        assert "while it was in use" in results["a"].message
        assert not any(asked.startswith("start") for asked in job.hypervisor.asked)
        await services.disks.release(disk)
        # One that powers off late was stopped by the job all the same.
        assert len(services.private.stopped.all()) == 1
        job.hypervisor.put(uuid, state=GuestState.OFF)
        await job.guests.settle(job.all_vms)
        assert job.hypervisor.asked[-1] == "start a"
        assert services.private.stopped.all() == []


@pytest.mark.parametrize("late_s", [LATE_S - 1, LATE_S + 20])
async def test_a_guest_that_obeys_late_is_started_and_one_that_is_off_long_after_is_left_so(
    rig: Rig, late_s: float, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    make_vms(rig, "a")
    now_s = 1e9
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"), limit_s=600, clock=lambda: now_s)
        (uuid,) = job.hypervisor.known
        job.hypervisor.stubborn.add(uuid)
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        results = await run(job)
        assert "if it powers off within 60 min, it is started again" in results["a"].message
        now_s += 600 + late_s
        await job.guests.settle(job.all_vms)
        is_late = late_s > LATE_S
        assert ("it is left so" in caplog.text) is is_late
        job.hypervisor.put(uuid, state=GuestState.OFF)
        await job.guests.settle(job.all_vms)
        assert services.private.stopped.all() == []
        assert state_of(job.hypervisor) is (GuestState.OFF if is_late else GuestState.RUNNING)
        # Once it was started, a person may stop it.
        job.hypervisor.put(uuid, state=GuestState.OFF)
        await job.guests.settle(job.all_vms)
        assert state_of(job.hypervisor) is GuestState.OFF


async def test_a_guest_that_is_paused_is_not_asked_to_power_off(rig: Rig) -> None:
    """It would when it goes on, whenever that is."""
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a", state=GuestState.PAUSED))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        results = await run(job)
        assert outcomes(results) == {"a": "backed up"}
        assert "its guest is paused, and cannot power off" in results["a"].message
        assert not any(asked.startswith("shut down") for asked in job.hypervisor.asked)
        assert services.private.stopped.all() == []


async def test_where_no_hypervisor_is_known_any_more_a_stopped_guest_is_not_forgotten(rig: Rig) -> None:
    """The next daemon comes before libvirt's socket, say, and takes this for a host without."""
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        services.files.instead["archive.seek"] = lambda *arguments: setattr(job.hypervisor, "away", True) or 1 / 0
        await run(job)
        known, job.hypervisor.away = dict(job.hypervisor.known), False
        job.hypervisor.known.clear()
        job.hypervisor.is_used = False
        await job.guests.settle(job.all_vms)
        assert len(services.private.stopped.all()) == 1
        job.hypervisor.known.update(known)
        job.hypervisor.is_used = True
        await job.guests.settle(job.all_vms)
        assert state_of(job.hypervisor) is GuestState.RUNNING


@pytest.mark.parametrize("site", ["archive.seek", "store.manifest.put", "archive.record"])
async def test_a_guest_whose_archive_fails_is_started_again(rig: Rig, site: str) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        services.files.fail(site, 1, OSError(errno.EIO, "planted"))
        results = await run(job)
        assert outcomes(results) == {"a": "failed"}, site
        assert results["a"].guest == "started again"
        assert job.hypervisor.asked[-1] == "start a"
        assert services.private.stopped.all() == []


async def test_a_cancelled_job_starts_the_guest_again(rig: Rig) -> None:
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"), settings=JobSettings(parallel=1))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        seen: list[VmResult] = []
        with trio.CancelScope() as scope:
            watch = Watch(advanced=lambda vm, count: scope.cancel(), ended=seen.append)
            await job.jobs().run(job.vms(), placeholders=BY_POLICY, tolerant=True, watch=watch)
        assert scope.cancelled_caught
        assert {each.vm.name: each.outcome for each in seen} == {"a": "cancelled", "b": "not tried"}
        assert job.hypervisor.asked[-1] == "start a"
        assert not rig.is_placeholder("a/disk.img")
        assert services.private.stopped.all() == []


async def test_a_hypervisor_that_goes_away_gets_the_guest_back_later(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        services.files.instead["archive.seek"] = lambda *arguments: setattr(job.hypervisor, "away", True) or 1 / 0
        results = await run(job)
        assert outcomes(results) == {"a": "failed"}
        del services.files.instead["archive.seek"]
        assert state_of(job.hypervisor) is GuestState.OFF
        await job.guests.settle(job.all_vms)
        assert len(services.private.stopped.all()) == 1
        job.hypervisor.away = False
        await job.guests.settle(job.all_vms)
        assert state_of(job.hypervisor) is GuestState.RUNNING
        assert services.private.stopped.all() == []


async def test_policy_is_asked_again_before_a_guest_is_stopped(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        job.policy.answers = {"a": [True, False]}
        assert outcomes(await run(job)) == {"a": "backed up"}
        assert job.hypervisor.asked == ["domains", "domains"]


async def test_a_guest_whose_vm_is_protected_meanwhile_is_not_stopped(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        watch = Watch(began=lambda vm: DirectoryInventory(rig.backing).protect(vm, True))
        (result,) = await job.jobs().run(job.vms(), placeholders=BY_POLICY, tolerant=True, watch=watch)
        assert (result.outcome, result.guest) == ("backed up", "")
        assert job.hypervisor.asked == ["domains", "domains"]


async def test_a_guest_that_was_started_since_policy_was_asked_is_not_stopped(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a", state=GuestState.OFF))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        (uuid,) = job.hypervisor.known
        watch = Watch(began=lambda vm: job.hypervisor.put(uuid, state=GuestState.RUNNING))
        (result,) = await job.jobs().run(job.vms(), placeholders=BY_POLICY, tolerant=True, watch=watch)
        assert (result.outcome, result.message) == (
            "backed up",
            "not archived: its guest was started since policy decided",
        )
        assert state_of(job.hypervisor) is GuestState.RUNNING


async def test_memory_is_only_saved_where_it_can_be_archived(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        for save_dir, why in (
            (Path("/var/lib/save"), "is not on the mount"),
            (
                MOUNT / "b/save",
                "b/save/a.save, which is no file of VM a: have the save directory lead to one at the top",
            ),
        ):
            job = JobRig(services, hypervisor_of("a"), save_dir=save_dir)
            job.policy.archives = {"a": WhenRunning.MANAGED_SAVE}
            results = await run(job)
            assert outcomes(results) == {"a": "backed up"}
            assert why in results["a"].message
            assert job.hypervisor.asked == ["domains", "domains"]


@pytest.mark.parametrize("folder", ["a", "save"])
async def test_saved_memory_is_archived_with_the_disks(rig: Rig, folder: str) -> None:
    """From the VM's own directory, and from the one at the top that has those of all."""
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"), save_dir=MOUNT / folder)
        job.policy.archives = {"a": WhenRunning.MANAGED_SAVE}
        assert outcomes(await run(job)) == {"a": "failed"}  # a simulated guest has no memory yet
        assert job.hypervisor.asked[-1] == "start a"
        rig.make_disk(f"{folder}/a.save", b"memory" * CHUNK)
        results = await run(job)
        assert outcomes(results) == {"a": "archived"}
        assert state_of(job.hypervisor) is GuestState.SAVED
        assert results["a"].report is not None
        assert set(results["a"].report.placeholders) == {"a/disk.img", f"{folder}/a.save"}
        assert [vm.name for vm in job.vms()] == ["a"]


# Hooks


class FakeHooks(Hooks):
    """Forbids what is in ``forbidden``; ``told`` is what they were told, in order."""

    def __init__(self, *forbidden: str) -> None:
        super().__init__()
        self.forbidden = forbidden
        self.told: list[tuple[str, str, str]] = []

    async def before(self, call: HookCall) -> str:
        self.told.append(("before", call.what, call.vm))
        return "not today" if call.what in self.forbidden else ""

    async def after(self, call: HookCall, outcome: str) -> None:
        self.told.append(("after", call.what, outcome))


async def test_hooks_are_told_of_every_step(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        hooks = FakeHooks()
        job = JobRig(services, hypervisor_of("a"), hooks=hooks)
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        await run(job)
        assert hooks.told == [
            ("before", "archive", "a"),
            ("before", "stop", "a"),
            ("after", "stop", "stopped"),
            ("after", "archive", "archived"),
        ]


async def test_hooks_are_told_of_a_guest_that_is_started_again(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        hooks = FakeHooks()
        job = JobRig(services, hypervisor_of("a"), hooks=hooks)
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        services.files.fail("archive.seek", 1, OSError(errno.EIO, "planted"))
        await run(job)
        assert [told[:2] for told in hooks.told[-3:]] == [("after", "stop"), ("after", "start"), ("after", "archive")]


async def test_a_bug_in_hooks_ends_no_job(rig: Rig) -> None:
    make_vms(rig, "a", "b")

    class Broken(FakeHooks):
        async def after(self, call: HookCall, outcome: str) -> None:
            raise ValueError("a bug")

    async with rig.running() as services:
        job = JobRig(services, hooks=Broken(), settings=JobSettings(parallel=1))
        assert outcomes(await run(job)) == {"a": "backed up", "b": "backed up"}


async def test_vms_fail_of_which_the_hook_cannot_be_run(rig: Rig, tmp_path: Path) -> None:
    make_vms(rig, "a", "b", "c")
    async with rig.running() as services:
        settings = JobSettings(parallel=1, failures_count_min=2)
        job = JobRig(services, hooks=Hooks([str(tmp_path / "missing")]), settings=settings)
        results = await run(job)
        assert outcomes(results) == {"a": "failed", "b": "failed", "c": "not tried"}
        assert "cannot be run" in results["a"].message


@pytest.mark.parametrize(("forbidden", "outcome"), [("archive", "skipped"), ("stop", "backed up")])
async def test_a_hook_keeps_a_vm_from_being_touched(rig: Rig, forbidden: str, outcome: str) -> None:
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"), hooks=FakeHooks(forbidden))
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        results = await run(job)
        assert outcomes(results) == {"a": outcome, "b": "backed up"}
        assert "not today" in results["a"].message
        assert results["a"].error is None
        assert not any("shut down" in asked for asked in job.hypervisor.asked)


@pytest.mark.parametrize("placeholders", [Placeholders.OF_ALL, Placeholders.NONE])
async def test_what_a_hook_forbids_an_operator_is_an_error(rig: Rig, placeholders: Placeholders) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hooks=FakeHooks("archive", "backup"))
        result = (await run(job, placeholders, tolerant=False))["a"]
        assert (result.outcome, result.message, type(result.error)) == ("skipped", "not today", Refused)


async def test_what_is_protected_meanwhile_stays(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP}
        (vm,) = job.vms()
        job.protected.add(vm.id)
        by_policy = (await run(job))["a"]
        assert (by_policy.outcome, job.made) == ("backed up", {vm.id})
        assert "is protected" in by_policy.message
        named = (await run(job, Placeholders.OF_ALL, tolerant=False))["a"]
        assert isinstance(named.error, Protected)
        job.protected.clear()
        assert outcomes(await run(job, Placeholders.OF_ALL)) == {"a": "archived"}
        assert job.made == {vm.id}


# What stands against archives


async def test_what_stands_against_an_operators_archive_at_its_turn_is_told_and_nothing_done(rig: Rig) -> None:
    make_vms(rig, "a", "b")
    async with rig.running() as services:
        job = JobRig(services, settings=JobSettings(parallel=1), refusals=[Refused("a disk is shared")])
        results = await run(job, Placeholders.OF_ALL, tolerant=False)
        assert outcomes(results) == {"a": "skipped", "b": "archived"}
        assert str(results["a"].error) == "a disk is shared"
        assert job.looks == [("a", False), ("b", False), ("b", True)]
        assert services.store.points(results["a"].vm.id) == []


async def test_refusals_however_many_do_not_end_the_job(rig: Rig) -> None:
    """They are no sign of something that is wrong with more than these VMs."""
    make_vms(rig, *"abcd")
    async with rig.running() as services:
        settings = JobSettings(parallel=1, failures_count_min=1, failures_percent_max=0)
        job = JobRig(services, settings=settings, refusals=[Refused("a disk is shared")] * 3)
        results = await run(job, Placeholders.OF_ALL, tolerant=False)
        assert outcomes(results) == {"a": "skipped", "b": "skipped", "c": "skipped", "d": "archived"}
        job.refusals = [HypervisorAway("libvirt does not answer")]
        assert outcomes(await run(job, Placeholders.OF_ALL, tolerant=False)) == {
            "a": "failed",
            "b": "not tried",
            "c": "not tried",
            "d": "not tried",
        }


async def test_under_its_lease_a_vm_is_looked_at_once_and_policy_decides_from_that(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP}
        assert outcomes(await run(job)) == {"a": "archived"}
        assert job.looks == [("a", True)]
        assert job.policy.seen == [None, job.seen[0]]
        assert len(job.seen) == 1


@pytest.mark.parametrize("placeholders", [Placeholders.OF_ALL, BY_POLICY])
async def test_what_comes_up_while_it_is_copied_makes_a_backup_of_it(rig: Rig, placeholders: Placeholders) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services)
        job.policy.archives = {"a": WhenRunning.SKIP}
        at_turn = placeholders is Placeholders.OF_ALL
        job.refusals = [*([None] if at_turn else []), HypervisorAway("libvirt does not answer")]
        results = await run(job, placeholders)
        assert outcomes(results) == {"a": "backed up"}
        assert results["a"].message == "not archived after all: libvirt does not answer"
        assert isinstance(results["a"].error, Refused) == at_turn, "an operator wanted it, policy only might have"
        assert job.looks == [*([("a", False)] if at_turn else []), ("a", True)]
        assert job.made == {results["a"].vm.id}
        assert not rig.is_placeholder("a/disk.img")
        assert rig.pins() == []
        assert outcomes(await run(job, placeholders)) == {"a": "archived"}


async def test_a_guest_is_started_again_when_something_came_up_after_it_was_stopped(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, hypervisor_of("a"), refusals=[Refused("a disk is shared")])
        job.policy.archives = {"a": WhenRunning.SHUTDOWN}
        results = await run(job)
        assert (results["a"].outcome, results["a"].guest) == ("backed up", "started again")
        assert "not archived after all: a disk is shared" in results["a"].message
        assert job.looks == [("a", True)]
        assert state_of(job.hypervisor) is GuestState.RUNNING
        assert services.private.stopped.all() == []


async def test_without_placeholders_nothing_is_looked_for(rig: Rig) -> None:
    make_vms(rig, "a")
    async with rig.running() as services:
        job = JobRig(services, refusals=[Refused("a disk is shared")])
        assert outcomes(await run(job, Placeholders.NONE)) == {"a": "backed up"}
        assert job.looks == []
