"""What a policy is told of a VM: by its files, its domain, the catalog, and what is not known."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from fake_hypervisor import domain

from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.errors import ClaimedElsewhere, HypervisorAway, PrimaryIOError, StoreUnavailable, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import RECALLED_XATTR
from vmfs_stub.core.policy import DEFAULT_RULE, Facts, Policy, Rule, decide
from vmfs_stub.core.usage import DAY_S, GuestState, Sample
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.facts import FactsService, FactsSettings
from vmfs_stub.services.hypervisor import NoHypervisor
from vmfs_stub.services.situation import Lookout, Situation

PATH = "vm/disk.img"
SIZE = 8 * CHUNK
POLICY = Policy((DEFAULT_RULE,), size_bytes_min=1)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig(head=BLOCK) as rig:
        (rig.backing / "vm").mkdir()
        rig.make_disk(PATH, os.urandom(SIZE))
        rig.make_disk("vm/note", b"small")
        yield rig


@dataclass
class FakeCatalog:
    """Samples and uses as they are put here."""

    samples: dict[VmId, list[Sample]] = field(default_factory=dict)
    uses: dict[VmId, LastUse] = field(default_factory=dict)
    is_broken: bool = False
    asked_since_s: float = 0.0

    def all_samples(self, since_s: float) -> Mapping[VmId, Sequence[Sample]]:
        self.asked_since_s = since_s
        if self.is_broken:
            raise PrimaryIOError("the catalog is damaged")
        return self.samples

    def last_use(self, vm_id: VmId) -> LastUse:
        return self.uses.get(vm_id, LastUse())


@dataclass
class FakeSituation:
    """The only VM's domains, and what stands against archiving it; ``error`` is why that cannot be told."""

    domains: Sequence[Domain] = ()
    reasons: Sequence[str] = ()
    error: VmfsStubError | None = None

    async def look(self) -> FakeSituation:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self

    @property
    def links(self) -> SimpleNamespace:
        return SimpleNamespace(of=lambda vm_id: tuple(self.domains))

    def against(self, vm: Vm) -> tuple[str, ...]:
        return tuple(self.reasons)


async def facts_of(
    services: Services,
    *,
    catalog: FakeCatalog | None = None,
    situation: FakeSituation | None = None,
    look: Callable[[], Awaitable[Situation | FakeSituation]] | None = None,
    policy: Policy = POLICY,
) -> Facts:
    catalog = catalog or FakeCatalog()
    backing_fd = os.open(services.rig.backing, os.O_PATH)
    try:
        service = FactsService(
            threads=services.threads,
            services=services.connected,
            store=services.store,
            findings=services.findings,
            samples=catalog,
            last_use=catalog.last_use,
            look=look or (situation or FakeSituation()).look,
            backing_fd=backing_fd,
            settings=FactsSettings(
                placeholder_bytes_min=CHUNK, resident_bytes=BLOCK, boot_bytes=4 * CHUNK, store_bytes_per_s=CHUNK
            ),
        )
        vm = DirectoryInventory(services.rig.backing).find("vm")
        (found,) = await service.gather([vm], policy, now_s=time.time())
    finally:
        os.close(backing_fd)
    return found


async def test_a_plain_vm(rig: Rig) -> None:
    async with rig.running() as services:
        found = await facts_of(services)
    assert found.state is GuestState.OFF
    assert (found.name, found.path, found.size_bytes) == ("vm", "vm", SIZE + 5)
    assert found.frees_bytes == SIZE - BLOCK
    assert found.usable_s == 5.0
    assert (found.is_placeholder, found.is_protected, found.never) == (False, False, ())
    assert (found.last_recalled_s, found.last_point_s, found.last_used_s, found.samples) == (None, None, None, ())


