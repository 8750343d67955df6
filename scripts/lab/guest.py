"""Builds a small real guest from the distribution's own packages, once, and keeps it in a cache.

A guest is a directory: ``disk.raw`` (ext4, sparse, 4 GiB), ``disk.qcow2`` (the same content), ``vmlinuz`` and
``initrd.img``.  It boots in two ways: with systemd to a unit that prints the marker, or with ``init=`` to the same
script directly, which is faster.  The packages come from where this host's apt gets its own: no mirror is named here.
Needs root (mmdebstrap makes a tree with real owners); no loop devices, no network in the guest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.lab.failure import LabError, run

MARKER = "VMFS-GUEST-UP"
"""What the guest prints on its serial console when it is up."""
FILE_PREFIX = "VMFS-GUEST-FILE"
"""``VMFS-GUEST-FILE NAME CONTENT``: the answer to ``vmfs.read=NAME``."""
DONE = "VMFS-GUEST-DONE"
"""Printed after everything the kernel command line asked for was done and synced."""
COUNT = "VMFS-GUEST-COUNT"
"""``VMFS-GUEST-COUNT N``, each second with ``vmfs.count``: N is in the guest's memory alone, and begins with 1."""
INIT = "/usr/local/sbin/lab-init"

DISK_SIZE = 4 << 30
BUILD_DEADLINE_S = 1200

_SCRIPT = f"""#!/bin/sh
# Says that the guest is up, does what the kernel command line asks for, and powers off.  Runs as a systemd unit or,
# with init={INIT}, as the only process.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
[ -r /proc/cmdline ] || mount -t proc proc /proc
say() {{ printf '%s\\n' "$*" >/dev/console; }}
count() {{
    n=0
    while :; do
        n=$((n + 1))
        say {COUNT} $n
        sleep 1
    done
}}
busy() {{
    while :; do
        for n in 1 2 3 4; do
            dd if=/dev/urandom of="$1/busy-$n" bs=64k count=32 conv=fsync 2>/dev/null
        done
    done
}}
agent() {{
    modprobe virtio_console
    until port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name 2>/dev/null); do sleep 0.1; done
    port=${{port%/name}}
    qemu-ga --daemonize --method=virtio-serial --path="/dev/${{port##*/}}"
}}
say {MARKER}
stay=no
for word in $(cat /proc/cmdline); do
    value=${{word#*=}}
    case $word in
        vmfs.write=*) printf '%s\\n' "${{value#*:}}" >"/root/${{value%%:*}}" ;;
        vmfs.read=*) say {FILE_PREFIX} "$value" "$(cat "/root/$value" 2>/dev/null)" ;;
        vmfs.stay) stay=yes ;;
        vmfs.count) stay=yes; count & ;;
        vmfs.busy) stay=yes; busy /root & ;;
        vmfs.busy=*) stay=yes; mount "/dev/$value" /mnt; busy /mnt & ;;
        vmfs.agent) stay=yes; agent ;;
    esac
done
sync
say {DONE}
if [ "$stay" = yes ]; then
    exec sleep 86400
elif [ $$ = 1 ]; then
    mount -o remount,ro /
    exec poweroff -f
else
    exec systemctl --no-block poweroff
fi
"""

_UNIT = f"""[Unit]
Description=Says on the console that this guest is up
After=multi-user.target

[Service]
Type=simple
ExecStart={INIT}

[Install]
WantedBy=graphical.target
"""

