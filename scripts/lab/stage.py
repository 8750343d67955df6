"""What the demos have in common: how they tell and check, their two guests, cold boots, and the store they play in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from scripts.lab.datastore import Datastore, Recalled, Settings, copy_sparse, drop_caches
from scripts.lab.disktrace import Extent, read_trace
from scripts.lab.failure import LabError, run
from scripts.lab.guest import Guest
from scripts.lab.qemu import Machine, boot, usable_accelerator
from scripts.lab.s3_server import Bucket, ceph_s3, new_bucket

RAW_VM, QCOW2_VM = "debian-raw", "debian-qcow2"
# Left on, hydration brings a disk this small back within a second or two: nobody would see what a boot alone needs.
NO_HYDRATION: Settings = {"hydration": {"enabled": False}}
NOTE_FILE, NOTE = "note.txt", "written-while-archived"

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class ColdBoot:
    """Seconds to the marker, what was recalled until then, the files that it was asked for, and what it wrote."""

    marker_s: float
    recalled: Recalled
    files: dict[str, str]
    writes: tuple[Extent, ...]


def tell(text: str) -> None:
    """One line for whoever watches, with the time."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/]  {text}")


def step(text: str) -> None:
    """A heading."""
    console.print(f"\n[bold]{text}[/]")


def check(holds: bool, claim: str) -> None:
    """Show that a claim holds; raises LabError when it does not."""
    if not holds:
        raise LabError(f"NOT TRUE: {claim}")
    tell(f"[green]checked[/]  {claim}")


def mebibytes(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / (1 << 20):,.1f} MiB"


def show(command: list[str | Path]) -> None:
    """Run a command as a person would, and show what it prints."""
    console.print(f"[cyan]$ {' '.join(map(str, command))}[/]")
    console.print(run(command, deadline_s=60).rstrip(), markup=False)


def put_guests(datastore: Datastore, guest: Guest) -> tuple[Machine, Machine]:
    """The guest as a raw and as a qcow2 VM; their disks are put where a daemon will find them, so none may run yet."""
    accelerator = usable_accelerator(guest)
    if accelerator == "tcg":
        tell("KVM does not run guests here: they are emulated, and a full boot takes 20 seconds or more.")
    raw = Machine(guest, datastore.mountpoint / RAW_VM / "disk.raw", "raw", accelerator)
    qcow2 = Machine(guest, datastore.mountpoint / QCOW2_VM / "disk.qcow2", "qcow2", accelerator)
    for machine, image in ((raw, guest.raw), (qcow2, guest.qcow2)):
        target = datastore.backing_of(machine.disk)
        target.parent.mkdir()
        copy_sparse(image, target)
    return raw, qcow2


def boot_cold(datastore: Datastore, machine: Machine, *parameters: str, fast: bool = False) -> ColdBoot:
    """Boot a VM of a datastore that is mounted, with nothing cached on the host, until it has powered itself off."""
    with suppress(LabError):  # a container may forbid it; then the boot is measured warm
        drop_caches()
    trace, before, at_marker = datastore.home / "trace", datastore.recalled(), list[Recalled]()

    def look() -> None:
        at_marker.append(datastore.recalled())

    with console.status(f"booting {machine.disk.parent.name}"):
        done = boot(machine, fast=fast, parameters=parameters, trace=trace, at_marker=look)
    writes = read_trace(trace).writes
    trace.unlink()
    return ColdBoot(done.marker_s, at_marker[0].since(before), done.files, writes)


@contextmanager
def bucket_of(home: Path, store: str) -> Iterator[Bucket | None]:
    """Where ``store`` is s3, a bucket of an S3 server of its own that runs in ``home``."""
    if store != "s3":
        yield None
        return
    tell("starting an S3 server: Ceph's gateway, with one monitor and one object store daemon")
    (home / "s3").mkdir()
    with ceph_s3(home / "s3") as server:
        yield new_bucket(server.account)
