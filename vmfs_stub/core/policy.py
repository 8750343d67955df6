"""Which VMs a backup job makes placeholders of, and why: facts and rules in, decisions out.

Pure: no clock, no I/O.  Invariants, which tests/unit/test_core_policy.py tries on random facts:
* what is protected, or must never be archived for another reason, is not, whatever the rules say;
* where it is not known how a VM was used, it was used;
* a stricter threshold or a longer window never archives more of what the rules alone decide.

Above the high watermark a job also takes VMs that no condition of their rule has found idle, the best first, until
primary is at the low one.  Even then a VM has to be off, and to have been off for `Policy.unused_for_s_min`, and a rule
has to be there for it that does not keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Final

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.times import span_text
from vmfs_stub.core.unused import SPAN_S_MIN, Found, Limits, find_idle, find_known, find_off
from vmfs_stub.core.usage import DAY_S, GuestState, Sample

_SCORE_S_MIN: Final = 0.1
"""What is usable at once is not endlessly better than what nearly is."""


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

    ``names`` and ``paths`` are shell patterns, of which one has to match; a path is that of the VM's directory or file
    at the top of the datastore.  ``metadata`` are values of the domain's metadata.
    """

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    size_bytes_min: int = 0
    size_bytes_max: int | None = None


@dataclass(frozen=True, slots=True)
class Idleness:
    """When a VM counts as idle: off, or every rate below its limit, for a ``share`` (0 to 1) of ``window_s``.

    So it has to be for each shorter span that ends now, down to a day; see `unused`.  CPU in percent of one processor.
    """

    window_s: float
    share: float = 0.95
    cpu_percent_max: float = 5.0
    disk_bytes_per_s_max: float = 16384.0
    network_bytes_per_s_max: float = 16384.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: for VMs that ``match``, one of the conditions that are given has to hold; times in seconds.

    Conditions are ``off_for_s``, ``not_started_for_s`` (of VMs that are off) and ``idle``; a rule without any archives
    nothing.  ``archives`` is false for a rule that keeps VMs from being archived.  ``target_s`` is how long a VM may
    take until it is usable; one that would take longer is never archived.
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
    """Rules, of which the first that matches counts, and what is true of all VMs; watermarks are shares (0 to 1).

    ``free_floor`` is the share of primary that should be free: with less, primary is above the high watermark, whatever
    that says.  Without a low watermark, enough is archived to be no longer above the high one.
    """

    rules: tuple[Rule, ...]
    archives_per_job_max: int = 5
    recalled_for_s_min: float = 7 * DAY_S
    """A VM that was recalled more recently stays."""
    size_bytes_min: int = 8 << 20
    high_watermark: float | None = None
    """Share of primary in use above which the best candidates are archived, whatever the rules' conditions say."""
    low_watermark: float | None = None
    free_floor: float = 0.10
    unused_for_s_min: float = DAY_S
    """Above the high watermark, what was in use more recently stays all the same; at least a day."""

    @property
    def high(self) -> float:
        """The share of primary in use above which the rules' conditions are not waited for."""
        floor = 1.0 - self.free_floor
        return floor if self.high_watermark is None else min(self.high_watermark, floor)

    @property
    def low(self) -> float:
        """The share of primary in use at which that ends."""
        return self.high if self.low_watermark is None else min(self.low_watermark, self.high)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one VM at one moment; times in seconds since the epoch, sizes in bytes.  None: not known.

    ``frees_bytes`` is what primary gets back, ``usable_s`` the predicted time from start to usable once archived.
    ``never`` are reasons why it must not be archived, as an operator can read them.  ``samples`` are in order.
    ``last_recalled_s`` is None for a VM that was never recalled; of one of which that is not known, ``never`` says so.
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
    protected_by: str = ""
    """The domain whose metadata protects it; "" where `protect` does, or nothing."""
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