_PACKAGES = (
    "systemd-sysv",
    "udev",
    "dbus",
    "initramfs-tools",
    "util-linux",
    "e2fsprogs",
    "fio",
    "kmod",
    "qemu-guest-agent",
)
_KERNELS = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
_COMPONENTS = {"debian": ("main",), "ubuntu": ("main", "universe")}
_MASKED = (
    # A login prompt on the console costs an emulated guest seconds and mixes with the marker.
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    # These would write to the disk when they like, in the middle of a measurement.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)
_RECIPE_VERSION = 2
"""Raise it when the steps change in a way that the recipe's texts do not show."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A built guest; its files are never written to, users copy the disk they boot."""

    directory: Path

    @property
    def raw(self) -> Path:
        """The disk as a sparse raw image."""
        return self.directory / "disk.raw"

    @property
    def qcow2(self) -> Path:
        """The disk as a qcow2 image."""
        return self.directory / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        """The kernel, for QEMU's -kernel."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initial RAM disk, for QEMU's -initrd."""
        return self.directory / "initrd.img"


@dataclass(frozen=True, slots=True)
class Distribution:
    """What the host runs, and so what the guest will: ``debian`` or ``ubuntu``, and the release's code name."""

    name: str
    codename: str


def host_distribution() -> Distribution:
    """The host's distribution; raises LabError where no guest can be built from it."""
    release = platform.freedesktop_os_release()
    name, codename = release.get("ID", "unknown"), release.get("VERSION_CODENAME", "")
    if name not in _KERNELS or not codename or platform.machine() != "x86_64":
        raise LabError(f"guests are built on Debian or Ubuntu on x86-64, not on {name} {codename} {platform.machine()}")
    return Distribution(name, codename)


def cache_root() -> Path:
    """Where guests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmfs-stub"


def built_guest(say: Callable[[str], None] = lambda text: None) -> Guest:
    """The guest of this recipe, built if it is not in the cache; ``say`` is told of slow steps.

    Raises LabError when it cannot be built; nothing half-built is left in the cache.
    """
    distribution = host_distribution()
    recipe = json.dumps(
        [_RECIPE_VERSION, _SCRIPT, _UNIT, _PACKAGES, DISK_SIZE, distribution.name, distribution.codename]
    )
    home = cache_root() / f"guest-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with _locked(home.with_suffix(".lock")):
        if not home.is_dir():
            say(f"building a guest of {distribution.name} {distribution.codename} (once; kept in {home})")
            _build(home, distribution, say)
    return Guest(home)


def needs_replay(image: Path) -> bool:
    """Whether the journal of the ext4 in ``image`` has what is not in its place yet; raises LabError."""
    shown = run(["dumpe2fs", "-h", image], deadline_s=60)
    (features,) = [line for line in shown.splitlines() if line.startswith("Filesystem features:")]
    return "needs_recovery" in features.split()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(home: Path, distribution: Distribution, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=home.parent) as name:
        work = Path(name)
        tree, result = work / "tree", work / "guest"
        result.mkdir()
        say("fetching and unpacking its packages")
        _bootstrap(tree, work / "sources.list", distribution)
        _configure(tree)
        guest = Guest(result)
        shutil.copyfile(_newest(tree / "boot", "vmlinuz-*"), guest.kernel)
        shutil.copyfile(_newest(tree / "boot", "initrd.img-*"), guest.initrd)
        say("writing its disk images")
        _write_disks(tree, guest)
        result.rename(home)


def _bootstrap(tree: Path, sources: Path, distribution: Distribution) -> None:
    sources.write_text(_apt_sources(distribution))
    # A full initrd takes an emulated guest seconds to unpack; this one has what a virtio disk needs.
    small_initrd = (
        'mkdir -p "$1/etc/initramfs-tools/conf.d" && echo MODULES=list >"$1/etc/initramfs-tools/conf.d/lab" && '
        'printf "virtio_pci\\nvirtio_blk\\next4\\n" >"$1/etc/initramfs-tools/modules"'
    )
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join((*_PACKAGES, _KERNELS[distribution.name]))}",
            f"--essential-hook={small_initrd}",
            "--dpkgopt=force-confold",
            distribution.codename,
            tree,
            sources,
        ],
        deadline_s=BUILD_DEADLINE_S,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
    )


def _apt_sources(distribution: Distribution) -> str:
    """One-line apt sources of the host's own distribution, as the host's apt is set up to reach them."""
    listing = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        deadline_s=60,
    )
    suites = {distribution.codename + pocket for pocket in ("", "-updates", "-security")}
    lines: dict[str, None] = {}
    for row in listing.splitlines():
        uri, suite, component = row.split()
        if suite in suites and component in _COMPONENTS[distribution.name]:
            lines[f"deb {uri} {suite} {component}"] = None
    if not any(line.split()[2] == distribution.codename for line in lines):
        raise LabError(f"apt has no source for {distribution.codename} main; run 'apt-get update' and look at /etc/apt")
    return "\n".join(lines) + "\n"


def _configure(tree: Path) -> None:
    script = tree / INIT.lstrip("/")
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    system = tree / "etc/systemd/system"
    (system / "lab-init.service").write_text(_UNIT)
    wants = system / "graphical.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "lab-init.service").symlink_to("/etc/systemd/system/lab-init.service")
    for masked in _MASKED:
        (system / masked).unlink(missing_ok=True)
        (system / masked).symlink_to("/dev/null")
    (tree / "etc/hostname").write_text("lab\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    shutil.rmtree(tree / "var/cache/apt", ignore_errors=True)


def _newest(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if not found:
        raise LabError(f"the guest's kernel package left no {pattern} in /boot")
    return found[-1]


def _write_disks(tree: Path, guest: Guest) -> None:
    with guest.raw.open("xb") as file:
        file.truncate(DISK_SIZE)
    # Everything is laid out now, or the guest would go on initialising tables in the background of a measurement.
    layout = "lazy_itable_init=0,lazy_journal_init=0"
    run(["mkfs.ext4", "-q", "-F", "-E", layout, "-d", str(tree), str(guest.raw)], deadline_s=BUILD_DEADLINE_S)
    run(["fallocate", "--dig-holes", str(guest.raw)], deadline_s=BUILD_DEADLINE_S)
    run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(guest.raw), str(guest.qcow2)],
        deadline_s=BUILD_DEADLINE_S,
    )


if __name__ == "__main__":
    try:
        print(built_guest(lambda text: print(f"guest: {text}", file=sys.stderr)).directory)
    except LabError as failure:
        sys.exit(f"guest: {failure}")
