"""The demo of hosts: three share one store; VMs go from one to another, one host is lost, and one leaves.

Each host is a daemon on this machine with a name, a backing directory, a mount and an id of its own.  What a file has
to hold is known without us: from the image it was made of, from a copy that was taken before anything was archived,
and from what QEMU says that its guest wrote.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.markup import escape

from scripts.lab.appearance import Described, appearance
from scripts.lab.datastore import COMMAND_DEADLINE_S, Datastore, allocated_bytes, copy_sparse, datastore_in, ended
from scripts.lab.disktrace import Extent, differing
from scripts.lab.failure import LabError, run
from scripts.lab.guest import MARKER, Guest
from scripts.lab.qemu import BOOT_DEADLINE_S, Machine, boot, running
from scripts.lab.s3_server import Bucket
from scripts.lab.stage import (
    NO_HYDRATION,
    NOTE,
    NOTE_FILE,
    QCOW2_VM,
    RAW_VM,
    boot_cold,
    check,
    console,
    mebibytes,
    put_guests,
    show,
    step,
    tell,
)
from vmfs_stub.core.names import PRIVATE_DIR, XATTR_PREFIX
from vmfs_stub.mount.mountpoint import is_mounted

ODD_VM, BLANK_VM = "Café & sons (old)", "-blank $1"
_ALL_VMS: Final = (RAW_VM, QCOW2_VM, ODD_VM, BLANK_VM)
_ODD_DISK: Final = Path(ODD_VM, "disk, 1.img")
_DISK_BYTES: Final = 24 << 20
_DISK_BYTES_MIN: Final = 8 << 20
"""Smaller files do not become placeholders, as the configuration has it."""
_ENDS_S: Final = 10.0


@dataclass(slots=True)
class Known:
    """What has to be there again, by the path below the mount: the ``originals``' bytes and what each name looks like.

    ``written`` is every extent that the raw VM's guest wrote on any host.
    """

    originals: dict[Path, Path] = field(default_factory=dict)
    looks: dict[Path, Described] = field(default_factory=dict)
    written: list[Extent] = field(default_factory=list)

    def look_at(self, datastore: Datastore, vm: str) -> None:
        """From now on it is as it is on this host."""
        seen = appearance(datastore.mountpoint)
        self.looks |= {path: look for path, look in seen.items() if path.parts[0] == vm}

    def check_looks(self, top: Path, claim: str) -> None:
        """Everything, and nothing else, is below ``top`` and looks as it has to; raises LabError."""
        found = appearance(top)
        for path in sorted(found.keys() | self.looks.keys()):
            if found.get(path) != self.looks.get(path):
                tell(escape(f"{str(path)!r}: {found.get(path)} instead of {self.looks.get(path)}"))
        check(found == self.looks, claim)


def play(home: Path, guest: Guest, bucket: Bucket | None) -> None:
    """All of it in ``home``; raises LabError at the first claim that does not hold."""
    with ExitStack() as stack:

        def new_host(name: str) -> Datastore:
            (home / name).mkdir()
            made = datastore_in(home / name, NO_HYDRATION, bucket=bucket, shared_store=home / "store", host=name)
            return stack.enter_context(made)

        tell(f"working in {home}")
        first, second = new_host("host-1"), new_host("host-2")
        raw, qcow2 = put_guests(first, guest)
        known = archive_all(first, raw, qcow2)
        second.mount()
        move(first, second, raw, known)
        lose(first)
        third = new_host("host-3")
        third.mount()
        adopt_all(third, known)
        boot_adopted(third, at(third, raw), known)
        check_refused(second, at(second, raw), by=third)
        leave(third, known)
        compare(third, known, guest)
        boot_plain(at(third, qcow2))
        second.unmount()


def at(datastore: Datastore, machine: Machine) -> Machine:
    """The same VM, run on another host."""
    vm, disk = machine.disk.parts[-2:]
    return replace(machine, disk=datastore.mountpoint / vm / disk)


def archive_all(first: Datastore, raw: Machine, qcow2: Machine) -> Known:
    """Four VMs on the first host, all of them archived; what they were before that."""
    step("1. host-1 has four VMs, and archives them")
    known, top = Known(), first.mountpoint
    first.mount()
    add_small_vms(top)
    copies = first.home.parent / "originals"
    copies.mkdir()
    for vm in (ODD_VM, f"{BLANK_VM}.img"):
        run(["cp", "-a", "--sparse=always", top / vm, copies], deadline_s=COMMAND_DEADLINE_S)
    known.originals = {path.relative_to(copies): path for path in sorted(copies.rglob("*")) if is_file(path)}
    known.originals |= {raw.disk.relative_to(top): raw.guest.raw, qcow2.disk.relative_to(top): qcow2.guest.qcow2}
    known.looks = appearance(top)
    before = occupied_bytes(first)
    first.vmfs("archive", "--", *_ALL_VMS)
    console.print("[cyan]$ vmfs-stub ls[/]")
    console.print(first.vmfs("ls").rstrip(), markup=False)
    tell(f"what they occupy on primary: {mebibytes(before)} -> {mebibytes(occupied_bytes(first))}")
    check_placeholders(first, "every disk is a placeholder")
    return known


def add_small_vms(top: Path) -> None:
    """Two VMs that do not boot: one with whatever a name, a mode and a file can be, and one that is a blank disk."""
    chance = random.Random(0)
    vm = top / ODD_VM
    (vm / "state" / "empty").mkdir(parents=True)
    disk, second, nvram = top / _ODD_DISK, vm / os.fsdecode(b"caf\xe9\n2.raw"), vm / "state" / "vars.fd"
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
        for offset in (0, 9_000_001, _DISK_BYTES - 70_001):
            file.seek(offset)
            file.write(chance.randbytes(70_001))
    second.write_bytes(chance.randbytes(12 << 20))
    nvram.write_bytes(chance.randbytes(64 << 10))
    (vm / "current").symlink_to(disk.name)
    os.setxattr(disk, "user.note", b"kept")
    os.chown(second, 1000, 1001)
    os.chown(vm, 0, 1001)
    for path, mode in ((disk, 0o640), (second, 0o440), (nvram, 0o600), (vm, 0o2750)):
        path.chmod(mode)
    blank = top / f"{BLANK_VM}.img"
    blank.touch(mode=0o604)
    os.truncate(blank, _DISK_BYTES)
    for number, path in enumerate([*sorted(vm.rglob("*"), reverse=True), vm, blank]):
        os.utime(path, ns=(10**18, 10**18 + number * 1_000_000_007), follow_symlinks=False)


def occupied_bytes(datastore: Datastore) -> int:
    """Bytes that the files of its VMs occupy on primary; what is kept beside them is not counted."""
    return sum(allocated_bytes(path) for path in datastore.backing.iterdir() if path.name != PRIVATE_DIR)


def is_file(path: Path) -> bool:
    """Whether it has bytes of its own."""
    return path.is_file() and not path.is_symlink()


def check_placeholders(datastore: Datastore, claim: str) -> None:
    """All VMs are on this host, and of none more than the ends of its disks; raises LabError."""
    disks = [disk for disk in datastore.disks() if disk.size_bytes >= _DISK_BYTES_MIN]
    check({disk.vm for disk in disks} == set(_ALL_VMS) and {disk.state for disk in disks} == {"placeholder"}, claim)


def move(first: Datastore, second: Datastore, raw: Machine, known: Known) -> None:
    """A VM goes on on the second host, and is refused on the first one."""
    step(f"2. host-2 adopts {RAW_VM} and boots it")
    second.vmfs("adopt", RAW_VM)
    check([disk.vm for disk in second.disks()] == [RAW_VM], f"{RAW_VM}, and no other VM, is on host-2")
    machine = at(second, raw)
    show(["ls", "-ls", machine.disk])
    done = boot_cold(second, machine, f"vmfs.write={NOTE_FILE}:{NOTE}")
    known.written += done.writes
    tell(f"up after {done.marker_s:.1f} s; {mebibytes(done.recalled.total)} came back for that")
    check_partial(second, machine, done.recalled.total)
    check_refused(first, raw, by=second)
    console_shown = failed_boot(raw)
    check(b"I/O error" in console_shown, "the guest does not start on host-1: its disk gives I/O errors")
    known.look_at(second, RAW_VM)
    second.vmfs("archive", RAW_VM)
    tell(f"the guest wrote a file, {NOTE_FILE}, and host-2 archived the VM again")


def check_partial(datastore: Datastore, machine: Machine, recalled_bytes: int) -> None:
    """A boot has recalled a part of the disk, no more; raises LabError."""
    whole = allocated_bytes(machine.guest.raw)
    (disk,) = (disk for disk in datastore.disks() if disk.vm == machine.disk.parent.name)
    check(0 < recalled_bytes < whole / 4, f"that is less than a quarter of the {mebibytes(whole)} that the image has")
    check(disk.state != "resident", "and the disk is not whole on primary after it")


def check_refused(datastore: Datastore, machine: Machine, *, by: Datastore) -> None:
    """What another host has can be used by nobody here, and it is said which host that is; raises LabError."""
    here, there = datastore.host, f"host {by.host} "
    check(not is_readable(machine.disk), f"{here} cannot read {RAW_VM}: an error, not old bytes")
    check(there in refusal(datastore, "archive", RAW_VM), f"{here} cannot archive it, and says that {by.host} has it")
    check(there in refusal(datastore, "status"), f"'vmfs-stub status' on {here} says so, too")


def failed_boot(machine: Machine) -> bytes:
    """All that the console shows of a guest that must not come up; raises LabError when it does."""
    with console.status(f"booting {machine.disk.parent.name}"), running(machine, fast=True) as vm, suppress(LabError):
        vm.wait_for(MARKER, deadline_s=BOOT_DEADLINE_S)
    if MARKER.encode() in vm.console:
        raise LabError(f"NOT TRUE: {machine.disk} boots on one host at a time")
    return bytes(vm.console)


def is_readable(disk: Path) -> bool:
    """Whether all of it can be read."""
    try:
        with disk.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def refusal(datastore: Datastore, *words: str) -> str:
    """What a command says that must not succeed; raises LabError when it does."""
    try:
        datastore.vmfs(*words)
    except LabError as failure:
        return str(failure)
    raise LabError(f"NOT TRUE: {datastore.host} refuses 'vmfs-stub {' '.join(words)}'")


def lose(first: Datastore) -> None:
    """The first host is gone with all that it had, and one of its VMs was in use."""
    step("3. host-1 is lost")
    with (first.mountpoint / _ODD_DISK).open("r+b") as disk:
        disk.write(b"nobody will ever read this")
    tell(f"somebody uses {ODD_VM} at last, so that its newest state is there alone")
    first.kill()
    first.end()
    console.print(f"[cyan]$ rm -rf {first.home}[/]")
    run(["rm", "-rf", first.home], deadline_s=COMMAND_DEADLINE_S)
    check(not first.home.exists(), "its daemon was killed; state, configuration and primary are gone")


def adopt_all(third: Datastore, known: Known) -> None:
    """An empty host gets everything from the store, and is told what it would give up by that."""
    step("4. host-3, which is empty, adopts everything")
    check(third.disks() == [], "there is nothing on host-3")
    said = refusal(third, "adopt", "--all")
    console.print(said.partition("\n")[2], markup=False)
    check("host host-1 " in said, f"{ODD_VM} was in use on host-1: it is not taken just so")
    third.vmfs("adopt", "--all", "--force", "--accept-loss")
    check_placeholders(third, "with --force --accept-loss every VM is back as a placeholder")
    known.check_looks(third.mountpoint, "names, sizes, owners, modes, times, attributes and links are what they were")
    tell(f"what they occupy on primary: {mebibytes(occupied_bytes(third))}")


def boot_adopted(third: Datastore, machine: Machine, known: Known) -> None:
    """A VM boots from the store alone, with what it wrote on the second host."""
    done = boot_cold(third, machine, f"vmfs.read={NOTE_FILE}")
    known.written += done.writes
    tell(f"{RAW_VM}: up after {done.marker_s:.1f} s; {mebibytes(done.recalled.total)} came back for that")
    check_partial(third, machine, done.recalled.total)
    check(done.files.get(NOTE_FILE) == NOTE, "the file that its guest wrote on host-2 is there")
    copy = third.home.parent / "after-boot.raw"
    copy_sparse(machine.disk, copy)
    known.originals[machine.disk.relative_to(third.mountpoint)] = copy
    known.look_at(third, RAW_VM)


def leave(third: Datastore, known: Known) -> None:
    """The third host goes on without us."""
    step("5. host-3 leaves, and vmfs-stub is uninstalled there")
    pid, top = third.daemon_pid, third.mountpoint
    console.print("[cyan]$ vmfs-stub leave[/]")
    console.print(third.vmfs("leave").rstrip(), markup=False)
    check(ended(pid, deadline_s=_ENDS_S) and not is_mounted(top), "no daemon runs and nothing is mounted")
    third.daemon_pid = 0
    run(["rm", "-rf", third.config, third.home / "run"], deadline_s=COMMAND_DEADLINE_S)
    check(
        list(third.home.iterdir()) == [top], "without configuration and runtime directory, the files are all there is"
    )
    check(not (top / PRIVATE_DIR).exists(), "there is no private directory among them")
    names = [name for path in (top, *top.rglob("*")) for name in os.listxattr(path, follow_symlinks=False)]
    check(not any(name.startswith(XATTR_PREFIX) for name in names), "and no attribute of ours on any")
    known.check_looks(top, "names, sizes, owners, modes, times, attributes and links are what they were")


def compare(third: Datastore, known: Known, guest: Guest) -> None:
    """Every file is, byte for byte, what it has to be."""
    top = third.mountpoint
    found = {path.relative_to(top) for path in top.rglob("*") if is_file(path)}
    check(found == known.originals.keys(), f"there are {len(found)} files, each with something to compare it with")
    for path, original in known.originals.items():
        run(["cmp", original, top / path], deadline_s=COMMAND_DEADLINE_S)
        check(True, f"cmp finds {str(path)!r} equal")
    outside = differing(top / RAW_VM / "disk.raw", guest.raw, but_for=known.written)
    check(outside is None, f"{RAW_VM} is the image that host-1 was given, but for what its guests wrote on two hosts")


def boot_plain(machine: Machine) -> None:
    """The VM that nobody has booted yet does so without us, by the same command line."""
    with console.status(f"booting {QCOW2_VM}"):
        done = boot(machine, fast=True)
    check(True, f"{QCOW2_VM} boots from the plain file: up after {done.marker_s:.1f} s (minimal boot)")
