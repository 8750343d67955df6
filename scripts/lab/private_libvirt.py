"""A libvirtd of one's own: its sockets, definitions, state and guests are its own, beside any other on the machine.

The programs are the distribution's; nothing of the machine's own libvirt is read or written, and no service is started.
libvirtd has its directories compiled in, so it runs in a mount namespace in which they are others.  What is mounted
below ``shared`` later, a datastore say, is seen there, too: that directory is made a shared mount for as long.
Everything that was started is ended by its process id, the guests as well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from xml.sax.saxutils import quoteattr

from scripts.lab.datastore import ended
from scripts.lab.failure import LabError, run
from scripts.lab.guest import DONE, INIT, MARKER, Guest
from vmfs_stub.mount.mountpoint import mounts_at

AGENT_CHANNEL: Final = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
"""The device over which libvirt reaches the agent of a guest with ``vmfs.agent``."""
_START_DEADLINE_S: Final = 60.0
_END_DEADLINE_S: Final = 30.0
_VIRSH_DEADLINE_S: Final = 120.0
_DAEMON_CONFIG: Final = """\
unix_sock_dir = "{sockets}"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
log_level = 3
log_outputs = "3:file:{log}"
"""
_QEMU_CONFIG: Final = """\
user = "root"
group = "root"
swtpm_user = "root"
swtpm_group = "root"
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
max_core = 0
"""
_OWN: Final = {
    "/etc/libvirt": "etc",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "log",
    "/run/libvirt": "run",
    "/var/lib/swtpm-localca": "localca",
}
"""Directories that libvirtd, and what it starts, take for granted, and where each is instead, below its home."""
_USERS: Final = {
    "passwd": {"libvirt-qemu": "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin"},
    "group": {"libvirt-qemu": "libvirt-qemu:x:64055:", "kvm": "kvm:x:64056:"},
}
"""libvirtd does not start without them, whoever it runs guests as; a package that we do without would make them."""


@dataclass(frozen=True, slots=True)
class LabDisk:
    """A disk of a domain; ``target`` is what the guest sees, ``options`` more attributes of its <driver>."""

    path: Path
    format: Literal["raw", "qcow2"] = "raw"
    target: str = "vda"
    options: str = "error_policy='stop' rerror_policy='stop'"


class PrivateLibvirt:
    """One libvirtd after the other in the existing directory ``home``; ``uri`` is how to reach it.

    ``shared`` is below what guests' disks lie; nothing may be mounted below it yet, or it would be hidden.  Its path
    must be short: a socket's is at most 107 bytes.
    """

    def __init__(self, home: Path, *, shared: Path) -> None:
        self.home = home
        self.shared = shared
        self._process: subprocess.Popen[bytes] | None = None
        self._host_uuid = str(uuids.uuid4())
        self._was_shared = bool(mounts_at(shared))
        self.share()
        for folder in (*_OWN.values(), "sockets"):
            (home / folder).mkdir()
        for file, users in _USERS.items():
            lines = Path("/etc", file).read_text().splitlines()
            missing = set(users) - {line.partition(":")[0] for line in lines}
            (home / file).write_text("\n".join([*lines, *(users[name] for name in sorted(missing))]) + "\n")
        (home / "etc/qemu").mkdir()
        (home / "lib/qemu").mkdir()
        (home / "etc/qemu.conf").write_text(_QEMU_CONFIG)
        config = _DAEMON_CONFIG.format(sockets=home / "sockets", host_uuid=self._host_uuid, log=home / "libvirtd.log")
        (home / "etc/libvirtd.conf").write_text(config)

    @property
    def socket(self) -> Path:
        """Its socket, which is there while it runs."""
        return self.home / "sockets/libvirt-sock"

    @property
    def uri(self) -> str:
        """How libvirt's clients, and ``[libvirt] uri``, name it."""
        return f"qemu:///system?socket={self.socket}"

    @property
    def save_dir(self) -> Path:
        """Where managed saves go; before the start it may be made a symbolic link to somewhere else."""
        return self.home / "lib/qemu/save"

    @property
    def pid(self) -> int:
        """Of libvirtd, also after its end."""
        assert self._process is not None
        return self._process.pid

    # The daemon

    def start(self) -> None:
        """Start it; returns when it answers.  Guests of an earlier one are taken over.  Raises LabError."""
        binds = [f"mkdir -p {there} && mount --bind {self.home / here} {there}" for there, here in _OWN.items()]
        binds += [f"mount --bind {self.home / file} /etc/{file}" for file in _USERS]
        start = f"exec libvirtd --config {self.home / 'etc/libvirtd.conf'} --pid-file {self.home / 'libvirtd.pid'}"
        # Of a name of its own, since guests do not migrate to a host of the same.
        script = " && ".join([f"hostname lab-{self._host_uuid[:8]}", *binds, start])
        with (self.home / "output").open("ab") as output:
            self._process = subprocess.Popen(
                ["unshare", "--uts", "--mount", "--propagation", "slave", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            )
        self._wait("libvirtd answers", self._answers, deadline_s=_START_DEADLINE_S)

    def stop(self) -> None:
        """Let it end; its guests go on.  Raises LabError when it does not."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9; its guests go on."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Have it answer nothing more, until `thaw`: it hangs."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """End daemon and guests, in whatever state they are."""
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self._end(signal.SIGKILL)
        for pid in self.guests():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ended(pid, deadline_s=_END_DEADLINE_S)
        if not self._was_shared and mounts_at(self.shared):
            run(["umount", "-l", self.shared], deadline_s=_END_DEADLINE_S)

    def guests(self) -> list[int]:
        """The processes of its guests."""
        found = []
        for path in (self.home / "run/qemu").glob("*.pid"):
            with suppress(OSError, ValueError):
                pid = int(path.read_text())
                if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def log(self) -> str:
        """What it complained of."""
        texts = [
            path.read_text("utf-8", "replace")
            for path in (self.home / "output", self.home / "libvirtd.log")
            if path.exists()
        ]
        return "\n".join(texts)

    def share(self) -> None:
        """Have it see what is mounted below ``shared`` from now on; `start` does that, too."""
        if not mounts_at(self.shared):
            run(["mount", "--bind", self.shared, self.shared], deadline_s=_END_DEADLINE_S)
        run(["mount", "--make-shared", self.shared], deadline_s=_END_DEADLINE_S)

    def _end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"libvirtd (process {self.pid}) does not end") from exc

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise LabError(f"libvirtd ended instead of answering:\n{self.log()[-4000:]}")
        if not self.socket.exists():
            return False
        with suppress(LabError):
            self.virsh("list")
            return True
        return False

    def _wait(self, what: str, condition: Callable[[], bool], *, deadline_s: float) -> None:
        until_s = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > until_s:
                raise LabError(f"{what}: not so after {deadline_s:g} s:\n{self.log()[-4000:]}")
            time.sleep(0.05)

    @property
    def view(self) -> list[str | Path]:
        """Words before a command, which then sees its /var/lib/libvirt as the host's; what it mounts, all see."""
        there = "/var/lib/libvirt"
        script = f'mount --make-private "$(findmnt -n -o TARGET -T {there})" && mount --bind "$0" {there} && exec "$@"'
        return ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script, self.home / _OWN[there]]

    # Domains

    def virsh(self, *words: str | Path) -> str:
        """Run ``virsh``, and return what it prints; raises LabError."""
        return run(["virsh", "--quiet", "--connect", self.uri, *words], deadline_s=_VIRSH_DEADLINE_S)

    def define(self, xml: str) -> None:
        """Define, or change, a domain."""
        path = self.home / f"define-{uuids.uuid4().hex}.xml"
        path.write_text(xml)
        self.virsh("define", path)
        path.unlink()

    def state(self, name: str) -> str:
        """As virsh says it: running, shut off, paused, …"""
        return self.virsh("domstate", name).strip()

    def ask_agent(self, name: str, command: str, **arguments: object) -> object:
        """What the agent in a guest returns to a command of its protocol; raises LabError, also while none answers."""
        question = json.dumps({"execute": command, "arguments": arguments} if arguments else {"execute": command})
        return json.loads(self.virsh("qemu-agent-command", name, question))["return"]

    def has_agent(self, name: str) -> bool:
        """Whether the agent in a guest answers."""
        with suppress(LabError):
            self.ask_agent(name, "guest-ping")
            return True
        return False

    def wait_agent(self, name: str, *, deadline_s: float = 60.0) -> None:
        """Wait until the agent in a guest answers; raises LabError."""
        self._wait(f"the agent of {name} answers", lambda: self.has_agent(name), deadline_s=deadline_s)

    def console(self, name: str) -> Path:
        """Where the guest's serial console goes, of a domain of `domain_xml`."""
        return self.home / f"console-{name}"

    def wait_console(self, name: str, text: str = MARKER, *, deadline_s: float = 300.0, since: int = 0) -> None:
        """Wait until the console shows ``text`` after its first ``since`` bytes; raises LabError."""

        def shows() -> bool:
            path = self.console(name)
            return path.exists() and text.encode() in path.read_bytes()[since:]

        self._wait(f"the console of {name} shows {text}", shows, deadline_s=deadline_s)

    def wait_state(self, name: str, state: str, *, deadline_s: float = 60.0) -> None:
        """Wait until virsh says ``state``; raises LabError."""
        self._wait(f"{name} is {state}", lambda: self.state(name) == state, deadline_s=deadline_s)

    def domain_xml(
        self,
        name: str,
        disks: Sequence[LabDisk],
        *,
        guest: Guest | None = None,
        uuid: str = "",
        parameters: Sequence[str] = (),
        more: str = "",
        devices: str = "",
        firmware: str = "",
        memory_mib: int = 256,
        fast: bool = True,
    ) -> str:
        """XML of an emulated domain that boots ``guest``'s kernel to the marker script; without it, nothing at all.

        Without ``fast`` it boots all of its system, which then hears of the power button.  ``more`` goes below
        <domain>, ``devices`` below <devices>, ``firmware`` below <os>.  A guest powers itself off unless ``parameters``
        has ``vmfs.stay``.
        """
        words = ["root=/dev/vda", "rw", "console=ttyS0", "quiet", "panic=-1", *parameters]
        line = " ".join([*words, f"init={INIT}"] if fast else words)
        kernel = (
            f"<kernel>{guest.kernel}</kernel><initrd>{guest.initrd}</initrd><cmdline>{line}</cmdline>" if guest else ""
        )
        shown = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}' cache='none' {disk.options}/>"
            f"<source file={quoteattr(str(disk.path))}/><target dev='{disk.target}' bus='virtio'/></disk>"
            for disk in disks
        )
        return (
            f"<domain type='qemu'><name>{name}</name><uuid>{uuid or uuids.uuid4()}</uuid>"
            f"<memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>{more}"
            f"<os><type arch='x86_64' machine='q35'>hvm</type>{firmware}{kernel}</os>"
            "<features><acpi/></features><cpu mode='maximum'/><on_reboot>destroy</on_reboot>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{shown}<controller type='usb' model='none'/>"
            f"<serial type='file'><source path={quoteattr(str(self.console(name)))} append='on'/></serial>"
            f"<memballoon model='none'/>{devices}</devices></domain>"
        )


@contextmanager
def private_libvirt(home: Path, *, shared: Path) -> Iterator[PrivateLibvirt]:
    """A libvirtd that runs, with its own state in the new directory ``home``; all of it has ended at the end."""
    home.mkdir()
    libvirt = PrivateLibvirt(home, shared=shared)
    try:
        libvirt.start()
        yield libvirt
    finally:
        libvirt.end()


__all__ = ["AGENT_CHANNEL", "DONE", "MARKER", "LabDisk", "PrivateLibvirt", "private_libvirt"]