DEFAULT_RULE: Final = Rule("default", off_for_s=14 * DAY_S, idle=Idleness(14 * DAY_S))
"""What is done when no rule is given."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """``is_barred``: neither a condition nor a watermark archives it."""

    archives: bool
    reason: str
    rule: Rule | None = None
    is_barred: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)


def predicted_usable_s(needed_bytes: int, *, boot_bytes: int, bytes_per_s: float, begin_s: float = 1.0) -> float:
    """How long from the start of an archived VM until it is usable.

    A guest waits until what it reads to boot is back, and for nothing else: ``boot_bytes`` of the VM's
    ``needed_bytes``, which are all that would be absent.  ``begin_s`` is what passes before the first byte comes
    (claim, restore point, tables), ``bytes_per_s`` what the store gives then.  It says nothing of how long the guest
    itself takes, and is no promise: what a boot reads is not known before it has been seen.
    """
    if needed_bytes <= 0:
        return 0.0
    return begin_s + min(needed_bytes, boot_bytes) / max(bytes_per_s, 1.0)


def decide(facts: Facts, policy: Policy, *, now_s: float) -> Decision:
    """What ``policy`` says of one VM, the limits of a job and the watermarks aside."""
    return _decision(facts, _verdict(facts, policy, now_s))


def decide_all(
    all_facts: Sequence[Facts], policy: Policy, *, now_s: float, size_bytes: int, free_bytes: int
) -> list[Decision]:
    """What a job is to do, in the order of ``all_facts``; ``size_bytes`` and ``free_bytes`` are primary's.

    Of more candidates than a job may archive the best are taken: bytes freed against the time until usable.
    """
    verdicts = [_verdict(facts, policy, now_s) for facts in all_facts]
    best_first = sorted(range(len(all_facts)), key=lambda number: _rank(all_facts[number]))
    wanted = [number for number in best_first if verdicts[number].archives]
    taken = wanted[: policy.archives_per_job_max]
    for place, number in enumerate(wanted[len(taken) :], start=len(taken) + 1):
        verdicts[number] = _later(verdicts[number], place, policy)
    used_bytes = size_bytes - free_bytes
    if size_bytes > 0 and used_bytes > policy.high * size_bytes:
        excess_bytes = used_bytes - policy.low * size_bytes - sum(all_facts[number].frees_bytes for number in taken)
        why = f"primary is {used_bytes / size_bytes:.1%} full, above {policy.high:.1%}"
        left = policy.archives_per_job_max - len(taken)
        for number in best_first:
            if left <= 0 or excess_bytes <= 0:
                break
            forced = _forced(all_facts[number], verdicts[number], policy, now_s, why)
            if forced is not None:
                verdicts[number] = forced
                excess_bytes -= all_facts[number].frees_bytes
                left -= 1
    return [_decision(facts, verdict) for facts, verdict in zip(all_facts, verdicts, strict=True)]


def _decision(facts: Facts, verdict: _Verdict) -> Decision:
    rule = verdict.rule
    return Decision(
        facts.vm_id,
        facts.name,
        verdict.archives,
        verdict.reason,
        None if rule is None else rule.name,
        WhenRunning.SKIP if rule is None else rule.when_running,
        facts.frees_bytes,
        facts.usable_s,
        verdict.numbers,
    )


def _rank(facts: Facts) -> tuple[float, str]:
    """Smaller is better; the id makes equals come in the same order each time."""
    return -facts.frees_bytes / max(facts.usable_s, _SCORE_S_MIN), facts.vm_id


def _verdict(facts: Facts, policy: Policy, now_s: float) -> _Verdict:
    if barred := _barred(facts, policy, now_s):
        return _Verdict(False, barred, is_barred=True)
    rule = next((rule for rule in policy.rules if _matches(rule.match, facts)), None)
    if rule is None:
        return _Verdict(False, "no rule is for it", is_barred=True)
    if not rule.archives:
        return _Verdict(False, "its rule keeps it", rule, is_barred=True)
    if rule.target_s is not None and not facts.usable_s <= rule.target_s:
        reason = f"would take {facts.usable_s:.0f} s to be usable, and may take {rule.target_s:g} s"
        return _Verdict(False, reason, rule, is_barred=True)
    return _by_conditions(facts, rule, now_s)


def _barred(facts: Facts, policy: Policy, now_s: float) -> str:
    """Why a VM must not be archived whatever the rules say; "" when it may."""
    if facts.is_protected:
        if facts.protected_by:
            return f"is protected by the metadata of domain {facts.protected_by}"
        return "is protected; `vmfs-stub unprotect` allows to archive it"
    if facts.is_placeholder:
        return "is archived already"
    if facts.never:
        return "; ".join(facts.never)
    if facts.size_bytes < policy.size_bytes_min:
        return f"is too small: {facts.size_bytes} of at least {policy.size_bytes_min} bytes"
    if facts.frees_bytes <= 0:
        return "would free nothing"
    if facts.last_recalled_s is not None and now_s - facts.last_recalled_s < policy.recalled_for_s_min:
        ago, least = span_text(now_s - facts.last_recalled_s), span_text(policy.recalled_for_s_min)
        return f"was recalled {ago} ago, and stays for {least}"
    if facts.state in _NEVER_IN:
        return _NEVER_IN[facts.state]
    return ""


_NEVER_IN: Final[Mapping[GuestState, str]] = {
    GuestState.UNKNOWN: "nobody knows whether it runs",
    GuestState.PAUSED: "is paused, with its disks open",
    GuestState.CRASHED: "has crashed; look at it first",
}


def _matches(match: Match, facts: Facts) -> bool:
    return (
        (not match.names or any(fnmatchcase(facts.name, pattern) for pattern in match.names))
        and (not match.paths or any(fnmatchcase(facts.path, pattern) for pattern in match.paths))
        and all(facts.metadata.get(key) == value for key, value in match.metadata.items())
        and facts.size_bytes >= match.size_bytes_min
        and (match.size_bytes_max is None or facts.size_bytes <= match.size_bytes_max)
    )


def _by_conditions(facts: Facts, rule: Rule, now_s: float) -> _Verdict:
    holds, reasons, numbers = False, [], dict[str, float]()
    for is_met, reason, found in _conditions(facts, rule, now_s):
        reasons.append(reason)
        numbers = {"span_s": found.span_s, "used_s": found.used_s, "used_s_max": found.allowed_s}
        if is_met:
            holds, reasons = True, [reason]
            break
    reason = "; ".join(reasons) or "its rule has no condition"
    if not holds:
        return _Verdict(False, reason, rule, numbers=numbers)
    if rule.point_age_max_s is not None and not _has_point(facts, rule.point_age_max_s, now_s):
        age = "it has none" if facts.last_point_s is None else f"it is {span_text(now_s - facts.last_point_s)} old"
        limit = span_text(rule.point_age_max_s)
        reason = f"{reason}, but its last restore point may be at most {limit} old, and {age}"
        return _Verdict(False, reason, rule, numbers=numbers)
    if not facts.state.is_off:
        if rule.when_running is WhenRunning.SKIP:
            return _Verdict(False, f'{reason}, but it runs, and its rule says "skip"', rule, numbers=numbers)
        reason = f"{reason}, and runs: {rule.when_running.value}"
    return _Verdict(True, reason, rule, numbers=numbers)


def _conditions(facts: Facts, rule: Rule, now_s: float) -> Iterator[tuple[bool, str, Found]]:
    """Whether each condition that is given holds, in words, and what its window showed."""
    if rule.off_for_s is not None:
        yield _off(facts, rule.off_for_s, now_s)
    if rule.not_started_for_s is not None:
        yield _not_started(facts, rule.not_started_for_s, now_s)
    if rule.idle is not None:
        yield _idle(facts, rule.idle, now_s)


def _off(facts: Facts, window_s: float, now_s: float) -> tuple[bool, str, Found]:
    window_s = max(window_s, SPAN_S_MIN)
    if not facts.state.is_off:
        return False, f"{facts.state.value}, not off", Found(False, window_s, window_s, 0.0)
    for what, at_s in (
        ("off", facts.state_since_s),
        ("started", facts.last_started_s),
        ("used", facts.last_used_s),
    ):
        if at_s is not None and now_s - at_s < window_s:
            how = f"off for {span_text(now_s - at_s)}" if what == "off" else f"{what} {span_text(now_s - at_s)} ago"
            return (
                False,
                f"{how}, less than {span_text(window_s)}",
                Found(False, window_s, window_s - (now_s - at_s), 0.0),
            )
    found = find_off(facts.samples, now_s=now_s, window_s=window_s)
    if found.holds:
        return True, f"off for {span_text(window_s)}", found
    return False, f"not known to be off for {span_text(window_s)}: {_used(found)}", found


def _not_started(facts: Facts, window_s: float, now_s: float) -> tuple[bool, str, Found]:
    window_s = max(window_s, SPAN_S_MIN)
    text = span_text(window_s)
    if not facts.state.is_off:
        return False, f"{facts.state.value}, not off", Found(False, window_s, window_s, 0.0)
    if facts.last_started_s is not None and now_s - facts.last_started_s < window_s:
        since_s = now_s - facts.last_started_s
        return False, f"started {span_text(since_s)} ago, less than {text}", Found(False, window_s, since_s, 0.0)
    # Where its last start is not known, it must not even have run.
    look = find_off if facts.last_started_s is None else find_known
    found = look(facts.samples, now_s=now_s, window_s=window_s)
    if found.holds:
        return True, f"not started for {text}", found
    return False, f"not known not to have been started for {text}: {_used(found)}", found


def _idle(facts: Facts, idle: Idleness, now_s: float) -> tuple[bool, str, Found]:
    limits = Limits(idle.cpu_percent_max, idle.disk_bytes_per_s_max, idle.network_bytes_per_s_max)
    window_s, used_share_max = max(idle.window_s, SPAN_S_MIN), 1.0 - idle.share
    found = find_idle(facts.samples, limits, now_s=now_s, window_s=window_s, used_share_max=used_share_max)
    if found.holds:
        return True, f"idle for {1 - found.used_s / found.span_s:.1%} of {span_text(window_s)}", found
    return False, f"not idle for {idle.share:.0%} of {span_text(window_s)}: {_used(found)}", found


def _used(found: Found) -> str:
    used, span, allowed = span_text(found.used_s), span_text(found.span_s), span_text(found.allowed_s)
    return f"in use, or not known, for {used} of the last {span} ({allowed} allowed)"


def _has_point(facts: Facts, age_s_max: float, now_s: float) -> bool:
    return facts.last_point_s is not None and now_s - facts.last_point_s <= age_s_max


def _later(verdict: _Verdict, place: int, policy: Policy) -> _Verdict:
    most = policy.archives_per_job_max
    reason = f"{verdict.reason}, but a job archives at most {most}, and it is number {place}"
    return replace(verdict, archives=False, reason=reason, is_barred=True)


def _forced(facts: Facts, verdict: _Verdict, policy: Policy, now_s: float, why: str) -> _Verdict | None:
    """To archive a VM because primary is too full; None where even that is no reason."""
    if verdict.archives or verdict.is_barred or not facts.state.is_off:
        return None
    is_met, reason, _ = _off(facts, policy.unused_for_s_min, now_s)
    return replace(verdict, archives=True, reason=f"{why}, and it is {reason}") if is_met else None
