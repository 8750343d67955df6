"""The demo: two real VMs are archived, and boot again through the mount as if nothing had happened.

Everything happens in one temporary directory and is gone at the end, but for the built guest.  Each claim is checked;
the first that does not hold ends the demo with exit code 1.  With --hosts it is about several hosts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from scripts.lab import demo_hosts
from scripts.lab.datastore import (
    Datastore,
    Recalled,
    allocated_bytes,
    copy_sparse,
    datastore_in,
    end_on_signals,
    seconds,
    working_directory,
)
from scripts.lab.disktrace import Extent, differing
from scripts.lab.failure import LabError, run
from scripts.lab.guest import Guest, built_guest
from scripts.lab.qemu import Machine
from scripts.lab.s3_server import Bucket
from scripts.lab.stage import (
    NO_HYDRATION,
    NOTE,
    NOTE_FILE,
    QCOW2_VM,
    RAW_VM,
    ColdBoot,
    boot_cold,
    bucket_of,
    check,
    console,
    mebibytes,
    put_guests,
    show,
    step,
    tell,
)


@dataclass(slots=True)
class Figures:
    """What the closing table shows of one VM; bytes and seconds."""

    size: int = 0
    before: int = 0
    after: int = 0
    recalled: Recalled = field(default_factory=Recalled)
    resident_s: float = 0
    archived_s: float = 0


class Demo:
    """The two VMs and what was measured; ``written`` is every extent that the raw VM's guest ever wrote."""

    def __init__(self, datastore: Datastore, guest: Guest) -> None:
        self.datastore = datastore
        self.raw, self.qcow2 = put_guests(datastore, guest)
        self.figures = {RAW_VM: Figures(), QCOW2_VM: Figures()}
        self.written: list[Extent] = []

    def backing_file(self, machine: Machine) -> Path:
        """Where the bytes of a machine's disk really lie."""
        return self.datastore.backing_of(machine.disk)

    def boot_cold(self, machine: Machine, *parameters: str, fast: bool = False) -> ColdBoot:
        """Boot with nothing cached on the host; remembers what the guest wrote."""
        done = boot_cold(self.datastore, machine, *parameters, fast=fast)
        if machine is self.raw:
            self.written += done.writes
        return done


def prepare(home: Path, datastore: Datastore, guest: Guest) -> Demo:
    """Put the two VMs on primary storage and start the daemon."""
    step("1. Two VMs on primary storage, seen through the mount")
    tell(f"working in {home}")
    demo = Demo(datastore, guest)
    datastore.mount()
    tell(f"vmfs-stub init, vmfs-stub mount --background: the daemon is process {datastore.daemon_pid}")
    return demo


def boot_resident(demo: Demo) -> Path:
    """Boot both VMs while their disks are ordinary files; returns a copy of the raw disk as it is after that."""
    step("2. Boot them while they are resident (caches cold)")
    for machine, name, fast in ((demo.raw, RAW_VM, False), (demo.qcow2, QCOW2_VM, True)):
        done = demo.boot_cold(machine, fast=fast)
        demo.figures[name].resident_s = done.marker_s
        tell(f"{name}: up after {done.marker_s:.1f} s{' (minimal boot)' if fast else ''}, then it powered itself off")
    reference = demo.datastore.home / "reference.raw"
    copy_sparse(demo.backing_file(demo.raw), reference)
    demo.written.clear()
    return reference


def archive(demo: Demo) -> None:
    """Archive both VMs and show what is left on primary storage."""
    step("3. Archive them: copied, read back, verified; what is left are placeholders")
    for machine, name in ((demo.raw, RAW_VM), (demo.qcow2, QCOW2_VM)):
        figures, file = demo.figures[name], demo.backing_file(machine)
        figures.size, figures.before = file.stat().st_size, allocated_bytes(file)
        took_s = seconds(demo.datastore.vmfs, "archive", name)
        figures.after = allocated_bytes(file)
        tell(f"vmfs-stub archive {name}: {took_s:.1f} s; {mebibytes(figures.before)} -> {mebibytes(figures.after)}")
        check(figures.after < figures.before / 20, f"{name} occupies less than a twentieth of what it did")
        check(machine.disk.stat().st_size == figures.size, f"{name} still has its size, {mebibytes(figures.size)}")
    mountpoint = demo.datastore.mountpoint
    show(["ls", "-ls", mountpoint / RAW_VM, mountpoint / QCOW2_VM])
    show(["du", "-sh", mountpoint])
    tell(f"the store, {demo.datastore.store_url}, has {mebibytes(demo.datastore.store_bytes())}")
    console.print("[cyan]$ vmfs-stub ls[/]")
    console.print(demo.datastore.vmfs("ls").rstrip(), markup=False)


