"""What real firmware and a real emulated TPM keep of a domain is in its restore points, and comes back."""

from __future__ import annotations

from pathlib import Path

from live_datastore import MIB, SMALL_ENDS, MakeDatastore, image, merged, wait_until

from scripts.lab.private_libvirt import LabDisk, PrivateLibvirt

UUID = "0bc7a8a0-4c1f-4f0e-9d2b-6f6d4f0a7a11"
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def test_nvram_and_the_state_of_the_tpm_are_in_the_point_and_come_back(
    base: Path, libvirt: PrivateLibvirt, make_datastore: MakeDatastore
) -> None:
    datastore = make_datastore(merged(SMALL_ENDS, {"libvirt": {"enabled": True, "uri": libvirt.uri, "timeout_s": 2}}))
    datastore.start(view=libvirt.view)
    disk = LabDisk(datastore.add_vm("web", image(2 * MIB, seed=1)))
    nvram, state = base / "web_VARS.fd", libvirt.home / f"lib/swtpm/{UUID}/tpm2"
    firmware = f"<loader readonly='yes' type='pflash'>{FIRMWARE}</loader><nvram template='{VARIABLES}'>{nvram}</nvram>"
    libvirt.define(libvirt.domain_xml("web", [disk], uuid=UUID, firmware=firmware, devices=TPM))
    libvirt.virsh("start", "web")
    wait_until("the firmware has written", lambda: nvram.read_bytes() != VARIABLES.read_bytes())
    libvirt.virsh("destroy", "web")
    (permanent,) = [path for path in state.iterdir() if path.name != ".lock"]
    kept = {nvram: nvram.read_bytes(), permanent: permanent.read_bytes()}

    done = datastore.wait_job(datastore.client.start_backup(["web"], archive=False))
    assert done.result is not None
    assert [vm["message"] for vm in done.result["vms"]] == [""], done

    datastore.archive("web")  # which takes neither away
    assert {path: path.read_bytes() for path in kept} == kept
    libvirt.virsh("undefine", "web", "--nvram", "--tpm")
    assert [path.exists() for path in kept] == [False, False]
    out = base / "out"
    told = datastore.cli("restore", "web", "--to", out, check=0).out
    assert f"its NVRAM is {out / nvram.name}" in told
    assert f"the state of its TPM is {out / 'tpm2' / permanent.name}" in told
    (out / nvram.name).rename(nvram)
    state.parent.mkdir(parents=True)
    (out / "tpm2").rename(state)
    assert {path: path.read_bytes() for path in kept} == kept
    libvirt.define((out / "domain.xml").read_text())
    libvirt.virsh("start", "web")
    libvirt.wait_state("web", "running")
