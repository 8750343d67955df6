"""What a policy decides: single cases with their reasons, and what must be true of all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs_stub.core import policy as policy_module
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.policy import (
    DEFAULT_RULE,
    Facts,
    Idleness,
    Match,
    Policy,
    Rule,
    WhenRunning,
    decide,
    decide_all,
    predicted_usable_s,
)
from vmfs_stub.core.unused import GAP_SHARE_MAX, Found, Limits, find_off, last_start_s
from vmfs_stub.core.usage import DAY_S, GuestState, Sample

NOW_S = 1_800_000_000.0
HOUR_S = 3600.0
GIB = 1 << 30
DEFAULT = Policy((DEFAULT_RULE,))


def hour(ago: int, kind: str) -> Sample | None:
    """The sample of the hour that ended ``ago`` hours before now."""
    end_s = NOW_S - ago * HOUR_S
    off_s, running_s, cpu, disk, network = {
        "off": (HOUR_S, 0.0, 0.0, 0.0, 0.0),
        "idle": (0.0, HOUR_S, 1.0, 100.0, 100.0),
        "busy": (0.0, HOUR_S, 90.0, 1e7, 1e6),
        "cpu": (0.0, HOUR_S, 90.0, 100.0, 100.0),
        "untold": (0.0, HOUR_S, None, 100.0, 100.0),
        "unknown": (0.0, 0.0, None, None, None),
        "half": (HOUR_S / 2, HOUR_S / 2, 90.0, 1e7, 1e6),
        "gap": (0.0, 0.0, 0.0, 0.0, 0.0),
    }[kind]
    return None if kind == "gap" else Sample(end_s - HOUR_S, end_s, off_s, running_s, cpu, disk, network)


def history(*kinds: str) -> tuple[Sample, ...]:
    """Samples of hours, of which the first was the last."""
    found = [hour(ago, kind) for ago, kind in enumerate(kinds)]
    return tuple(sample for sample in reversed(found) if sample is not None)


def vm(state: GuestState = GuestState.OFF, samples: Sequence[Sample] = (), number: int = 0, **more: object) -> Facts:
    """A VM that nothing but its use keeps from being archived."""
    plain = Facts(VmId(f"{number:032x}"), f"vm{number}", f"vm{number}", state, 20 * GIB, 10 * GIB, 5.0, samples=samples)
    return replace(plain, **more)  # type: ignore[arg-type]


TWO_WEEKS_OFF = history(*["off"] * 337)
TWO_WEEKS_IDLE = history(*["idle"] * 337)
OFF, RUNNING = GuestState.OFF, GuestState.RUNNING


@pytest.mark.parametrize(
    ("facts", "archives", "reason"),
    [
        (vm(OFF, TWO_WEEKS_OFF), True, "off for 14 days"),
        (vm(GuestState.SAVED, TWO_WEEKS_OFF), True, "off for 14 days"),
        (
            vm(OFF, history(*["off"] * 200)),
            False,
            "not known to be off for 14 days: in use, or not known, for 5.7 days",
        ),
        (vm(OFF), False, "not known to be off"),
        (vm(OFF, TWO_WEEKS_OFF, last_used_s=NOW_S - HOUR_S), True, "idle for 100.0% of 14 days"),
        (vm(RUNNING, TWO_WEEKS_IDLE), False, 'idle for 100.0% of 14 days, but it runs, and its rule says "skip"'),
        (vm(RUNNING, history(*["busy"] * 337)), False, "running, not off; not idle for 95% of 14 days: in use, or not"),
        (vm(GuestState.UNKNOWN, TWO_WEEKS_OFF), False, "nobody knows whether it runs"),
        (vm(GuestState.PAUSED, TWO_WEEKS_IDLE), False, "is paused"),
        (vm(GuestState.CRASHED, TWO_WEEKS_IDLE), False, "has crashed"),
        (vm(OFF, TWO_WEEKS_OFF, is_protected=True), False, "is protected; `vmfs-stub unprotect`"),
        (vm(OFF, TWO_WEEKS_OFF, is_protected=True, protected_by="w"), False, "is protected by the metadata of domain"),
        (vm(OFF, TWO_WEEKS_OFF, is_placeholder=True), False, "is archived already"),
        (vm(OFF, TWO_WEEKS_OFF, never=("a base of web", "open")), False, "a base of web; open"),
        (vm(OFF, TWO_WEEKS_OFF, size_bytes=5), False, "is too small: 5 of at least 8388608 bytes"),
        (vm(OFF, TWO_WEEKS_OFF, frees_bytes=0), False, "would free nothing"),
        (
            vm(OFF, TWO_WEEKS_OFF, last_recalled_s=NOW_S - 2 * DAY_S),
            False,
            "was recalled 2 days ago, and stays for 7 days",
        ),
        (vm(OFF, TWO_WEEKS_OFF, last_recalled_s=NOW_S + DAY_S), False, "was recalled"),
        (vm(OFF, TWO_WEEKS_OFF, last_recalled_s=NOW_S - 8 * DAY_S), True, "off"),
    ],
)
def test_default_policy(facts: Facts, archives: bool, reason: str) -> None:
    found = decide(facts, DEFAULT, now_s=NOW_S)
    assert (found.archives, reason in found.reason) == (archives, True), found.reason
    assert "\n" not in found.reason


def test_first_rule_that_matches_counts() -> None:
    rules = (
        Rule("names", Match(names=("web-*", "db?")), archives=False),
        Rule("paths", Match(paths=("lab/*",)), archives=False),
        Rule("metadata", Match(metadata={"group": "lab"}), archives=False),
        Rule("size", Match(size_bytes_min=100 * GIB, size_bytes_max=200 * GIB), archives=False),
        Rule("all of it", Match(names=("x*",), size_bytes_min=30 * GIB), archives=False),
        Rule("last", off_for_s=DAY_S),
        Rule("never reached", archives=False),
    )
    plain = vm(OFF, TWO_WEEKS_OFF)
    for changes, rule in (
        ({"name": "web-1"}, "names"),
        ({"name": "db1"}, "names"),
        ({"name": "Web-1"}, "last"),
        ({"path": "lab/x"}, "paths"),
        ({"metadata": {"group": "lab", "more": ""}}, "metadata"),
        ({"metadata": {"group": "labs"}}, "last"),
        ({"size_bytes": 100 * GIB}, "size"),
        ({"size_bytes": 200 * GIB + 1}, "last"),
        ({"name": "x1"}, "last"),
        ({"name": "x1", "size_bytes": 30 * GIB}, "all of it"),
    ):
        found = decide(replace(plain, **changes), Policy(rules), now_s=NOW_S)  # type: ignore[arg-type]
        assert (found.rule, found.archives) == (rule, rule == "last")
    none = decide(plain, Policy(rules[:1]), now_s=NOW_S)
    assert (none.rule, none.archives, none.reason) == (None, False, "no rule is for it")


def test_conditions_of_a_rule() -> None:
    plain = vm(OFF, TWO_WEEKS_OFF, last_point_s=NOW_S - DAY_S)

    def says(facts: Facts, **rule: object) -> tuple[bool, str]:
        found = decide(facts, Policy((Rule("r", **rule),)), now_s=NOW_S)  # type: ignore[arg-type]
        return found.archives, found.reason

    assert says(plain) == (False, "its rule has no condition")
    assert says(replace(plain, state_since_s=NOW_S - 2 * DAY_S), off_for_s=3 * DAY_S) == (
        False,
        "off for 2 days, less than 3 days",
    )
    assert says(replace(plain, last_used_s=NOW_S - HOUR_S), off_for_s=DAY_S) == (
        False,
        "used 1 hour ago, less than 1 day",
    )
    assert says(plain, off_for_s=DAY_S, target_s=5.0)[0]
    assert says(plain, off_for_s=DAY_S, target_s=4.0) == (False, "would take 5 s to be usable, and may take 4 s")
    assert says(plain, off_for_s=DAY_S, point_age_max_s=2 * DAY_S)[0]
    assert says(plain, off_for_s=DAY_S, point_age_max_s=HOUR_S) == (
        False,
        "off for 1 day, but its last restore point may be at most 1 hour old, and it is 1 day old",
    )
    assert says(replace(plain, last_point_s=None), off_for_s=DAY_S, point_age_max_s=HOUR_S)[1].endswith("it has none")
    assert says(plain, off_for_s=30 * DAY_S, not_started_for_s=7 * DAY_S) == (True, "not started for 7 days")


def test_not_started_is_not_off() -> None:
    rule = Policy((Rule("r", not_started_for_s=7 * DAY_S),))
    ran = history(*["off"] * 30, *["idle"] * 307)
    for started_s, archives in ((NOW_S - 8 * DAY_S, True), (NOW_S - 6 * DAY_S, False), (None, False)):
        assert decide(vm(OFF, ran, last_started_s=started_s), rule, now_s=NOW_S).archives == archives
    gaps = history(*["off"] * 30, *["gap"] * 30, *["idle"] * 277)
    assert not decide(vm(OFF, gaps, last_started_s=NOW_S - 8 * DAY_S), rule, now_s=NOW_S).archives
    assert not decide(vm(RUNNING, ran, last_started_s=NOW_S - 8 * DAY_S), rule, now_s=NOW_S).archives


@pytest.mark.parametrize("what", list(WhenRunning))
def test_what_is_to_be_done_with_one_that_runs(what: WhenRunning) -> None:
    rule = Rule("r", idle=Idleness(7 * DAY_S), when_running=what)
    found = decide(vm(RUNNING, TWO_WEEKS_IDLE), Policy((rule,)), now_s=NOW_S)
    assert found.when_running is what
    assert found.archives == (what is not WhenRunning.SKIP)
    assert what.value in found.reason
    assert found.numbers["used_s"] == 0


@pytest.mark.parametrize(
    ("kinds", "off", "idle"),
    [
        (["off"] * 48, True, True),
        (["off"] * 24 + ["idle"] * 24, False, True),
        (["idle"] * 48, False, True),
        (["idle"] * 10 + ["busy"] + ["idle"] * 37, False, True),
        (["idle"] * 10 + ["cpu"] * 2 + ["idle"] * 36, False, False),
        (["idle"] * 44 + ["cpu"] * 2 + ["idle"] * 2, False, True),
        (["idle"] * 30 + ["cpu"] * 2 + ["idle"] * 16, False, False),
        (["idle"] * 43 + ["cpu"] * 3 + ["idle"] * 2, False, False),
        (["untold"] * 48, False, False),
        (["unknown"] + ["off"] * 47, False, False),
        (["gap"] + ["off"] * 47, False, False),
        (["off"] * 47 + ["gap"], False, False),
        (["idle"] * 24 + ["gap"] + ["idle"] * 23, False, False),
        (["off"] * 23 + ["gap"], False, False),
        ([], False, False),
    ],
)
def test_windows_of_two_days(kinds: list[str], off: bool, idle: bool) -> None:
    rules = {"off": Rule("r", off_for_s=2 * DAY_S), "idle": Rule("r", idle=Idleness(2 * DAY_S))}
    facts = vm(OFF, history(*kinds))
    found = {name: decide(facts, Policy((rule,)), now_s=NOW_S).archives for name, rule in rules.items()}
    assert found == {"off": off, "idle": idle}


def test_a_short_gap_is_allowed() -> None:
    """A restart of the daemon, or the time since the newest sample."""
    allowed_s = GAP_SHARE_MAX * DAY_S
    for gap_s, holds in ((allowed_s - 1, True), (allowed_s + 1, False)):
        assert find_off(TWO_WEEKS_OFF, now_s=NOW_S + gap_s, window_s=3 * DAY_S).holds == holds
        cut = (*TWO_WEEKS_OFF[:-1], replace(TWO_WEEKS_OFF[-1], start_s=TWO_WEEKS_OFF[-1].start_s + gap_s, off_s=0.0))
        assert not find_off(cut, now_s=NOW_S, window_s=3 * DAY_S).holds
        shorter = replace(TWO_WEEKS_OFF[-1], start_s=TWO_WEEKS_OFF[-1].start_s + gap_s, off_s=HOUR_S - gap_s)
        assert find_off((*TWO_WEEKS_OFF[:-1], shorter), now_s=NOW_S, window_s=3 * DAY_S).holds == holds


def test_samples_of_the_future_and_overlapping_ones_say_nothing() -> None:
    later = tuple(replace(each, start_s=each.start_s + DAY_S, end_s=each.end_s + DAY_S) for each in TWO_WEEKS_OFF)
    assert not find_off(later, now_s=NOW_S, window_s=14 * DAY_S).holds
    twice = tuple(each for each in TWO_WEEKS_OFF[-40:] for _ in range(2))
    assert not find_off(twice, now_s=NOW_S, window_s=3 * DAY_S).holds


def test_last_start() -> None:
    assert last_start_s(()) is None
    assert last_start_s(history(*["idle"] * 5)) is None
    assert last_start_s(history("off", "idle", "idle", "off", "idle")) == NOW_S - 3 * HOUR_S
    assert last_start_s(history("off", "half", "off")) == NOW_S - 2 * HOUR_S


def test_prediction() -> None:
    def predicted(needed: int) -> float:
        return predicted_usable_s(needed, boot_bytes=256 << 20, bytes_per_s=64 << 20, begin_s=1)

    assert predicted(0) == 0
    assert predicted(64 << 20) == 2
    assert predicted(100 * GIB) == 5


# Of all VMs


def archived(facts: Sequence[Facts], policy: Policy, *, used: float = 0.5) -> set[str]:
    found = decide_all(facts, policy, now_s=NOW_S, size_bytes=1000 * GIB, free_bytes=round((1 - used) * 1000 * GIB))
    assert [each.vm_id for each in found] == [each.vm_id for each in facts]
    return {each.name for each in found if each.archives}


def test_a_job_takes_the_best() -> None:
    facts = [vm(OFF, TWO_WEEKS_OFF, n, frees_bytes=(n % 4 + 1) * GIB, usable_s=2.0 + n // 4) for n in range(8)]
    assert archived(facts, replace(DEFAULT, archives_per_job_max=3)) == {"vm2", "vm3", "vm7"}
    found = decide_all(
        facts, replace(DEFAULT, archives_per_job_max=3), now_s=NOW_S, size_bytes=1000 * GIB, free_bytes=500 * GIB
    )
    assert found[6].reason == "off for 14 days, but a job archives at most 3, and it is number 5"
    assert archived(facts, replace(DEFAULT, archives_per_job_max=0)) == set()


DAYS_OFF = history(*["off"] * 30, *["busy"] * 307)


def test_above_the_high_watermark_the_best_are_taken_until_the_low_one() -> None:
    policy = replace(DEFAULT, high_watermark=0.85, low_watermark=0.83, archives_per_job_max=100)
    facts = [vm(OFF, DAYS_OFF, n, frees_bytes=(n + 1) * GIB) for n in range(10)]
    assert archived(facts, policy, used=0.85) == set()
    assert archived(facts, policy, used=0.86) == {"vm9", "vm8", "vm7", "vm6"}  # 34 of 30 GiB
    assert archived(facts, replace(policy, archives_per_job_max=2), used=0.99) == {"vm9", "vm8"}
    idle = [*facts, vm(OFF, TWO_WEEKS_OFF, 10, frees_bytes=30 * GIB)]
    assert archived(idle, policy, used=0.86) == {"vm10"}
    found = decide_all(facts, policy, now_s=NOW_S, size_bytes=1000 * GIB, free_bytes=140 * GIB)
    assert found[9].reason == "primary is 86.0% full, above 85.0%, and it is off for 1 day"


def test_less_than_the_free_floor_is_above_the_high_watermark() -> None:
    facts = [vm(OFF, DAYS_OFF, n) for n in range(10)]
    assert archived(facts, DEFAULT, used=0.90) == set()
    assert len(archived(facts, DEFAULT, used=0.905)) == 1
    assert len(archived(facts, replace(DEFAULT, high_watermark=0.99), used=0.905)) == 1
    assert len(archived(facts, replace(DEFAULT, free_floor=0.05), used=0.905)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": history(*["off"] * 20, *["busy"] * 300)},
        {"samples": ()},
        {"state": GuestState.RUNNING, "samples": TWO_WEEKS_IDLE},
        {"state": GuestState.UNKNOWN},
        {"is_protected": True},
        {"never": ("open",)},
        {"last_recalled_s": NOW_S - DAY_S},
        {"last_used_s": NOW_S - HOUR_S},
        {"usable_s": 61.0},
        {"name": "kept"},
    ],
)
def test_what_stays_even_above_the_high_watermark(changes: dict[str, object]) -> None:
    rules = (Rule("kept", Match(names=("kept",)), archives=False), replace(DEFAULT_RULE, target_s=60.0))
    assert archived([replace(vm(OFF, DAYS_OFF), **changes)], Policy(rules), used=0.99) == set()  # type: ignore[arg-type]
    assert archived([vm(OFF, DAYS_OFF)], Policy(rules), used=0.99) == {"vm0"}


# Properties

KINDS = ("off", "idle", "busy", "cpu", "untold", "unknown", "half", "gap")


@st.composite
def histories(draw: st.DrawFn) -> tuple[Sample, ...]:
    """Days of mostly one kind, with a few other hours anywhere; some samples cover several hours."""
    kinds = [draw(st.sampled_from(("off", "idle")))] * draw(st.integers(20, 80))
    for _ in range(draw(st.integers(0, 6))):
        kinds[draw(st.integers(0, len(kinds) - 1))] = draw(st.sampled_from(KINDS))
    if draw(st.booleans()):
        turn = draw(st.integers(0, len(kinds)))
        kinds[turn:] = [draw(st.sampled_from(("off", "idle", "busy")))] * (len(kinds) - turn)
    return rolled(history(*kinds), draw(st.integers(1, 4)), draw(st.sampled_from((0.0, 300.0, 1000.0))))


def rolled(samples: Sequence[Sample], count: int, later_s: float) -> tuple[Sample, ...]:
    """As a catalog keeps them: ``count`` that follow each other as one; all ``later_s`` earlier."""
    made: list[Sample] = []
    for number, each in enumerate(samples):
        moved = replace(each, start_s=each.start_s - later_s, end_s=each.end_s - later_s)
        if made and number % count and made[-1].end_s == moved.start_s:
            last = made[-1]
            rates = {
                name: None if None in pair else max(pair)
                for name in ("cpu_percent_max", "disk_bytes_per_s_max", "network_bytes_per_s_max")
                for pair in [(getattr(last, name), getattr(moved, name))]
            }
            off_s, running_s = last.off_s + moved.off_s, last.running_s + moved.running_s
            made[-1] = replace(last, end_s=moved.end_s, off_s=off_s, running_s=running_s, **rates)
        else:
            made.append(moved)
    return tuple(made)


AGES = st.none() | st.integers(0, 100).map(lambda hours: NOW_S - hours * HOUR_S)


@st.composite
def some_facts(draw: st.DrawFn, number: int = 0) -> Facts:
    samples = draw(histories())
    likely = OFF if samples and samples[-1].off_s else RUNNING
    return Facts(
        VmId(f"{number:032x}"),
        f"vm{number}",
        f"vm{number}",
        draw(st.sampled_from((likely, likely, likely, *GuestState))),
        draw(st.sampled_from((1, 9 << 20, GIB, GIB))),
        draw(st.integers(0, GIB)),
        draw(st.floats(0, 100)),
        samples=samples,
        state_since_s=draw(st.none() | AGES),
        last_started_s=draw(st.none() | AGES),
        last_used_s=draw(st.none() | AGES),
        last_point_s=draw(AGES),
        last_recalled_s=draw(st.none() | AGES),
        is_protected=draw(st.integers(0, 9)) == 9,
        is_placeholder=draw(st.integers(0, 9)) == 9,
        never=draw(st.sampled_from(((), (), (), ("open",)))),
    )


WINDOWS = st.sampled_from((0.5, 1.0, 1.3, 2.0, 3.0)).map(lambda days: days * DAY_S)


@st.composite
def some_rules(draw: st.DrawFn) -> Rule:
    share = draw(st.sampled_from((0.8, 0.9, 0.95, 0.99)))
    return Rule(
        "r",
        off_for_s=draw(st.none() | WINDOWS),
        not_started_for_s=draw(st.none() | WINDOWS),
        idle=draw(st.none() | st.builds(Idleness, WINDOWS, st.just(share), st.sampled_from((0.5, 5.0, 95.0)))),
        point_age_max_s=draw(st.none() | WINDOWS),
        when_running=draw(st.sampled_from(list(WhenRunning))),
        target_s=draw(st.none() | st.floats(0, 100)),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return Policy(
        (draw(some_rules()),),
        archives_per_job_max=draw(st.integers(0, 4)),
        recalled_for_s_min=draw(st.sampled_from((0.0, DAY_S))),
        high_watermark=draw(st.none() | st.floats(0.3, 1)),
        low_watermark=draw(st.none() | st.floats(0.3, 1)),
    )


def stricter(draw: st.DrawFn, policy: Policy) -> Policy:
    """One thing of a policy made stricter."""
    rule = policy.rules[0]
    more = draw(st.floats(1, 4))
    less = 1 / more

    def times(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    choices: list[dict[str, object]] = [
        {"off_for_s": times(rule.off_for_s, more)},
        {"off_for_s": None},
        {"not_started_for_s": times(rule.not_started_for_s, more)},
        {"not_started_for_s": None},
        {"point_age_max_s": times(rule.point_age_max_s, less)},
        {"target_s": times(rule.target_s, less)},
        {"when_running": WhenRunning.SKIP},
        {"archives": False},
        {"idle": None},
    ]
    if (idle := rule.idle) is not None:
        choices += [
            {"idle": replace(idle, window_s=idle.window_s * more)},
            {"idle": replace(idle, share=1 - (1 - idle.share) * less)},
            {"idle": replace(idle, cpu_percent_max=idle.cpu_percent_max * less)},
            {"idle": replace(idle, disk_bytes_per_s_max=idle.disk_bytes_per_s_max * less)},
            {"idle": replace(idle, network_bytes_per_s_max=idle.network_bytes_per_s_max * less)},
        ]
    changed = replace(policy, rules=(replace(rule, **draw(st.sampled_from(choices))),))  # type: ignore[arg-type]
    if draw(st.integers(0, 4)) == 4:
        changed = replace(changed, recalled_for_s_min=policy.recalled_for_s_min + DAY_S)
    return changed


@settings(max_examples=250, deadline=None)
@given(st.data(), some_facts(), policies())
def test_what_is_stricter_never_archives_more(data: st.DataObject, facts: Facts, policy: Policy) -> None:
    harder = stricter(data.draw, policy)
    if decide(facts, harder, now_s=NOW_S).archives:
        assert decide(facts, policy, now_s=NOW_S).archives


@settings(max_examples=250, deadline=None)
@given(histories(), st.integers(1, 80), st.integers(1, 80), st.sampled_from((0.8, 0.9, 0.95)))
def test_a_longer_window_never_holds_where_a_shorter_one_does_not(
    samples: tuple[Sample, ...], one: int, other: int, share: float
) -> None:
    check_windows(samples, one, other, share)


def check_windows(samples: tuple[Sample, ...], one: int, other: int, share: float) -> None:
    short_s, long_s = sorted((one * HOUR_S, other * HOUR_S))
    for shorter, longer in (
        (Rule("r", off_for_s=short_s), Rule("r", off_for_s=long_s)),
        (Rule("r", idle=Idleness(short_s, share)), Rule("r", idle=Idleness(long_s, share))),
    ):
        if decide(vm(OFF, samples), Policy((longer,)), now_s=NOW_S).archives:
            assert decide(vm(OFF, samples), Policy((shorter,)), now_s=NOW_S).archives


@settings(max_examples=250, deadline=None)
@given(st.data(), some_facts(), policies(), st.floats(0, 1))
def test_missing_samples_never_archive(data: st.DataObject, facts: Facts, policy: Policy, used: float) -> None:
    count = len(facts.samples)
    gone = data.draw(st.sets(st.integers(0, count - 1), max_size=5) | st.just(set(range(count)))) if count else set()
    check_missing(facts, gone, policy, used)


def check_missing(facts: Facts, gone: set[int], policy: Policy, used: float) -> None:
    less = replace(facts, samples=[each for number, each in enumerate(facts.samples) if number not in gone])
    if archived([less], policy, used=used):
        assert archived([facts], policy, used=used)


NEVER: dict[str, dict[str, object]] = {
    "protected": {"is_protected": True},
    "placeholder": {"is_placeholder": True},
    "never": {"never": ("a base in use",)},
    "unknown": {"state": GuestState.UNKNOWN},
    "no samples": {"samples": ()},
}


@settings(max_examples=150, deadline=None)
@given(some_facts(), policies(), st.floats(0, 1), st.sampled_from(sorted(NEVER)), st.booleans())
def test_what_is_never_archived(facts: Facts, policy: Policy, used: float, why: str, would: bool) -> None:
    if would:
        facts, policy = vm(OFF, TWO_WEEKS_OFF), DEFAULT
        assert archived([facts], policy, used=used)
    check_never(facts, policy, used, why)


def check_never(facts: Facts, policy: Policy, used: float, why: str) -> None:
    assert not archived([replace(facts, **NEVER[why])], policy, used=used)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.data(), policies(), st.floats(0, 1))
def test_limits_of_a_job(data: st.DataObject, policy: Policy, used: float) -> None:
    """No more than a job may archive; for the watermark no more than it takes, each of which is needed."""
    facts = [data.draw(some_facts(number)) for number in range(data.draw(st.integers(0, 6)))]
    size, free = 4 * GIB, round((1 - used) * 4 * GIB)
    found = decide_all(facts, policy, now_s=NOW_S, size_bytes=size, free_bytes=free)
    chosen = [each for each in found if each.archives]
    assert len(chosen) <= policy.archives_per_job_max
    alone = {each.vm_id: decide(each, policy, now_s=NOW_S).archives for each in facts}
    forced = sorted(each.frees_bytes for each in chosen if not alone[each.vm_id])
    if size - free <= policy.high * size:
        assert forced == []
    if forced:
        excess = (size - free) - policy.low * size
        assert sum(each.frees_bytes for each in chosen) - forced[-1] < excess or len(forced) == 1
        assert all(each.archives for each in found if alone[each.vm_id])
        smallest_last = sum(each.frees_bytes for each in chosen if alone[each.vm_id])
        assert smallest_last < excess


@settings(max_examples=150, deadline=None)
@given(some_facts(), policies())
def test_where_all_is_known_of_long_rest_it_is_archived(facts: Facts, policy: Policy) -> None:
    """The other properties would hold of a policy that archives nothing."""
    rested = replace(
        vm(OFF, TWO_WEEKS_OFF), vm_id=facts.vm_id, size_bytes=GIB, frees_bytes=GIB, usable_s=1.0, last_point_s=NOW_S
    )
    rule = replace(policy.rules[0], target_s=None, point_age_max_s=None)
    has_condition = (rule.off_for_s, rule.not_started_for_s, rule.idle) != (None, None, None)
    assert decide(rested, replace(policy, rules=(rule,)), now_s=NOW_S).archives == has_condition


def spans_by_the_minute(samples: Sequence[Sample], window_s: float, share: float) -> bool:
    """The definition, tried at each minute: of every span, at most a share was not off."""
    step_s, used_s, back_s = 60.0, 0.0, 0.0
    while back_s < window_s:
        back_s += step_s
        at_s = NOW_S - back_s
        inside = [each for each in samples if each.start_s <= at_s < each.end_s]
        # In a sample, what is not off comes last.
        is_off = bool(inside) and at_s < inside[0].start_s + inside[0].off_s
        used_s += 0.0 if is_off else step_s
        if back_s >= DAY_S and used_s > share * back_s + 1:
            return False
    return True


@settings(max_examples=200, deadline=None)
@given(histories(), st.integers(24, 60))
def test_windows_are_as_defined(samples: tuple[Sample, ...], hours: int) -> None:
    window_s = hours * HOUR_S
    moved = tuple(
        replace(each, start_s=each.start_s // 60 * 60, end_s=each.end_s // 60 * 60, off_s=each.off_s // 60 * 60)
        for each in samples
    )
    found = find_off(moved, now_s=NOW_S, window_s=window_s)
    assert found.holds == spans_by_the_minute(moved, window_s, GAP_SHARE_MAX)


def gaps_are_off(samples: Sequence[Sample], *, now_s: float, window_s: float) -> Found:
    return find_off(TWO_WEEKS_OFF if all(each.off_s for each in samples) else samples, now_s=now_s, window_s=window_s)


def whole_window_only(
    samples: Sequence[Sample], limits: Limits, *, now_s: float, window_s: float, used_share_max: float
) -> Found:
    quiet = [each for each in samples if each.cpu_percent_max is None or each.cpu_percent_max < 50]
    inside = [each for each in quiet if each.start_s >= now_s - window_s]
    used_s = window_s - sum(each.end_s - each.start_s for each in inside)
    return Found(used_s <= used_share_max * window_s, window_s, used_s, 0.0)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    barred = policy_module._barred

    def unprotected(facts: Facts, *rest: object) -> str:
        return barred(replace(facts, is_protected=False), *rest)  # type: ignore[arg-type]

    off_a_day = Policy((Rule("r", off_for_s=DAY_S),))
    ran_once = vm(OFF, history(*["off"] * 10, "idle"))
    busy_now = history(*["cpu"] * 2, *["idle"] * 71)
    rested = vm(OFF, TWO_WEEKS_OFF)
    for name, planted, check in (
        ("find_off", gaps_are_off, partial(check_missing, ran_once, {0}, off_a_day, 0.5)),
        ("find_idle", whole_window_only, partial(check_windows, busy_now, 24, 72, 0.95)),
        ("_barred", unprotected, partial(check_never, rested, DEFAULT, 0.5, "protected")),
    ):
        check()
        with monkeypatch.context() as patch:
            patch.setattr(policy_module, name, planted)
            with pytest.raises(AssertionError):
                check()


@pytest.mark.parametrize("kind", ["off", "idle", "mixed"])
def test_ten_thousand_vms_take_less_than_a_second(kind: str) -> None:
    """Two weeks of hourly samples each; all off, all idle, or a quarter each off, idle, busy, and off of late."""
    samples = {
        "off": [TWO_WEEKS_OFF],
        "idle": [TWO_WEEKS_IDLE],
        "mixed": [TWO_WEEKS_OFF, TWO_WEEKS_IDLE, history(*["busy"] * 337), history(*["off"] * 100, *["busy"] * 237)],
    }[kind]
    facts = [
        vm(OFF if each[-1].off_s else RUNNING, each, number)
        for number in range(10_000)
        for each in [samples[number % len(samples)]]
    ]
    started_s = time.process_time()
    found = decide_all(facts, DEFAULT, now_s=NOW_S, size_bytes=1000 * GIB, free_bytes=50 * GIB)
    taken_s = time.process_time() - started_s
    print(f"{kind}: {taken_s:.2f} s")
    assert len(found) == 10_000
    assert taken_s < 1
