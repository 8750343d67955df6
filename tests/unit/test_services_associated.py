"""What belongs to a VM beside its disks is in its restore points, and comes back with a restore."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from tests.unit.test_services_image_chains import make_base, make_overlay
from vmfs_stub.cli.restore import _beside_lines
from vmfs_stub.core.errors import CorruptManifest
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.services import associated
from vmfs_stub.services.associated import BASES, AssociatedFiles
from vmfs_stub.services.restore import RestoreReport, restore_point
from vmfs_stub.store.associated_files import (
    ASSOCIATED,
    DOMAIN_XML,
    AssociatedFile,
    decode_associated,
    encode_associated,
)
from vmfs_stub.store.manifest import Manifest

UUID = "0123456789abcdef0123456789abcdef"
TPM_XML = "<domain><devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>"


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig(head=BLOCK) as made:
        made.make_disk("vm/disk.raw", bytes(range(256)) * (CHUNK // 64))
        yield made


def of_vm(rig: Rig, **changes: Any) -> Domain:
    return replace(domain("guest", rig.mountpoint / "vm/disk.raw", uuid=UUID), **changes)


def manifest_of(services: Services, name: str = "vm") -> Manifest:
    vm_id = services.rig.vm(name).id
    return services.store.open_point(vm_id, services.store.points(vm_id)[-1].point_id).manifest


async def backed_up(rig: Rig, name: str = "vm", *, swtpm: Path | None = None) -> tuple[Manifest, str]:
    """The manifest of a backup, and what was warned of."""
    async with rig.running() as services:
        if swtpm is not None:
            assert rig.hypervisor is not None
            services.archiver.associated = AssociatedFiles(
                files=services.files,
                threads=services.threads,
                hypervisor=rig.hypervisor,
                chains=services.chains,
                link=services.connected.link,
                managed_save=rig.managed_save,
                swtpm=swtpm,
            ).of
        report = await services.archive(name, archive=False)
        return manifest_of(services, name), report.warning


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def restored(rig: Rig, manifest: Manifest, to: Path, *, only_beside: bool = False) -> RestoreReport:
    point = rig.store.open_point(manifest.vm_id, manifest.point_id)
    return restore_point(rig.store, point, to, only_beside=only_beside)


async def test_definition_nvram_and_tpm_state_are_in_the_point_and_come_back(rig: Rig, tmp_path: Path) -> None:
    nvram, state = tmp_path / "guest_VARS.fd", tmp_path / "swtpm/01234567-89ab-cdef-0123-456789abcdef/tpm2"
    nvram.write_bytes(b"\xff" * (4 << 20) + b"boot order")
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"sealed")
    (state / ".lock").write_bytes(b"")
    rig.hypervisor = FakeHypervisor(of_vm(rig, nvram=nvram, xml=TPM_XML))
    manifest, warning = await backed_up(rig, swtpm=tmp_path / "swtpm")
    assert warning == ""
    assert manifest.metadata[DOMAIN_XML] == TPM_XML
    assert manifest.metadata["path"] == "vm/"
    assert len(manifest.metadata[ASSOCIATED]) < 10_000

    report = restored(rig, manifest, tmp_path / "out")
    assert report.warnings == ()
    assert report.beside == {"domain": ["domain.xml"], "nvram": ["guest_VARS.fd"], "tpm": ["tpm2/tpm2-00.permall"]}
    assert (tmp_path / "out/domain.xml").read_text() == TPM_XML
    assert (tmp_path / "out/guest_VARS.fd").read_bytes() == nvram.read_bytes()
    assert (tmp_path / "out/tpm2/tpm2-00.permall").read_bytes() == b"sealed"
    assert (tmp_path / "out/tpm2/tpm2-00.permall").stat().st_mode & 0o077 == 0
    assert (tmp_path / "out/disk.raw").exists()

    only = restored(rig, manifest, tmp_path / "only", only_beside=True)
    assert (only.file_count, only.size_bytes) == (0, 0)
    assert names_in(tmp_path / "only") == ["domain.xml", "guest_VARS.fd", "tpm2"]


async def test_the_state_of_a_tpm_may_lie_elsewhere_in_a_directory_or_in_one_file(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "tpm").mkdir()
    (tmp_path / "tpm/state").write_bytes(b"sealed")
    for kind, path in (("dir", tmp_path / "tpm"), ("file", tmp_path / "tpm/state")):
        xml = TPM_XML.replace("version='2.0'/>", f"version='2.0'><source type='{kind}' path='{path}'/></backend>")
        rig.hypervisor = FakeHypervisor(of_vm(rig, xml=xml))
        manifest, warning = await backed_up(rig)
        assert warning == ""
        report = restored(rig, manifest, tmp_path / f"out-{kind}")
        assert report.beside == {"domain": ["domain.xml"], "tpm": ["tpm/state"]}
        assert (tmp_path / f"out-{kind}/tpm/state").read_bytes() == b"sealed"


async def test_names_that_the_vm_has_itself_are_not_taken(rig: Rig, tmp_path: Path) -> None:
    rig.make_disk("vm/domain.xml", b"mine")
    rig.make_disk("vm/tpm2", b"mine too")
    state = tmp_path / "swtpm/01234567-89ab-cdef-0123-456789abcdef/tpm2"
    state.mkdir(parents=True)
    for name in "ab":
        (state / name).write_text(name)
    rig.hypervisor = FakeHypervisor(of_vm(rig, xml=TPM_XML))
    manifest, _ = await backed_up(rig, swtpm=tmp_path / "swtpm")
    report = restored(rig, manifest, tmp_path / "out")
    assert report.beside == {"domain": ["vm-domain.xml"], "tpm": ["vm-tpm2/a", "vm-tpm2/b"]}
    assert (tmp_path / "out/domain.xml").read_bytes() == b"mine"


@pytest.mark.parametrize("site", ["associated.open", "associated.read"])
async def test_what_cannot_be_had_is_a_warning_and_no_failure(rig: Rig, tmp_path: Path, site: str) -> None:
    nvram = tmp_path / "VARS.fd"
    nvram.write_bytes(b"x")
    rig.hypervisor = FakeHypervisor(of_vm(rig, nvram=nvram))
    async with rig.running() as services:
        services.files.fail(site, 1, OSError(5, "Input/output error"))
        report = await services.archive("vm")
        assert "without" in report.warning
        assert str(nvram) in report.warning
        assert report.placeholders
        manifest = manifest_of(services)
        assert ASSOCIATED not in manifest.metadata
        assert DOMAIN_XML in manifest.metadata


async def test_a_hypervisor_that_is_away_fails_no_backup(rig: Rig) -> None:
    hypervisor = rig.hypervisor = FakeHypervisor(of_vm(rig))
    hypervisor.away = True
    manifest, warning = await backed_up(rig)
    assert DOMAIN_XML not in manifest.metadata
    assert "libvirt does not answer" in warning


async def test_memory_that_was_saved_elsewhere_is_told_of_and_that_of_the_vm_itself_is_in_the_point(rig: Rig) -> None:
    hypervisor = rig.hypervisor = FakeHypervisor(of_vm(rig, state=GuestState.SAVED))
    for archive in (False, True):
        async with rig.running() as services:
            report = await services.archive("vm", archive=archive)
            assert report.warning == (
                "the restore point is without the memory of domain guest, which was saved to /nowhere: where that is "
                "not, the guest starts as after a power failure"
            )
            assert bool(report.placeholders) == archive
    rig.memory_dir = "saved"
    rig.make_disk("saved/guest.save", b"memory")
    inventory = DirectoryInventory(rig.backing, memory_dir=rig.memory_dir)
    inventory.give_memory(inventory.find("vm"), "guest.save")
    manifest, warning = await backed_up(rig)
    assert (warning, len(manifest.files)) == ("", 2)
    rig.memory_dir = None
    hypervisor.put(UUID, state=GuestState.OFF)
    assert (await backed_up(rig))[1] == ""


async def test_what_is_too_large_is_left_out(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvram = tmp_path / "VARS.fd"
    nvram.write_bytes(os.urandom(1000))
    rig.hypervisor = FakeHypervisor(of_vm(rig, nvram=nvram))
    monkeypatch.setattr(associated, "ENCODED_BYTES_MAX", 1000)
    manifest, warning = await backed_up(rig)
    assert (ASSOCIATED in manifest.metadata, "too large" in warning) == (False, True)
    monkeypatch.setattr(associated, "FILE_BYTES_MAX", 999)
    monkeypatch.setattr(associated, "XML_BYTES_MAX", 5)
    manifest, warning = await backed_up(rig)
    assert DOMAIN_XML not in manifest.metadata
    assert "it has 1000 bytes" in warning


async def test_what_is_below_the_mount_is_never_opened_there(rig: Rig) -> None:
    """It is in the datastore already; a daemon that opens its own mount may wait for itself."""
    rig.hypervisor = FakeHypervisor(of_vm(rig, nvram=rig.mountpoint / "vm/VARS.fd"))
    manifest, warning = await backed_up(rig)
    assert ASSOCIATED not in manifest.metadata
    assert "in a VM of its own" in warning
    rig.make_disk("vm/VARS.fd", b"vars")
    _, warning = await backed_up(rig)
    assert warning == ""


async def test_the_state_of_a_tpm_below_the_mount_is_a_file_of_the_vm_or_told_to_be_missing(rig: Rig) -> None:
    for path in ("other/disk.raw", "other/tpm/state", "vm/tpm/state"):
        rig.make_disk(path, b"sealed")
    for kind, path in (("dir", "other/tpm"), ("file", "other/tpm/state"), ("dir", "vm/tpm"), ("file", "vm/tpm/state")):
        source = rig.mountpoint / path
        xml = TPM_XML.replace("version='2.0'/>", f"version='2.0'><source type='{kind}' path='{source}'/></backend>")
        rig.hypervisor = FakeHypervisor(of_vm(rig, xml=xml))
        _, warning = await backed_up(rig)
        assert (f"without {source}: it is in this datastore" in warning) == path.startswith("other"), path


async def test_neither_a_fifo_nor_a_link_is_read(rig: Rig, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/shadow")
    for name, is_told in (("fifo", True), ("link", True), ("missing", False)):
        rig.hypervisor = FakeHypervisor(of_vm(rig, nvram=tmp_path / name))
        manifest, warning = await backed_up(rig)
        assert ASSOCIATED not in manifest.metadata
        assert (f"without {tmp_path / name}" in warning) == is_told


async def test_what_an_image_is_based_on_is_noted_with_its_identity(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    rig.hypervisor = FakeHypervisor()
    async with rig.running() as services:
        await services.archive("golden")
        await services.archive("clone")
        golden = manifest_of(services, "golden")
        (base,) = json.loads(manifest_of(services, "clone").metadata[BASES])
    (stored,) = golden.files
    assert base == {
        "disk": "disk.qcow2",
        "named": "../golden/base.qcow2",
        "place": "golden/base.qcow2",
        "vm_id": golden.vm_id,
        "size": stored.size,
        "mtime_ns": stored.mtime_ns,
        "point_id": golden.point_id,
    }


def test_an_operator_is_told_what_to_do_with_it() -> None:
    beside = {"domain": ["domain.xml"], "nvram": ["x_VARS.fd"], "tpm": ["tpm2/state"]}
    told = list(_beside_lines(beside, Path("/out")))
    assert "virsh define /out/domain.xml" in told[0]
    assert "NVRAM is /out/x_VARS.fd" in told[1]
    assert "TPM is /out/tpm2/state" in told[2]
    assert list(_beside_lines({}, Path("/out"))) == []


SOUND = AssociatedFile("nvram", "/var/lib/x_VARS.fd", 0o600, b"x" * 10_000)


def test_what_is_encoded_comes_back() -> None:
    files = (SOUND, AssociatedFile("tpm", "/var/lib/swtpm/u/tpm2/tpm2-00.permall", 0o600, b""))
    assert decode_associated(encode_associated(files), "manifest") == files


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "relative"},
        {"path": "/a/../b"},
        {"path": "/a"},
        {"path": "/a/b\0"},
        {"path": "/a/" + "b" * 256},
        {"kind": "disk"},
        {"mode": 0o10000},
        {"mode": True},
        {"data": "AAAA"},
        {"data": "?"},
        {"data": 7},
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object]) -> None:
    (body,) = json.loads(encode_associated([SOUND]))
    with pytest.raises(CorruptManifest):
        decode_associated(json.dumps([body | changes]), "manifests/x")


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, "7", "[7]"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(CorruptManifest):
        decode_associated(text, "manifests/x")


def test_two_of_the_same_name_and_a_name_that_is_also_a_directory_are_refused() -> None:
    other = AssociatedFile("tpm", "/a/x_VARS.fd/state", 0o600, b"")
    for files in ([SOUND, SOUND], [SOUND, other]):
        with pytest.raises(CorruptManifest):
            decode_associated(encode_associated(files), "manifests/x")


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = AssociatedFile("nvram", "/a/b", 0o600, bytes((64 << 20) + 1))
    text = encode_associated([bomb])
    assert len(text) < 1 << 20
    with pytest.raises(CorruptManifest):
        decode_associated(text, "manifests/x")


async def test_damage_in_it_does_not_keep_the_disks_from_being_restored(rig: Rig, tmp_path: Path) -> None:
    rig.hypervisor = FakeHypervisor(of_vm(rig))
    manifest, _ = await backed_up(rig)
    point = rig.store.open_point(manifest.vm_id, manifest.point_id)
    names = (f"{DOMAIN_XML}:../a\0b", f"{DOMAIN_XML}:{'n' * 300}")
    hostile = {ASSOCIATED: "[{}]", names[0]: "<x/>", names[1]: "\ud800", DOMAIN_XML: "x"}
    point = replace(point, manifest=replace(manifest, metadata=hostile))
    report = restore_point(rig.store, point, tmp_path / "out")
    assert "left out" in report.warnings[0]
    assert (tmp_path / "out/disk.raw").stat().st_size == CHUNK * 4
    assert [name[:7] for name in names_in(tmp_path / "out")] == ["disk.ra", "domain-", "domain-", "domain."]