def boot_archived(demo: Demo) -> None:
    """Boot both VMs again by the very same command lines."""
    step("4. Boot them again: the same command lines, nothing was restored by anybody")
    tell("background hydration is off in this demo, so that you see what a boot alone brings back")
    for machine, name, fast in ((demo.raw, RAW_VM, False), (demo.qcow2, QCOW2_VM, True)):
        figures = demo.figures[name]
        done = demo.boot_cold(machine, *([f"vmfs.write={NOTE_FILE}:{NOTE}"] if machine is demo.raw else []), fast=fast)
        figures.archived_s, figures.recalled = done.marker_s, done.recalled
        tell(f"{name}: up after {done.marker_s:.1f} s; {mebibytes(done.recalled.total)} came back for that")
    tell(f"meanwhile the guest of {RAW_VM} wrote a file: {NOTE_FILE}")
    done = demo.boot_cold(demo.raw, f"vmfs.read={NOTE_FILE}", fast=True)
    check(done.files.get(NOTE_FILE) == NOTE, "the file that the guest wrote is there at its next boot")
    states = {disk.vm: disk.state for disk in demo.datastore.disks()}
    check("resident" not in states.values(), "neither disk is whole on primary yet")


def recall(demo: Demo, reference: Path) -> None:
    """Bring both VMs back and prove that every bit is what it should be."""
    step("5. Bring everything back, and compare bit for bit")
    for name in (RAW_VM, QCOW2_VM):
        tell(f"vmfs-stub recall {name}: {seconds(demo.datastore.vmfs, 'recall', name):.1f} s")
    states = {disk.vm: disk.state for disk in demo.datastore.disks()}
    check(set(states.values()) == {"resident"}, "both are ordinary files again")
    raw, qcow2 = demo.backing_file(demo.raw), demo.backing_file(demo.qcow2)
    outside = differing(raw, reference, but_for=demo.written)
    check(outside is None, f"{RAW_VM} equals its copy from before the archive, but for what its guest wrote since")
    check(differing(raw, demo.raw.disk) is None, f"{RAW_VM} reads the same through the mount and beneath it")
    filesystem = subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True)
    check(filesystem.returncode == 0, "the guest's filesystem has no error")
    run(["qemu-img", "check", "-q", "-f", "qcow2", qcow2], deadline_s=300)
    check(True, f"qemu-img check finds no error in {QCOW2_VM}")
    done = demo.boot_cold(demo.raw, f"vmfs.read={NOTE_FILE}", fast=True)
    check(done.files.get(NOTE_FILE) == NOTE, "the file that the guest wrote is there after the full recall")


def recall_untouched(demo: Demo, reference: Path) -> None:
    """Archive a VM and bring it back without ever booting it: not one byte may differ."""
    copy_sparse(demo.backing_file(demo.qcow2), reference.with_suffix(".qcow2"))
    demo.datastore.vmfs("archive", QCOW2_VM)
    demo.datastore.vmfs("recall", QCOW2_VM)
    same = differing(reference.with_suffix(".qcow2"), demo.backing_file(demo.qcow2)) is None
    check(same, f"{QCOW2_VM}, archived and recalled without a boot, is the same file byte for byte")


def closing_table(demo: Demo, store_bytes: int) -> Table:
    """What was measured, one column a VM."""
    table = Table(title="What it comes to")
    table.add_column("")
    for name in demo.figures:
        table.add_column(name, justify="right")
    rows = {
        "image size": [mebibytes(f.size) for f in demo.figures.values()],
        "on primary before archiving": [mebibytes(f.before) for f in demo.figures.values()],
        "on primary after archiving": [mebibytes(f.after) for f in demo.figures.values()],
        "recalled to reach the marker": [mebibytes(f.recalled.total) for f in demo.figures.values()],
        "seconds to the marker, resident": [f"{f.resident_s:.1f}" for f in demo.figures.values()],
        "seconds to the marker, archived": [f"{f.archived_s:.1f}" for f in demo.figures.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    table.caption = (
        f"in the store, both together: {mebibytes(store_bytes)} ({RAW_VM}: full boot, {QCOW2_VM}: minimal boot)"
    )
    return table


def play(home: Path, guest: Guest, bucket: Bucket | None) -> None:
    """The demo of one host in ``home``; raises LabError at the first claim that does not hold."""
    with datastore_in(home, NO_HYDRATION, bucket=bucket) as datastore:
        demo = prepare(home, datastore, guest)
        reference = boot_resident(demo)
        archive(demo)
        store_bytes = datastore.store_bytes()
        boot_archived(demo)
        recall(demo, reference)
        recall_untouched(demo, reference)
        datastore.unmount()
        check(not any(datastore.mountpoint.iterdir()), "after 'unmount' the mountpoint is empty")
        console.print()
        console.print(closing_table(demo, store_bytes))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--store", choices=["file", "s3"], default="file", help="a directory (default), or a bucket of a real S3 server"
    )
    parser.add_argument(
        "--hosts", action="store_true", help="instead: hosts that share the store adopt VMs, one is lost, one leaves"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run the demo; exit code 0 when every claim held, 1 when one did not, 130 when interrupted."""
    options = parse()
    end_on_signals()
    started_s = time.monotonic()
    try:
        guest = built_guest(tell)
        with working_directory() as home, bucket_of(home, options.store) as bucket:
            (demo_hosts.play if options.hosts else play)(home, guest, bucket)
        took_s = time.monotonic() - started_s
        console.print(
            f"\nAll of it held. {took_s:.0f} seconds; nothing is left but the built guest, {guest.directory}."
        )
    except LabError as failure:
        console.print(f"\n[bold red]demo failed:[/] {escape(str(failure))}")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything was cleaned up")
        sys.exit(130)


if __name__ == "__main__":
    main()
