"""The sections ``[datastore]``, ``[primary]``, ``[mount]`` and ``[control]``: what one daemon serves, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from vmfs_stub.config.values import AbsolutePath, Section

RUNTIME_ROOT = Path("/run/vmfs-stub")


class DatastoreConfig(Section):
    """One backing directory and the mount that shows it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    backing: AbsolutePath
    mountpoint: AbsolutePath
    runtime_dir: AbsolutePath

    @model_validator(mode="before")
    @classmethod
    def _runtime_dir_from_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "runtime_dir" not in values and isinstance(values.get("name"), str):
            return {**values, "runtime_dir": RUNTIME_ROOT / values["name"]}
        return values

    @model_validator(mode="after")
    def _is_apart(self) -> DatastoreConfig:
        refuse_nesting({"backing": self.backing, "mountpoint": self.mountpoint, "runtime_dir": self.runtime_dir})
        return self


class PrimaryConfig(Section):
    """The backing filesystem."""

    free_floor_percent: float = Field(default=5, ge=0, lt=100)
    sync_interval_s: float = Field(default=5, gt=0, le=3600)
    threads: int = Field(default=16, ge=1, le=256)


class MountConfig(Section):
    """The FUSE mount."""

    max_background: int = Field(default=512, ge=12, le=65535)
    attr_timeout_s: float = Field(default=3600, ge=0, le=86400)
    allow_other: bool = True


class ControlConfig(Section):
    """The daemon's control socket; without ``socket`` it is control.sock in the runtime directory."""

    socket: AbsolutePath | None = None
    request_timeout_s: float = Field(default=60, gt=0, le=3600)
    start_timeout_s: float = Field(default=120, gt=0, le=86400)
    connections_max: int = Field(default=64, ge=4, le=4096)
    jobs_running_max: int = Field(default=64, ge=1, le=4096)
    jobs_kept: int = Field(default=1000, ge=10, le=1_000_000)


def refuse_nesting(paths: dict[str, Path]) -> None:
    """Raise ValueError when one of the named directories is, or lies in, another one."""
    for name, path in paths.items():
        for other_name, other in paths.items():
            if name < other_name and path == other:
                raise ValueError(f"{name} and {other_name} must not be the same directory ({path})")
            if name != other_name and path.is_relative_to(other) and path != other:
                raise ValueError(f"{name} ({path}) must not lie in {other_name} ({other})")