async def test_a_placeholder_and_what_it_becomes(rig: Rig) -> None:
    async with rig.running() as services:
        await services.archive("vm")
        found = await facts_of(services)
        assert (found.is_placeholder, found.frees_bytes, found.usable_s, found.never) == (True, 0, 5.0, ())
        disk = await services.open(PATH)
        await disk.read(2 * CHUNK, 3 * CHUNK)
        await services.disks.release(disk)
        part = await facts_of(services)
        assert not part.is_placeholder
        assert part.last_recalled_s is not None
        assert time.time() - part.last_recalled_s < 60
        await services.bring_back(PATH)
        assert services.disks.placeholders.get(disk.ino) is None
    async with rig.running() as services:
        whole = await facts_of(services)
    assert not whole.is_placeholder
    assert whole.last_recalled_s is not None
    assert time.time() - whole.last_recalled_s < 60
    assert whole.frees_bytes >= SIZE - BLOCK
    assert "was recalled" in decide(whole, POLICY, now_s=time.time()).reason


async def test_a_note_that_cannot_be_understood_keeps_the_vm(rig: Rig) -> None:
    os.setxattr(rig.backing / PATH, RECALLED_XATTR, b"some day")
    async with rig.running() as services:
        assert "was recalled" in decide(await facts_of(services), POLICY, now_s=time.time()).reason


async def test_a_vm_that_comes_back_stays(rig: Rig) -> None:
    async with rig.running() as services:
        await services.archive("vm")
        services.hydration._courses[(rig.backing / PATH).stat().st_ino] = None  # type: ignore[assignment]
        found = await facts_of(services)
        services.hydration._courses.clear()
    assert any("is coming back" in reason for reason in found.never)


async def test_what_the_domain_says(rig: Rig) -> None:
    known = replace(domain("vm", Path("/x")), state_since_s=5.0, metadata={"group": "lab"})
    situation = FakeSituation([known], ["domain vm: disk vdb is a block device"])
    async with rig.running() as services:
        found = await facts_of(services, situation=situation)
        assert (found.state, found.state_since_s, found.metadata) == (GuestState.OFF, 5.0, {"group": "lab"})
        assert found.never == ("domain vm: disk vdb is a block device",)
        for protected, is_protected in (("yes", True), ("", True), ("no", False)):
            situation.domains = [replace(known, metadata={"protected": protected})]
            said = await facts_of(services, situation=situation)
            assert (said.is_protected, said.protected_by) == (is_protected, "vm" if is_protected else "")


