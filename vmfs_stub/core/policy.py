"""Which VMs a backup job makes placeholders of, and why: facts and rules in, decisions out.

Pure: no clock, no I/O.  Invariants, which tests/unit/test_core_policy.py proves on random facts:
* what is protected, or must never be archived for another reason, is not, whatever the rules say;
* where it is not known how a VM was used, it was used;
* a stricter threshold or a longer window never archives more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import GuestState, Sample

DAY_S = 86400.0


class WhenRunning(Enum):
    """What is to be done with a VM that is idle and runs."""

    SKIP = "skip"
    SHUTDOWN = "shutdown"
    """Ask the guest to power off; one that does not is left alone."""
    MANAGED_SAVE = "managed-save"
    """Put its memory on the mount, and archive that with the disks."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which VMs a rule is for: all that is given has to match; sizes in bytes.

    ``names`` and ``paths`` are shell patterns, of which one has to match; ``metadata`` are values of the domain's
    metadata.
    """

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    size_bytes_min: int = 0
    size_bytes_max: int | None = None


@dataclass(frozen=True, slots=True)
class Idleness:
    """When a VM that runs counts as idle: for a ``share`` (0 to 1) of ``window_s`` every rate was below its limit."""

    window_s: float
    share: float = 0.95
    cpu_percent_max: float = 5.0
    disk_bytes_per_s_max: float = 16384.0
    network_bytes_per_s_max: float = 16384.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: for VMs that ``match``, one of the conditions that are given has to hold; times in seconds.

    ``archives`` is false for a rule that keeps VMs from being archived.  ``target_s`` is how long a VM may take until
    it is usable; one that would take longer is never archived.
    """

    name: str
    match: Match = Match()
    archives: bool = True
    off_for_s: float | None = None
    not_started_for_s: float | None = None
    idle: Idleness | None = None
    point_age_max_s: float | None = None
    """A last restore point that is older keeps the VM from being archived on the strength of this rule."""
    when_running: WhenRunning = WhenRunning.SKIP
    target_s: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, of which the first that matches counts, and what is true of all VMs."""

    rules: tuple[Rule, ...]
    archives_per_job_max: int = 5
    recalled_for_s_min: float = 7 * DAY_S
    """A VM that was recalled more recently stays."""
    size_bytes_min: int = 8 << 20
    high_watermark: float | None = None
    """Share of primary in use above which the best candidates are archived, whatever the rules' conditions say."""
    low_watermark: float | None = None
    free_floor: float = 0.10


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one VM at one moment; times in seconds since the epoch, sizes in bytes.  None: not known.

    ``frees_bytes`` is what primary gets back, ``usable_s`` the predicted time from start to usable once archived.
    ``never`` are reasons why it must not be archived, as an operator can read them.  ``samples`` are in order.
    """

    vm_id: VmId
    name: str
    path: str
    state: GuestState
    size_bytes: int
    frees_bytes: int
    usable_s: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    state_since_s: float | None = None
    last_started_s: float | None = None
    last_used_s: float | None = None
    """The last open, read or write by a hypervisor."""
    last_point_s: float | None = None
    last_recalled_s: float | None = None
    samples: Sequence[Sample] = ()
    is_protected: bool = False
    is_placeholder: bool = False
    never: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a VM, and why; ``rule`` is the name of the rule that decided, None if none did.

    ``reason`` is one line with the numbers that decided.
    """

    vm_id: VmId
    name: str
    archives: bool
    reason: str
    rule: str | None = None
    when_running: WhenRunning = WhenRunning.SKIP
    frees_bytes: int = 0
    usable_s: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)


def decide(facts: Facts, policy: Policy, *, now_s: float) -> Decision:
    """What ``policy`` says of one VM, the limits of a job and the watermarks aside."""
    raise NotImplementedError


def decide_all(
    all_facts: Sequence[Facts], policy: Policy, *, now_s: float, size_bytes: int, free_bytes: int
) -> list[Decision]:
    """What a job is to do, in the order of ``all_facts``; ``size_bytes`` and ``free_bytes`` are primary's.

    Of more candidates than a job may archive the best are taken: bytes freed against the time until usable.
    """
    raise NotImplementedError
