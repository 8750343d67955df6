"""Runs a guest under QEMU and watches its serial console; nothing here waits without a limit.

KVM is used where a guest really boots under it (asked once and remembered until the host boots again), else
emulation (TCG).  A QEMU that was started is always ended, by its own process id.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scripts.lab.failure import LabError
from scripts.lab.guest import DONE, FILE_PREFIX, INIT, MARKER, Guest, cache_root

Accelerator = Literal["kvm", "tcg"]
DiskFormat = Literal["raw", "qcow2"]

BOOT_DEADLINE_S = 300.0
"""An emulated full boot takes 20 s on a quiet machine; a loaded one may need many times that."""
PROBE_DEADLINE_S = 15.0
_QUIT_DEADLINE_S = 10.0
_KVM_BROKEN = b"KVM internal error"


@dataclass(frozen=True, slots=True)
class Machine:
    """One virtual machine: the same value always gives the same command line, whatever state the disk is in."""

    guest: Guest
    disk: Path
    disk_format: DiskFormat
    accelerator: Accelerator

    def command(self, *, fast: bool, parameters: Sequence[str], trace: Path | None) -> list[str]:
        """QEMU's words; ``fast`` boots to the marker script only, ``parameters`` go to the kernel command line."""
        kernel_line = ["root=/dev/vda", "rw", "console=ttyS0", "quiet", "panic=-1", *parameters]
        if fast:
            kernel_line.append(f"init={INIT}")
        words = ["qemu-system-x86_64", "-accel", self.accelerator, "-cpu", "max", "-M", "q35", "-smp", "1", "-m", "512"]
        words += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        words += [
            "-kernel",
            str(self.guest.kernel),
            "-initrd",
            str(self.guest.initrd),
            "-append",
            " ".join(kernel_line),
        ]
        disk = f"if=none,id=d0,file={self.disk},format={self.disk_format},cache=none,discard=unmap"
        words += ["-drive", disk, "-device", "virtio-blk-pci,drive=d0"]
        if trace is not None:
            words += ["-msg", "timestamp=on", "-D", str(trace), "-trace", "blk_co_preadv", "-trace", "blk_co_pwritev"]
        return words


@dataclass(frozen=True, slots=True)
class Boot:
    """What one boot did: seconds to the marker and to power off, and the answers to ``vmfs.read``.

    ``marker_at_s`` is the wall clock at the marker (seconds since the epoch), to cut a disk trace there.
    """

    marker_s: float
    total_s: float
    marker_at_s: float
    files: dict[str, str]


@dataclass(slots=True)
class RunningGuest:
    """A QEMU that was started; ``console`` is all that it printed so far."""

    process: subprocess.Popen[bytes]
    started_s: float
    console: bytearray = field(default_factory=bytearray)

    def wait_for(self, text: str, *, deadline_s: float) -> float:
        """Wait until the console shows ``text``; returns the seconds since the start.

        Raises LabError when the guest ended, or ``deadline_s`` after the call; the message has the console's end.
        """
        wanted, until_s = text.encode(), time.monotonic() + deadline_s
        while wanted not in self.console:
            if _KVM_BROKEN in self.console:
                raise LabError("KVM cannot run this guest on this host")
            if not self._read_some(until_s):
                raise LabError(f"the guest ended before it printed {text}; its console ends with:\n{self.tail()}")
        return time.monotonic() - self.started_s

    def wait_off(self, *, deadline_s: float) -> float:
        """Wait until the guest has powered itself off; returns the seconds since the start, raises LabError."""
        until_s = time.monotonic() + deadline_s
        while self._read_some(until_s):
            pass
        code = self.process.wait(timeout=_QUIT_DEADLINE_S)
        if code:
            raise LabError(f"QEMU ended with exit code {code}:\n{self.tail()}")
        return time.monotonic() - self.started_s

    def tail(self) -> str:
        """The last lines of the console."""
        return "\n".join(self.console.decode(errors="replace").splitlines()[-15:])

    def _read_some(self, until_s: float) -> bool:
        """Take what the console has next; False at its end."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, until_s - time.monotonic())):
                raise LabError(
                    f"the guest was given enough time and is not there yet; its console ends with:\n{self.tail()}"
                )
        data = os.read(self.process.stdout.fileno(), 65536)
        self.console += data
        return bool(data)


@contextmanager
def running(
    machine: Machine, *, fast: bool = False, parameters: Sequence[str] = (), trace: Path | None = None
) -> Iterator[RunningGuest]:
    """Start a guest; at the end of the block its QEMU is gone, whatever happened."""
    process = subprocess.Popen(
        machine.command(fast=fast, parameters=parameters, trace=trace),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield RunningGuest(process, started_s=time.monotonic())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def boot(
    machine: Machine,
    *,
    fast: bool = False,
    parameters: Sequence[str] = (),
    trace: Path | None = None,
    deadline_s: float = BOOT_DEADLINE_S,
    at_marker: Callable[[], None] = lambda: None,
) -> Boot:
    """Boot a guest, let it do what ``parameters`` say, and wait until it has powered itself off.

    ``vmfs.write=NAME:CONTENT`` writes a file in the guest, ``vmfs.read=NAME`` reads one back; ``at_marker`` is called
    as soon as the guest is up.  Raises LabError.
    """
    with running(machine, fast=fast, parameters=parameters, trace=trace) as vm:
        marker_s = vm.wait_for(MARKER, deadline_s=deadline_s)
        marker_at_s = time.time()
        at_marker()
        vm.wait_for(DONE, deadline_s=deadline_s)
        total_s = vm.wait_off(deadline_s=deadline_s)
        return Boot(marker_s, total_s, marker_at_s, _answers(vm.console.decode(errors="replace")))


def _answers(console: str) -> dict[str, str]:
    answers = {}
    for line in console.splitlines():
        _, found, rest = line.partition(FILE_PREFIX + " ")
        if found:
            name, _, content = rest.strip().partition(" ")
            answers[name] = content
    return answers


def usable_accelerator(guest: Guest) -> Accelerator:
    """``kvm`` when this very guest boots under it within a short time, else ``tcg``.

    Opening /dev/kvm proves little: under some hypervisors it opens and the guest's kernel then fails.  The answer is
    kept beside the guest until the host is booted again.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    known = cache_root() / f"accelerator-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if known.exists():
        return "kvm" if known.read_text() == "kvm" else "tcg"
    answer: Accelerator = "kvm" if _boots_under_kvm(guest) else "tcg"
    for old in cache_root().glob("accelerator-*"):
        old.unlink(missing_ok=True)
    known.write_text(answer)
    return answer


def _boots_under_kvm(guest: Guest) -> bool:
    with tempfile.TemporaryDirectory(prefix="kvm-probe-") as work:
        disk = Path(work) / "disk.qcow2"
        if shutil.which("qemu-img") is None:
            raise LabError("qemu-img is not installed; scripts/setup installs it")
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(guest.qcow2), str(disk)]
        subprocess.run(overlay, check=True, stdin=subprocess.DEVNULL)
        # cache=none needs O_DIRECT, which a temporary directory in memory may not have; then KVM is not proven.
        try:
            boot(Machine(guest, disk, "qcow2", "kvm"), fast=True, deadline_s=PROBE_DEADLINE_S)
        except LabError:
            return False
        return True