async def test_of_several_domains_no_state_is_the_vms(rig: Rig) -> None:
    known = replace(domain("vm", Path("/x")), state_since_s=5.0, metadata={"group": "lab"})
    clone = replace(domain("clone", Path("/x"), state=GuestState.RUNNING), metadata={"protected": "yes"})
    async with rig.running() as services:
        shared = await facts_of(services, situation=FakeSituation([known, clone], ["is a disk of several domains"]))
    assert (shared.state, shared.state_since_s, shared.metadata) == (GuestState.UNKNOWN, None, {})
    assert (shared.is_protected, shared.never) == (True, ("is a disk of several domains",))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HypervisorAway("cannot connect to libvirt"), "libvirt does not answer"),
        (PrimaryIOError("where the disk /x of a domain lies cannot be told"), "where the disk /x of a domain lies"),
    ],
)
async def test_nothing_is_archived_while_domains_cannot_be_told(
    rig: Rig, error: VmfsStubError, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.running() as services:
        found = await facts_of(services, situation=FakeSituation([domain("vm", Path("/x"))], error=error))
    assert (found.state, found.state_since_s) == (GuestState.UNKNOWN, None)
    assert [each.startswith(reason) for each in found.never] == [True]
    assert not decide(found, POLICY, now_s=time.time()).archives
    assert f"no VM is archived: {error}" in caplog.messages


async def test_a_disk_that_is_open(rig: Rig) -> None:
    known = domain("vm", Path("/x"))
    async with rig.running() as services:
        disk = await services.open(PATH)
        plain = await facts_of(services)
        assert plain.state is GuestState.RUNNING
        assert "no domain is known that has it" in plain.never[0]
        assert "though the domain is off" in (await facts_of(services, situation=FakeSituation([known]))).never[0]
        runs = await facts_of(services, situation=FakeSituation([replace(known, state=GuestState.RUNNING)]))
        assert (runs.state, runs.never) == (GuestState.RUNNING, ())
        await services.disks.release(disk)


async def test_reasons_of_the_datastore(rig: Rig) -> None:
    async with rig.running() as services:
        vm_id = rig.vm("vm").id
        services.recall.held = True
        services.findings.add(f"VM {vm_id}", ClaimedElsewhere("has it"))
        found = await facts_of(services, situation=FakeSituation(reasons=["is the base of web", "has a block job"]))
    assert [reason.split(",")[0] for reason in found.never] == [
        "is the base of web",
        "has a block job",
        "its newest state is in another datastore",
        "recalls are held",
    ]


async def test_a_base_that_an_overlay_needs_stays(rig: Rig) -> None:
    """As it is told by who looks at domains and chains for all who archive."""
    overlay = rig.backing / "clone.qcow2"
    made = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", PATH, "-F", "raw", str(overlay), "4M"]
    await trio.run_process(made)
    async with rig.running() as services:

        async def scan() -> Scan:
            return DirectoryInventory(rig.backing).scan()

        lookout = Lookout(
            hypervisor=NoHypervisor(),
            threads=services.threads,
            chains=services.chains,
            link=services.connected.link,
            scan=scan,
            require_stop_on_error=True,
        )
        found = await facts_of(services, look=lookout.look)
    assert found.never == (f"{PATH} is the base of clone.qcow2, which is resident",)


async def test_what_the_catalog_knows(rig: Rig) -> None:
    now_s = time.time()
    async with rig.running() as services:
        vm_id = rig.vm("vm").id
        samples = [
            Sample(now_s - 9000, now_s - 6000, 3000, 0, 0, 0, 0),
            Sample(now_s - 6000, now_s - 3000, 0, 3000, 1, 1, 1),
            Sample(now_s - 3000, now_s, 3000, 0, 0, 0, 0),
        ]
        catalog = FakeCatalog({vm_id: samples}, {vm_id: LastUse(now_s - 60, now_s - 50)})
        found = await facts_of(services, catalog=catalog)
        assert found.samples == samples
        assert (found.last_started_s, found.last_used_s) == (now_s - 6000, now_s - 50)
        assert catalog.asked_since_s == pytest.approx(now_s - 14 * DAY_S, abs=60)
        catalog.is_broken = True
        assert (await facts_of(services, catalog=catalog)).samples == ()


async def test_the_last_point_is_asked_for_where_it_decides(rig: Rig) -> None:
    needs = Policy((Rule("r", off_for_s=DAY_S, point_age_max_s=DAY_S),), size_bytes_min=1)
    now_s = time.time()
    async with rig.running() as services:
        rested = FakeCatalog({rig.vm("vm").id: [Sample(now_s - 9 * DAY_S, now_s, 9 * DAY_S, 0, 0, 0, 0)]})
        assert (await facts_of(services, catalog=rested, policy=needs)).last_point_s is None
        await services.archive("vm", archive=False)
        listed: list[str] = []
        rig.objects.before = lambda call, key: listed.append(call)
        assert (await facts_of(services, policy=needs)).last_point_s is None  # it is not known to rest
        assert (await facts_of(services, catalog=rested)).last_point_s is None  # no rule asks for it
        assert listed == []
        found = await facts_of(services, catalog=rested, policy=needs)
        assert found.last_point_s is not None
        assert abs(now_s - found.last_point_s) < 60
        assert decide(found, needs, now_s=now_s).archives

        def refuse(call: str, key: str) -> None:
            raise StoreUnavailable("away")

        rig.objects.before = refuse
        assert (await facts_of(services, catalog=rested, policy=needs)).last_point_s is None
        rig.objects.before = lambda call, key: None


async def test_nothing_is_changed(rig: Rig) -> None:
    """Nor is a lease of an archive broken: only O_PATH descriptors are opened."""

    def state() -> dict[str, object]:
        return {
            str(path.relative_to(rig.backing)): (path.lstat(), sorted(os.listxattr(path, follow_symlinks=False)))
            for path in sorted(rig.backing.rglob("*"))
        }

    async with rig.running() as services:
        rig.vm("vm")
        before = state()
        await facts_of(services)
        assert state() == before
