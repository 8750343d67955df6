"""The sections ``[policy]`` and ``[[policy.rules]]``, and the `Policy` that they stand for."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from vmfs_stub.config.values import ByteCount, Duration, Section
from vmfs_stub.core.policy import DEFAULT_RULE, Idleness, Match, Policy, Rule, WhenRunning
from vmfs_stub.core.unused import GAP_SHARE_MAX, SPAN_S_MIN

_TEXTS_MAX = 1000
_TEXT_MAX = 4096
RULES_MAX = 1000

Text = Annotated[str, Field(max_length=_TEXT_MAX)]
Texts = Annotated[tuple[Text, ...], Field(max_length=_TEXTS_MAX)]
Rate = Annotated[float, Field(ge=0, le=1e15)]
Percent = Annotated[float, Field(ge=0, le=100)]


def _window(value: float | None) -> float | None:
    if value is not None and value < SPAN_S_MIN:
        raise ValueError('must be at least "1d": shares of a shorter time say nothing')
    return value


class IdleConfig(Section):
    """When a VM is idle; rates are the highest that still count as idle."""

    window: Duration
    share: float = Field(default=0.95, ge=0.5, le=1 - GAP_SHARE_MAX)
    cpu_percent_max: Rate = 5.0
    disk_bytes_per_s_max: ByteCount = 16 << 10
    network_bytes_per_s_max: ByteCount = 16 << 10

    @field_validator("window")
    @classmethod
    def _is_long(cls, value: float) -> float:
        _window(value)
        return value


class RuleConfig(Section):
    """One rule; what it is for, and when it archives that."""

    name: str = Field(min_length=1, max_length=64)
    names: Texts = ()
    paths: Texts = ()
    metadata: dict[Text, Text] = Field(default={}, max_length=_TEXTS_MAX)
    size_min: ByteCount = 0
    size_max: ByteCount | None = None
    archive: bool = True
    off_for: Duration | None = None
    not_started_for: Duration | None = None
    idle: IdleConfig | None = None
    point_age_max: Duration | None = None
    when_running: WhenRunning = WhenRunning.SKIP
    target: Duration | None = None

    @field_validator("off_for", "not_started_for")
    @classmethod
    def _is_long(cls, value: float | None) -> float | None:
        return _window(value)

    @model_validator(mode="after")
    def _has_condition(self) -> Self:
        if self.archive and self.off_for is None and self.not_started_for is None and self.idle is None:
            raise ValueError("has no condition: give off_for, not_started_for or idle, or archive = false")
        return self

    def rule(self) -> Rule:
        """As the policy knows it."""
        idle = None
        if self.idle is not None:
            idle = Idleness(
                window_s=self.idle.window,
                share=self.idle.share,
                cpu_percent_max=self.idle.cpu_percent_max,
                disk_bytes_per_s_max=self.idle.disk_bytes_per_s_max,
                network_bytes_per_s_max=self.idle.network_bytes_per_s_max,
            )
        return Rule(
            self.name,
            Match(self.names, self.paths, self.metadata, self.size_min, self.size_max),
            archives=self.archive,
            off_for_s=self.off_for,
            not_started_for_s=self.not_started_for,
            idle=idle,
            point_age_max_s=self.point_age_max,
            when_running=self.when_running,
            target_s=self.target,
        )


class PolicyConfig(Section):
    """Which VMs a backup job makes placeholders of; without rules there is one, see `DEFAULT_RULE`.

    ``boot_bytes`` and ``store_bytes_per_s`` are what is assumed of how much a boot reads, and how fast it comes.
    """

    archives_per_job_max: int = Field(default=5, ge=0, le=100_000)
    recalled_for_min: Duration = 7 * 86400.0
    unused_for_min: Duration = 86400.0
    free_floor_percent: Percent = 10.0
    high_watermark_percent: Percent | None = None
    low_watermark_percent: Percent | None = None
    boot_bytes: ByteCount = 256 << 20
    store_bytes_per_s: ByteCount = Field(default=32 << 20, ge=1)
    rules: tuple[RuleConfig, ...] = Field(default=(), max_length=RULES_MAX)

    @field_validator("unused_for_min")
    @classmethod
    def _is_long(cls, value: float) -> float:
        _window(value)
        return value

    @field_validator("rules")
    @classmethod
    def _names_differ(cls, value: tuple[RuleConfig, ...]) -> tuple[RuleConfig, ...]:
        twice = [name for name, count in Counter(rule.name for rule in value).items() if count > 1]
        if twice:
            raise ValueError(f"two rules are called {twice[0]!r}: give each a name of its own")
        return value

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        high = 100.0 if self.high_watermark_percent is None else self.high_watermark_percent
        if self.low_watermark_percent is not None and self.low_watermark_percent > high:
            raise ValueError("low_watermark_percent must not be above high_watermark_percent")
        return self

    def policy(self, *, size_bytes_min: int) -> Policy:
        """What is decided by; smaller VMs than ``size_bytes_min`` stay."""

        def share(percent: float | None) -> float | None:
            return None if percent is None else percent / 100

        return Policy(
            tuple(rule.rule() for rule in self.rules) or (DEFAULT_RULE,),
            archives_per_job_max=self.archives_per_job_max,
            recalled_for_s_min=self.recalled_for_min,
            size_bytes_min=size_bytes_min,
            high_watermark=share(self.high_watermark_percent),
            low_watermark=share(self.low_watermark_percent),
            free_floor=self.free_floor_percent / 100,
            unused_for_s_min=self.unused_for_min,
        )
