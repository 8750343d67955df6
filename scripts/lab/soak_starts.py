"""Starts: a real guest is started by libvirt while its VM is being archived, again and again, and has to boot.

The start comes at a random moment of the job.  Whoever is first, the guest boots to its marker, from a disk that is
whole or a placeholder that is coming back; the job is done, or says that the VM is in use; and the next one, with the
guest off, is done.  At the end the disk passes fsck.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Final

from scripts.lab.datastore import Datastore, Settings, copy_sparse, datastore_in, with_settings, working_directory
from scripts.lab.failure import LabError, run
from scripts.lab.guest import MARKER, Guest, built_guest
from scripts.lab.private_libvirt import LabDisk, PrivateLibvirt
from scripts.lab.qemu import BOOT_DEADLINE_S
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.messages import JobInfo

SETTINGS: Final[Settings] = {
    "archive": {"resident_head_bytes": 0, "resident_tail_bytes": 0, "placeholder_bytes_min": "1 MiB"},
}
_VM: Final = "web"
_GOES_FIRST: Final = frozenset({"InUse", "Abandoned"})
"""What a job says of a VM that was started meanwhile."""


class StartsSoak:
    """Starts of a guest beside archives of its VM."""

    about = (__doc__ or "").splitlines()[0]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How often."""
        parser.add_argument("--races", type=int, default=20, help="how many starts (default 20)")

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Play the races; raises LabError when a guest does not boot, or the next job fails."""
        guest, chance, found = built_guest(print), random.Random(seed), Counter[str]()
        with working_directory(Path("/var/tmp")) as home, datastore_in(home, SETTINGS) as datastore:
            (home / "v").mkdir()
            libvirt = PrivateLibvirt(home / "v", shared=home)
            try:
                race = _Race(guest, datastore, libvirt)
                race.set_up()
                for number in range(1, options.races + 1):
                    delay_s = chance.uniform(0.0, 1.2) * race.job_s
                    outcome = race.run(delay_s)
                    found[outcome] += 1
                    print(f"starts: {number}: after {delay_s:.2f} s of {race.job_s:.2f}: {outcome}", flush=True)
                race.check_disk()
            finally:
                libvirt.end()
        return f"{options.races} starts, every guest booted: {dict(found)}"


class _Race:
    """The guest and its VM; ``job_s`` is how long an archive of all of it takes."""

    def __init__(self, guest: Guest, datastore: Datastore, libvirt: PrivateLibvirt) -> None:
        self._guest = guest
        self._datastore = datastore
        self._libvirt = libvirt
        self._disk = datastore.mountpoint / _VM / "disk.raw"
        self.job_s = 0.0

    def set_up(self) -> None:
        """Daemon, libvirtd, and the guest, off and whole."""
        libvirt, config = self._libvirt, self._datastore.config
        libvirt.share()
        known: Settings = {"libvirt": {"enabled": True, "uri": libvirt.uri}}
        config.write_text(with_settings(config.read_text(), known))
        self._datastore.mount()
        self._disk.parent.mkdir()
        copy_sparse(self._guest.raw, self._disk)
        libvirt.start()
        libvirt.define(libvirt.domain_xml(_VM, [LabDisk(self._disk)], guest=self._guest, parameters=["vmfs.stay"]))
        self._client = ControlClient(load_config(config).socket_path, timeout_s=BOOT_DEADLINE_S)
        self._wait_libvirt()
        began_s = time.monotonic()
        self._done(self._archive())
        self.job_s = time.monotonic() - began_s
        self._whole()

    def _wait_libvirt(self) -> None:
        until_s = time.monotonic() + BOOT_DEADLINE_S
        while not (found := self._client.status().libvirt) or not found.connected:
            if time.monotonic() > until_s:
                raise LabError("the daemon does not find libvirt")
            time.sleep(0.1)

    def run(self, delay_s: float) -> str:
        """One race; returns who was first."""
        console = self._libvirt.console(_VM)
        seen = console.stat().st_size if console.exists() else 0
        job_id = self._client.start_archive([_VM])
        time.sleep(delay_s)
        self._libvirt.virsh("start", _VM)
        info = self._client.wait_job(job_id, lambda _: None)
        self._libvirt.wait_console(_VM, MARKER, deadline_s=BOOT_DEADLINE_S, since=seen)
        self._libvirt.virsh("destroy", _VM)
        first = "the start" if info.error is not None else "the archive"
        if info.error is not None and info.error.error not in _GOES_FIRST:
            raise LabError(f"the job failed for another reason than the start: {info.error}")
        self._done(self._archive())
        self._whole()
        return first

    def _archive(self) -> JobInfo:
        """An archive with the guest off; the kernel may tell of the last close a moment later."""
        until_s = time.monotonic() + BOOT_DEADLINE_S
        while True:
            info = self._client.wait_job(self._client.start_archive([_VM]), lambda _: None)
            if info.error is None or info.error.error not in _GOES_FIRST or time.monotonic() > until_s:
                return info
            time.sleep(0.1)

    def _done(self, info: JobInfo) -> None:
        if info.error is not None:
            raise LabError(f"the archive with the guest off failed: {info.error}")

    def _whole(self) -> None:
        """All back, so that the next archive takes as long."""
        info = self._client.wait_job(self._client.start_recall([_VM]), lambda _: None)
        if info.error is not None:
            raise LabError(f"the recall failed: {info.error}")

    def check_disk(self) -> None:
        """What is left passes fsck.  Raises LabError."""
        copy = self._datastore.home / "copy.raw"
        copy_sparse(self._disk, copy)
        run(["e2fsck", "-p", copy], deadline_s=BOOT_DEADLINE_S, allowed=(0, 1))
        run(["e2fsck", "-fn", copy], deadline_s=BOOT_DEADLINE_S)
