"""Guests: six real guests of libvirt, two made-up weeks of usage, and jobs that archive exactly the right ones.

Of each guest it is known before what is to become of it:

    raw       a raw disk, off for two weeks                 archived
    qcow2     a qcow2 disk, off for two weeks               archived
    based     qcow2 on a base image, off for two weeks      archived, and by the next job the base
    snap      an external snapshot, off for two weeks       archived
    idle      runs, and does nothing but count in memory    saved by libvirt, archived with its memory
    busy      runs, and writes all the time; has an agent   backed up while it runs, its filesystem at rest

Then each that is archived is started by ``virsh start`` and has to reach its boot marker; the idle one goes on
counting where it was.  The busy one's restore point has to pass fsck without a replay of its journal, and to boot.
Every round begins anew, and has to decide the same.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.lab.datastore import Datastore, Settings, copy_sparse, datastore_in, with_settings, working_directory
from scripts.lab.failure import LabError, run
from scripts.lab.guest import COUNT, DONE, MARKER, Guest, built_guest, needs_replay
from scripts.lab.private_libvirt import AGENT_CHANNEL, LabDisk, PrivateLibvirt
from scripts.lab.qemu import BOOT_DEADLINE_S, DiskFormat, Machine, boot, usable_accelerator
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import HOUR_S, Sample

WEEKS_S: Final = 15 * 24 * HOUR_S
"""Two weeks, and a day before them."""
RULE: Final = "two idle weeks"
_RULES: Final = f"""
[[policy.rules]]
name = "{RULE}"
off_for = "14d"
idle = {{ window = "14d" }}
when_running = "managed-save"
"""
SETTINGS: Final[Settings] = {
    "archive": {"enabled": True, "placeholder_bytes_min": "1 MiB"},
    "policy": {"archives_per_job_max": 10, "free_floor_percent": 0},
    "usage": {"interval_s": 3600},
}
_COUNT_DEADLINE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Planned:
    """A guest: its disk (below the mountpoint), what the job has to do with it, and what it does while it runs."""

    name: str
    disk: str
    format: DiskFormat
    outcome: str
    runs: str = ""


GUESTS: Final = (
    Planned("raw", "raw/disk.raw", "raw", "archived"),
    Planned("qcow2", "qcow2/disk.qcow2", "qcow2", "archived"),
    Planned("based", "based/disk.qcow2", "qcow2", "archived"),
    Planned("snap", "snap/disk.qcow2", "qcow2", "archived"),
    Planned("idle", "idle/disk.raw", "raw", "archived", runs="vmfs.count"),
    Planned("busy", "busy/disk.qcow2", "qcow2", "backed up", runs="vmfs.agent vmfs.busy"),
)
BASE: Final = "base/disk.qcow2"


class GuestsSoak:
    """Six real guests, two made-up weeks, and every guest started again."""

    about = (__doc__ or "").splitlines()[0]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How often."""
        parser.add_argument("--rounds", type=int, default=2, help="how often, each from the start (default 2)")

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Play the rounds; raises LabError of whatever is not as it has to be.  The seed changes nothing."""
        guest = built_guest(print)
        decided = [play(guest, number) for number in range(1, options.rounds + 1)]
        if any(each != decided[0] for each in decided):
            raise LabError(f"the same two weeks were judged in different ways: {decided}")
        return f"{options.rounds} rounds of {len(GUESTS)} guests: archived, backed up and started as planned"


def play(guest: Guest, number: int) -> Mapping[str, str]:
    """One round; returns what became of each VM, and by which rule."""
    with working_directory(Path("/var/tmp")) as home, datastore_in(home, SETTINGS) as datastore:
        (home / "v").mkdir()
        libvirt = PrivateLibvirt(home / "v", shared=home)
        try:
            place = Place(guest, datastore, libvirt, number)
            place.serve()
            place.furnish()
            place.make_history()
            decided = place.run_jobs()
            place.start_all()
            place.check_busy()
            return decided
        finally:
            libvirt.end()


class Place:
    """The datastore, the hypervisor and the guests of one round."""

    def __init__(self, guest: Guest, datastore: Datastore, libvirt: PrivateLibvirt, number: int) -> None:
        self._guest = guest
        self._datastore = datastore
        self._libvirt = libvirt
        self._number = number

    def _say(self, text: str) -> None:
        print(f"guests, round {self._number}: {text}", flush=True)

    def _path(self, relative: str) -> Path:
        return self._datastore.mountpoint / relative

    def serve(self) -> None:
        """Daemon and libvirtd, each knowing of the other; the memory of saved guests goes to the mount."""
        libvirt, config = self._libvirt, self._datastore.config
        libvirt.share()
        self._datastore.mount()
        self._path("saved").mkdir()
        libvirt.save_dir.symlink_to(self._path("saved"))
        libvirt.start()
        self._datastore.unmount()
        known: Settings = {
            "libvirt": {"enabled": True, "uri": libvirt.uri, "save_dir": str(libvirt.save_dir)},
        }
        config.write_text(with_settings(config.read_text(), known) + _RULES)
        self._datastore.mount()

    def furnish(self) -> None:
        """Images, domains, and those that run."""
        self._say("making images and domains")
        for relative in (BASE, *(planned.disk for planned in GUESTS)):
            self._path(relative).parent.mkdir()
        for relative in (BASE, "qcow2/disk.qcow2", "snap/disk.qcow2", "busy/disk.qcow2"):
            copy_sparse(self._guest.qcow2, self._path(relative))
        for relative in ("raw/disk.raw", "idle/disk.raw"):
            copy_sparse(self._guest.raw, self._path(relative))
        based = self._path("based/disk.qcow2")
        _qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"../{BASE}", "-F", "qcow2", based)
        for planned in GUESTS:
            disk = LabDisk(self._path(planned.disk), planned.format)
            parameters = (planned.runs,) if planned.runs else ()
            self._libvirt.define(
                self._libvirt.domain_xml(
                    planned.name, [disk], guest=self._guest, parameters=parameters, devices=AGENT_CHANNEL
                )
            )
        self._libvirt.virsh("snapshot-create-as", "snap", "after", "--disk-only", "--atomic")
        for overlay in (based, self._path("snap/disk.after")):
            _qemu("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 3G 4M", overlay)
        for planned in GUESTS:
            if planned.runs:
                self._libvirt.virsh("start", planned.name)
        for planned in GUESTS:
            if planned.runs:
                self._libvirt.wait_console(planned.name, DONE, deadline_s=BOOT_DEADLINE_S)
        self._libvirt.wait_agent("busy")

    def make_history(self) -> None:
        """Two weeks and a day of samples of every VM, that end now."""
        rows = self._policy()
        now_s = time.time()
        with closing(Catalog.open(load_config(self._datastore.config).catalog_path)) as catalog:
            for name, row in rows.items():
                vm_id = VmId(row["vm_id"])
                catalog.add_samples((vm_id, sample) for sample in _samples(name, now_s))

    def _policy(self) -> dict[str, dict[str, Any]]:
        rows = json.loads(self._datastore.vmfs("policy", "--json"))
        return {row["vm"]: row for row in rows}

    def run_jobs(self) -> dict[str, str]:
        """The job of one night, and that of the next; raises LabError when any VM is not dealt with as planned."""
        counted = self._count()
        planned = {each.name: each.outcome for each in GUESTS} | {"base": "backed up"}
        decided = self._job(planned)
        self._say(f"the guest that counts was saved at about {counted}")
        next_night = {name: "archived" if name == "base" else "backed up" for name in planned}
        return decided | {"base": self._job(next_night)["base"]}

    def _job(self, planned: Mapping[str, str]) -> dict[str, str]:
        self._say("a job")
        client = ControlClient(load_config(self._datastore.config).socket_path, timeout_s=BOOT_DEADLINE_S)
        began_s = time.monotonic()
        info = client.wait_job(client.start_backup([], archive=True), lambda _: None)
        outcomes = {vm["vm"]: vm for vm in (info.result or {}).get("vms", ())}
        for name, vm in sorted(outcomes.items()):
            self._say(f"{name}: {vm['outcome']}, {vm['message'] or vm['reason']} ({vm['seconds']:.1f} s)")
        self._say(f"{info.state} after {time.monotonic() - began_s:.1f} s")
        found = {name: vm["outcome"] for name, vm in outcomes.items()}
        if info.state != "done" or found != dict(planned):
            raise LabError(f"the job is {info.state} ({info.error}): {found}, and not {dict(planned)}")
        if outcomes["busy"]["consistency"] != "quiesced":
            raise LabError(f"the busy guest was not at rest when it was backed up: {outcomes['busy']}")
        unreasoned = [name for name, vm in outcomes.items() if not vm["reason"]]
        if unreasoned:
            raise LabError(f"no reason is given for {unreasoned}")
        return {name: f"{vm['outcome']} by {vm['rule']}" for name, vm in outcomes.items()}

    def _count(self) -> int:
        """How far the guest that counts in its memory has come, by its console."""
        counts = re.findall(rf"{COUNT} (\d+)", self._libvirt.console("idle").read_text(errors="replace"))
        return int(counts[-1]) if counts else 0

    def start_all(self) -> None:
        """Start each guest that was archived; raises LabError when one does not come up."""
        for planned in GUESTS:
            if planned.outcome != "archived":
                continue
            console = self._libvirt.console(planned.name)
            seen = console.stat().st_size if console.exists() else 0
            counted, began_s = self._count() if planned.name == "idle" else 0, time.monotonic()
            self._libvirt.virsh("start", planned.name)
            if planned.name == "idle":
                self._wait_counting(counted, seen)
            else:
                self._libvirt.wait_console(planned.name, MARKER, deadline_s=BOOT_DEADLINE_S, since=seen)
            self._say(f"{planned.name} is up after {time.monotonic() - began_s:.1f} s")
            self._libvirt.virsh("destroy", planned.name)

    def _wait_counting(self, counted: int, seen: int) -> None:
        """It has to go on where it was, and not to boot."""
        until_s = time.monotonic() + _COUNT_DEADLINE_S
        while self._count() <= counted:
            if time.monotonic() > until_s:
                raise LabError(f"the guest that counted to {counted} does not go on")
            time.sleep(0.5)
        text = self._libvirt.console("idle").read_bytes()[seen:].decode(errors="replace")
        first = re.search(rf"{COUNT} (\d+)", text)
        if MARKER in text or first is None or not counted < int(first[1]) <= counted + 3:
            raise LabError(f"the guest that counted to {counted} has not gone on where it was: {text[:500]!r}")

    def check_busy(self) -> None:
        """The point of the guest that wrote all the time passes fsck, and boots.  Raises LabError."""
        if self._libvirt.state("busy") != "running":
            raise LabError("the busy guest does not run any more")
        self._libvirt.virsh("destroy", "busy")
        out = self._datastore.home / "restored"
        self._datastore.vmfs("restore", "busy", "--to", str(out))
        raw = out / "disk.raw"
        _qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", out / "disk.qcow2", raw)
        if needs_replay(raw):
            raise LabError("the busy guest was told to be at rest, and its journal has what is not in its place")
        run(["e2fsck", "-fn", raw], deadline_s=BOOT_DEADLINE_S)
        boot(Machine(self._guest, raw, "raw", usable_accelerator(self._guest)), fast=True)
        self._say("the busy guest's point passes fsck and boots")


def _samples(name: str, now_s: float) -> Iterator[Sample]:
    """How that VM was used: by the hour, up to now."""
    for hour in range(int(WEEKS_S // HOUR_S), 0, -1):
        start_s = now_s - hour * HOUR_S
        span = (start_s, start_s + HOUR_S)
        if name == "idle":
            yield Sample(*span, 0.0, HOUR_S, 1.0, 100.0, 10.0, cpu_s=20.0)
        elif name == "busy":
            yield Sample(*span, 0.0, HOUR_S, 90.0, 5e6, 10.0, cpu_s=3000.0)
        else:
            yield Sample(*span, HOUR_S, 0.0, 0.0, 0.0, 0.0)


def _qemu(*words: str | Path) -> None:
    run(words, deadline_s=BOOT_DEADLINE_S)
