"""The sections ``[archive]``, ``[jobs]``, ``[hooks]`` and ``[retention]``: what backup jobs do, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from vmfs_stub.config.values import ByteCount, Section, absolute
from vmfs_stub.core.retention import Retention
from vmfs_stub.core.windows import Window, Windows, minute_of


class ArchiveConfig(Section):
    """Turning VMs into placeholders; ``enabled`` lets a backup job do so by [policy].

    With ``dry_run`` a backup job only says which VMs it would make placeholders of.  ``min_copies`` of 0 stands for as
    many as there are places for; see `Config.min_copies`.
    """

    enabled: bool = False
    dry_run: bool = False
    min_copies: int = Field(default=0, ge=0, le=2)
    workers: int = Field(default=2, ge=1, le=64)
    resident_head_bytes: ByteCount = 1 << 20
    resident_tail_bytes: ByteCount = 1 << 20
    placeholder_bytes_min: ByteCount = 8 << 20


def _minute(value: object) -> object:
    return minute_of(value) if isinstance(value, str) else value


class WindowConfig(Section):
    """A time of day, in the host's time zone, and how many bytes per second backups may read in it; 0: no limit."""

    start: Annotated[int, BeforeValidator(_minute), Field(alias="from", ge=0, lt=1440)]
    end: Annotated[int, BeforeValidator(_minute), Field(alias="to", ge=0, lt=1440)]
    bytes_per_s_max: ByteCount = 0


class JobsConfig(Section):
    """Backup jobs: ``parallel`` VMs at once; guests get ``shutdown_limit_s`` to power off.

    A job ends when of at least ``failures_count_min`` VMs that failed the share is above ``failures_percent_max``.  Of
    a VM in use at most ``set_aside_bytes_max`` of what its guest changes meanwhile are set aside on primary.
    """

    parallel: int = Field(default=2, ge=1, le=64)
    failures_percent_max: float = Field(default=50, ge=0, le=100)
    failures_count_min: int = Field(default=5, ge=1, le=1_000_000)
    windows: tuple[WindowConfig, ...] = Field(default=(), max_length=100)
    bytes_per_s_max_outside: ByteCount = 0
    set_aside_bytes_max: ByteCount = 16 << 30
    shutdown_limit_s: float = Field(default=300, gt=0, le=86400)

    @property
    def bandwidth(self) -> Windows:
        """How fast backups may read, by time of day."""
        windows = [Window(each.start, each.end, each.bytes_per_s_max) for each in self.windows]
        return Windows(tuple(windows), self.bytes_per_s_max_outside)


class HooksConfig(Section):
    """Commands to run before and after something is done to a VM, each a list of words; empty: none."""

    before: tuple[str, ...] = Field(default=(), max_length=100)
    after: tuple[str, ...] = Field(default=(), max_length=100)
    limit_s: float = Field(default=60, gt=0, le=3600)

    @field_validator("before", "after")
    @classmethod
    def _is_command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            absolute(Path(value[0]))
        if any("\0" in word for word in value):
            raise ValueError("must not hold the character NUL")
        return value


RuleCount = Annotated[int, Field(ge=0, le=1_000_000)]


class RetentionConfig(Section):
    """Which restore points of a VM are kept; 0 is no rule, and without any rule all are.

    ``keep_deleted_days`` is for VMs that were deleted; without it theirs are kept until an operator forgets them.  It
    is never 0, which for the others means that nothing is forgotten.
    """

    keep_last: RuleCount = 0
    keep_hourly: RuleCount = 0
    keep_daily: RuleCount = 0
    keep_weekly: RuleCount = 0
    keep_monthly: RuleCount = 0
    keep_yearly: RuleCount = 0
    keep_deleted_days: int | None = Field(default=None, ge=1, le=36_500)

    @property
    def rules(self) -> Retention:
        """The rules for VMs that exist."""
        return Retention(**self.model_dump(exclude={"keep_deleted_days"}))
