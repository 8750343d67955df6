"""A real agent in a real guest brings its filesystems to rest for a backup; the guest goes on, with and without it."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from live_datastore import MIB, SMALL_ENDS, LiveDatastore, MakeDatastore, merged, wait_until

from scripts.lab.failure import LabError
from scripts.lab.guest import DONE, Guest, needs_replay
from scripts.lab.private_libvirt import AGENT_CHANNEL, LabDisk, PrivateLibvirt

DATA_SIZE = 64 * MIB
BACKUP_DEADLINE_S = 120.0


@pytest.fixture
def datastore(libvirt: PrivateLibvirt, make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(merged(SMALL_ENDS, {"libvirt": {"enabled": True, "uri": libvirt.uri, "timeout_s": 2}}))
    made.start()
    return made


@pytest.fixture
def web(datastore: LiveDatastore, libvirt: PrivateLibvirt, guest: Guest) -> str:
    """The name of a domain whose guest writes all the time to the disk of the VM, and whose agent answers."""
    system, data = datastore.base / "system.qcow2", datastore.mountpoint / "web/data.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", guest.qcow2, system], check=True)
    data.parent.mkdir()
    with data.open("xb") as file:
        file.truncate(DATA_SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", data], check=True)
    disks = [LabDisk(system, "qcow2"), LabDisk(data, target="vdb")]
    parameters = ("vmfs.agent", "vmfs.busy=vdb")
    libvirt.define(libvirt.domain_xml("web", disks, guest=guest, parameters=parameters, devices=AGENT_CHANNEL))
    libvirt.virsh("start", "web")
    libvirt.wait_console("web", DONE)
    libvirt.wait_agent("web")
    wait_written(libvirt)
    return "web"


def written_bytes(libvirt: PrivateLibvirt) -> int:
    """How much the guest wrote to the disk since its start."""
    rows = [row.split() for row in libvirt.virsh("domblkstat", "web", "vdb").splitlines()]
    return next(int(row[-1]) for row in rows if row[-2] == "wr_bytes")


def wait_written(libvirt: PrivateLibvirt) -> None:
    before = written_bytes(libvirt)
    wait_until("the guest writes on", lambda: written_bytes(libvirt) > before + 8 * MIB, poll_s=0.2)


def backed_up(datastore: LiveDatastore) -> tuple[str, str]:
    """The restore point, and its consistency."""
    done = datastore.wait_job(datastore.client.start_backup(["web"], archive=False), deadline_s=BACKUP_DEADLINE_S)
    assert done.state == "done", done
    assert done.result is not None
    (outcome,) = done.result["vms"]
    return outcome["point_id"], outcome["consistency"]


def restored(datastore: LiveDatastore, point_id: str) -> Path:
    to = datastore.base / point_id
    datastore.cli("restore", f"web@{point_id}", "--to", to, check=0)
    return to / "data.raw"


def hang_agent(libvirt: PrivateLibvirt) -> None:
    """Have the agent stop itself; its answer may be lost."""
    with suppress(LabError):
        libvirt.ask_agent("web", "guest-exec", path="/bin/sh", arg=["-c", "kill -STOP $(pidof qemu-ga)"])
    wait_until("the agent is silent", lambda: not libvirt.has_agent("web"))


def test_a_guest_is_at_rest_by_its_agent_and_goes_on_with_and_without_it(
    datastore: LiveDatastore, libvirt: PrivateLibvirt, web: str
) -> None:
    at_rest, consistency = backed_up(datastore)
    assert consistency == "quiesced"
    assert libvirt.ask_agent(web, "guest-fsfreeze-status") == "thawed"
    wait_written(libvirt)
    libvirt.virsh("domfsfreeze", web)
    assert backed_up(datastore)[1] == "crash"
    assert libvirt.ask_agent(web, "guest-fsfreeze-status") == "frozen", "who has frozen it relies on that"
    libvirt.virsh("domfsthaw", web)
    wait_written(libvirt)
    hang_agent(libvirt)
    not_at_rest, consistency = backed_up(datastore)
    assert consistency == "crash"
    wait_written(libvirt)
    image = restored(datastore, at_rest)
    assert not needs_replay(image)
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked
    assert needs_replay(restored(datastore, not_at_rest)), "of such a guest it would be seen"
