"""What the mount counts: what hypervisors do, and nobody else; and when it is not known who somebody is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.config import UsageConfig
from vmfs_stub.core.usage import Counters, GuestState
from vmfs_stub.services.disk import Caller
from vmfs_stub.services.mount_usage import IoCount, MountUsage, latest, mount_reading

HYPERVISORS = UsageConfig().hypervisors
QEMU, CP = "/usr/bin/qemu-system-x86_64", "/bin/cp"
OFF, RUNNING, UNKNOWN = GuestState.OFF, GuestState.RUNNING, GuestState.UNKNOWN


class Host:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.usage = MountUsage(HYPERVISORS, clock=lambda: self.now_s)

    def open(self, executable: str | None, *, ino: int = 7) -> IoCount:
        self.now_s += 1
        return self.usage.opened(ino, Caller(pid=1, uid=0, executable=executable, cgroup=None))

    def close(self, use: IoCount, *, ino: int = 7) -> None:
        self.now_s += 1
        self.usage.closed(ino, use)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.mark.parametrize(
    "executable",
    [
        "/usr/bin/qemu-system-x86_64",
        "/usr/bin/qemu-system-aarch64",
        "/usr/libexec/qemu-kvm (deleted)",
        "/usr/libexec/qemu-kvm",
        "/usr/bin/kvm",
        "cloud-hypervisor",
        "/opt/a b/firecracker",
        "/usr/lib/virtualbox/VBoxHeadless",
        "/x/crosvm",
    ],
)
def test_hypervisors(host: Host, executable: str) -> None:
    assert host.usage.is_hypervisor(executable)


@pytest.mark.parametrize(
    "executable",
    ["/usr/bin/qemu-img", "/usr/bin/qemu-nbd", "/usr/bin/updatedb", "/bin/cp", "/qemu-system-x/cp", "", "/", "xkvm",
     "/usr/bin/QEMU-KVM"],
)  # fmt: skip
def test_others(host: Host, executable: str) -> None:
    assert not host.usage.is_hypervisor(executable)


def test_what_others_do_is_not_counted(host: Host) -> None:
    use = host.open(CP)
    use.requests += 5
    assert host.usage.look() == {}
    host.close(use)
    assert host.usage.look() == {}


def test_use_by_a_hypervisor(host: Host) -> None:
    use = host.open(QEMU)
    use.requests, use.read_bytes, use.written_bytes = 3, 100, 50
    host.now_s = 2000.0
    look = host.usage.look()[7]
    assert (look.state, look.since_s, look.last_open_s, look.last_io_s) == (RUNNING, 1001.0, 1001.0, 2000.0)
    assert (look.requests, look.read_bytes, look.written_bytes) == (3, 100, 50)
    host.now_s = 3000.0
    assert host.usage.look()[7].last_io_s == 2000.0
    use.requests += 1
    host.close(use)
    look = host.usage.look()[7]
    assert (look.state, look.since_s, look.last_io_s) == (OFF, 3001.0, 3001.0)


def test_handles_of_a_disk_are_counted_together_and_apart_from_others(host: Host) -> None:
    first, second, other = host.open(QEMU), host.open(QEMU), host.open(CP)
    assert first is second is not other
    host.close(other)
    host.close(first)
    assert host.usage.look()[7].state is RUNNING
    host.close(second)
    assert host.usage.look()[7].state is OFF


def test_somebody_unknown_makes_the_state_unknown(host: Host) -> None:
    use = host.open(None)
    use.requests += 9
    look = host.usage.look()[7]
    assert (look.state, look.since_s, look.requests, look.last_open_s) == (UNKNOWN, 1001.0, 0, None)
    running = host.open(QEMU)
    assert host.usage.look()[7].state is RUNNING
    host.close(running)
    assert host.usage.look()[7].state is UNKNOWN
    host.close(use)
    look = host.usage.look()[7]
    assert (look.state, look.since_s) == (OFF, host.now_s)


def test_disks_that_are_no_vms_any_more_are_forgotten_once_they_are_closed(host: Host) -> None:
    use = host.open(QEMU)
    host.usage.forget([7, 8])
    assert host.usage.look()[7].state is RUNNING
    host.close(use)
    host.usage.forget([7])
    assert host.usage.look() == {}
    host.close(use)  # of nobody any more


@given(st.lists(st.tuples(st.sampled_from([QEMU, CP, None]), st.integers(0, 30)), max_size=30))
def test_the_state_is_that_of_who_has_it_open(script: list[tuple[str | None, int]]) -> None:
    host, held = Host(), list[tuple[str | None, IoCount]]()
    for executable, number in script:
        if held and number < 15:
            host.close(held.pop(number % len(held))[1])
        else:
            held.append((executable, host.open(executable)))
        look = host.usage.look().get(7)
        who = {each for each, _ in held}
        wanted = RUNNING if QEMU in who else UNKNOWN if None in who else OFF
        assert (OFF if look is None else look.state) is wanted


def test_a_vm_is_what_its_disks_are(host: Host) -> None:
    assert mount_reading([], at_s=5.0).state is OFF
    first = host.open(QEMU, ino=1)
    second, third = host.open(QEMU, ino=2), host.open(None, ino=3)
    first.read_bytes, second.written_bytes, second.requests = 5, 6, 2
    looks = host.usage.look()
    found = mount_reading(list(looks.values()), at_s=5.0)
    assert (found.at_s, found.state, found.state_since_s) == (5.0, RUNNING, 1001.0)
    assert found.counters == Counters(None, 5, 6, 2, None)
    host.close(first, ino=1)
    host.close(second, ino=2)
    assert mount_reading(list(host.usage.look().values()), at_s=5.0).state is UNKNOWN
    host.close(third, ino=3)
    found = mount_reading(list(host.usage.look().values()), at_s=5.0)
    assert (found.state, found.state_since_s) == (OFF, host.now_s)


def test_latest() -> None:
    assert latest([None, 3.0, 5.0]) == 5.0
    assert latest([None]) is None
