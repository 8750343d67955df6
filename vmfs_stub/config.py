"""The configuration: one frozen object, read from a TOML file and validated once, at start.

What an operator may have to change takes its limit from here; other bounds are constants beside their use.  Unknown
keys are refused, so that a misspelt limit is not silently the default.  Must not know who uses a value, and touches no
path that it names: whether a directory exists is asked by ``init``, ``doctor`` and the daemon.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.names import LOCK_FILE, MAPS_DIR, PRIVATE_DIR
from vmfs_stub.core.retention import Retention

DEFAULT_CONFIG_PATH = Path("/etc/vmfs-stub/config.toml")
CONFIG_ENVIRONMENT = "VMFS_STUB_CONFIG"
RUNTIME_ROOT = Path("/run/vmfs-stub")

GUEST_TIMEOUT_S = 30
"""SCSI time-out of a Linux guest: a recall that takes longer than this resets the guest's disk."""

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,19}) *([A-Za-z]*)")
BYTES_MAX = 2**63 - 1
CONFIG_BYTES_MAX = 256 << 10
_DOTS_MAX = 128
"""In one line: tomllib needs time by the square of a dotted key's parts, and no key here has more than two."""
_ERRORS_MAX = 20
"""More are not told at once: the lines of each are looked for in all of the file."""


def parse_bytes(value: object) -> object:
    """Number of bytes of ``"8 MiB"``; whatever is not a string is returned as it is, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError('not a size: write bytes, or a whole number with KiB, MiB, GiB or TiB, as in "8 MiB"')
    return int(match[1]) * _UNITS[match[2].upper()]


ByteCount = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=BYTES_MAX)]


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    if "\0" in str(value):
        raise ValueError("must not hold the character NUL")
    return Path(os.path.normpath(value))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class DatastoreConfig(_Section):
    """One backing directory and the mount that shows it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    backing: Path
    mountpoint: Path
    runtime_dir: Path

    @model_validator(mode="before")
    @classmethod
    def _runtime_dir_from_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "runtime_dir" not in values and isinstance(values.get("name"), str):
            return {**values, "runtime_dir": RUNTIME_ROOT / values["name"]}
        return values

    @field_validator("backing", "mountpoint", "runtime_dir")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        return _absolute(value)

    @model_validator(mode="after")
    def _is_apart(self) -> DatastoreConfig:
        refuse_nesting({"backing": self.backing, "mountpoint": self.mountpoint, "runtime_dir": self.runtime_dir})
        return self


class _WithCredentials(_Section):
    """Of a place that may ask who we are; without, they come from where Amazon's tools look."""

    access_key_id: str = ""
    secret_access_key: str = Field(default="", repr=False)

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError("access_key_id and secret_access_key go together: give both, or neither")
        return self


class StoreConfig(_WithCredentials):
    """Secondary storage, and how patient to be with it."""

    url: str = Field(min_length=1)
    threads: int = Field(default=16, ge=1, le=256)
    retries_max: int = Field(default=3, ge=0, le=100)
    listing_lag_s: float = Field(default=30, ge=0, le=86400)
    key_file: Path | None = None
    passphrase_file: Path | None = None

    @field_validator("key_file", "passphrase_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("key_file", "passphrase_file")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute(value)

    @model_validator(mode="after")
    def _key_is_one(self) -> StoreConfig:
        if self.key_file is not None and self.passphrase_file is not None:
            raise ValueError("key_file or passphrase_file opens the store: give one of them, or neither")
        return self


class ReplicaConfig(_WithCredentials):
    """A second store that holds the same; none without ``url``.  It is asked in the same way as the store."""

    url: str = ""


class RecallConfig(_Section):
    """Bringing absent bytes back while a guest waits."""

    recall_deadline_s: float = Field(default=25, gt=0, le=3600)
    recall_concurrency: int = Field(default=16, ge=1, le=1024)
    recall_bytes_max: ByteCount = 64 << 20
    recall_queue_max: int = Field(default=1024, ge=1, le=2048)
    store_timeout_s: float = Field(default=10, gt=0, le=3600)


class HydrationConfig(_Section):
    """Bringing the rest back in the background; ``bytes_per_s_max`` of 0 is no limit."""

    enabled: bool = True
    bytes_per_s_max: ByteCount = 0


class ArchiveConfig(_Section):
    """Turning VMs into placeholders; ``enabled`` will let a backup job do so by policy, and has no effect yet.

    ``min_copies`` of 0 stands for as many as there are places for; see `Config.min_copies`.
    """

    enabled: bool = False
    min_copies: int = Field(default=0, ge=0, le=2)
    workers: int = Field(default=2, ge=1, le=64)
    resident_head_bytes: ByteCount = 1 << 20
    resident_tail_bytes: ByteCount = 1 << 20
    placeholder_bytes_min: ByteCount = 8 << 20


class JobsConfig(_Section):
    """Backup jobs; of VMs in use what guests change meanwhile is set aside on primary."""

    set_aside_bytes_max: ByteCount = 16 << 30


RuleCount = Annotated[int, Field(ge=0, le=1_000_000)]


class RetentionConfig(_Section):
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


class ScrubConfig(_Section):
    """Checking the store; ``bytes_per_s_max`` of 0 is no limit."""

    bytes_per_s_max: ByteCount = 0


class PrimaryConfig(_Section):
    """The backing filesystem."""

    free_floor_percent: float = Field(default=5, ge=0, lt=100)
    sync_interval_s: float = Field(default=5, gt=0, le=3600)
    threads: int = Field(default=16, ge=1, le=256)


class MountConfig(_Section):
    """The FUSE mount."""

    max_background: int = Field(default=512, ge=12, le=65535)
    attr_timeout_s: float = Field(default=3600, ge=0, le=86400)
    allow_other: bool = True


class ControlConfig(_Section):
    """The daemon's control socket; without ``socket`` it is control.sock in the runtime directory."""

    socket: Path | None = None
    request_timeout_s: float = Field(default=60, gt=0, le=3600)
    start_timeout_s: float = Field(default=120, gt=0, le=86400)
    connections_max: int = Field(default=64, ge=4, le=4096)
    jobs_running_max: int = Field(default=64, ge=1, le=4096)
    jobs_kept: int = Field(default=1000, ge=10, le=1_000_000)

    @field_validator("socket")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute(value)


class Config(_Section):
    """Everything that can be configured; all paths are absolute, all sizes bytes, all times seconds."""

    datastore: DatastoreConfig
    store: StoreConfig
    replica: ReplicaConfig = ReplicaConfig()
    recall: RecallConfig = RecallConfig()
    hydration: HydrationConfig = HydrationConfig()
    archive: ArchiveConfig = ArchiveConfig()
    jobs: JobsConfig = JobsConfig()
    retention: RetentionConfig = RetentionConfig()
    scrub: ScrubConfig = ScrubConfig()
    primary: PrimaryConfig = PrimaryConfig()
    mount: MountConfig = MountConfig()
    control: ControlConfig = ControlConfig()

    @model_validator(mode="after")
    def _replica_is_another_place(self) -> Config:
        if self.replica.url == self.store.url:
            raise ValueError("replica.url is that of the store: a replica is another place, or there is none")
        if self.archive.min_copies > 1 and not self.replica.url:
            raise ValueError("archive.min_copies is 2, and there is no second place: name one in [replica] url")
        return self

    @property
    def min_copies(self) -> int:
        """How many copies of what is released must have been read back before: that in the store, and the replica's."""
        return self.archive.min_copies or (2 if self.replica.url else 1)

    @property
    def private_dir(self) -> Path:
        """Private state in the backing directory (0700)."""
        return self.datastore.backing / PRIVATE_DIR

    @property
    def lock_path(self) -> Path:
        """The flock that the serving daemon holds."""
        return self.private_dir / LOCK_FILE

    @property
    def mover_lock_path(self) -> Path:
        """The flock that a daemon and its data movers share."""
        return self.private_dir / "mover.lock"

    @property
    def index_path(self) -> Path:
        """Local chunk index; it can be rebuilt from the store."""
        return self.private_dir / "index.sqlite"

    @property
    def reachability_path(self) -> Path:
        """What garbage collection knows of manifests and segments; it can be read from the store again."""
        return self.private_dir / "reachability.sqlite"

    @property
    def scrub_path(self) -> Path:
        """How far the scrub of the store has come; without it, it begins anew."""
        return self.private_dir / "scrub.sqlite"

    @property
    def read_back_path(self) -> Path:
        """Which packs of the replica were read back; without it, they are read again when they are needed again."""
        return self.private_dir / "replica.sqlite"

    @property
    def maps_dir(self) -> Path:
        """Durable residency maps: those of all placeholders that are not over."""
        return self.private_dir / MAPS_DIR

    @property
    def hold_path(self) -> Path:
        """Exists while recalls are held."""
        return self.private_dir / "hold"

    @property
    def store_copy_path(self) -> Path:
        """The store's description as it was last seen."""
        return self.private_dir / "store.json"

    @property
    def catalog_path(self) -> Path:
        """Local catalog of VMs, jobs and accesses."""
        return self.private_dir / "catalog.sqlite"

    @property
    def log_path(self) -> Path:
        """Log of a daemon that runs in the background."""
        return self.datastore.runtime_dir / "daemon.log"

    @property
    def socket_path(self) -> Path:
        """The control socket."""
        return self.control.socket or self.datastore.runtime_dir / "control.sock"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but most likely not meant, each as one sentence."""
        found = []
        if self.recall.recall_deadline_s >= GUEST_TIMEOUT_S:
            found.append(
                f"recall.recall_deadline_s is {self.recall.recall_deadline_s:g}: guests give up on their disk after "
                f"{GUEST_TIMEOUT_S} s; set it below that"
            )
        if self.recall.store_timeout_s >= self.recall.recall_deadline_s:
            found.append(
                "recall.store_timeout_s is not below recall.recall_deadline_s: a read that the store does not answer "
                "cannot be tried again before the guest's read fails"
            )
        if self.archive.enabled:
            found.append(
                "archive.enabled has no effect yet, since idle VMs are not recognised: use `vmfs-stub archive VM`"
            )
        return tuple(found)


def refuse_nesting(paths: dict[str, Path]) -> None:
    """Raise ValueError when one of the named directories is, or lies in, another one."""
    for name, path in paths.items():
        for other_name, other in paths.items():
            if name < other_name and path == other:
                raise ValueError(f"{name} and {other_name} must not be the same directory ({path})")
            if name != other_name and path.is_relative_to(other) and path != other:
                raise ValueError(f"{name} ({path}) must not lie in {other_name} ({other})")


def config_path(option: Path | None) -> Path:
    """The file to read: ``--config``, else $VMFS_STUB_CONFIG, else /etc/vmfs-stub/config.toml."""
    if option is not None:
        return option
    environment = os.environ.get(CONFIG_ENVIRONMENT)
    return Path(environment) if environment else DEFAULT_CONFIG_PATH


def load_config(path: Path) -> Config:
    """Read and validate ``path``; raises ConfigError with file, line and key of everything that is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path}: no such file; name one with --config or ${CONFIG_ENVIRONMENT}, or write one with `vmfs-stub init`"
        ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes: not a configuration")
    return parse_config(text, origin=str(path))


def parse_config(text: str, *, origin: str) -> Config:
    """Validate the TOML ``text``; ``origin`` names it in errors.  Raises ConfigError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _DOTS_MAX and not line.startswith("#"):
            raise ConfigError(f"{origin}:{number}: more than {_DOTS_MAX} dots in one line")
    try:
        values = tomllib.loads(text)
    except ValueError as exc:  # tomllib's own kind, and that of a number of too many digits
        raise ConfigError(f"{origin}: not valid TOML: {exc}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{origin}: not valid TOML: nested too deeply") from exc
    try:
        return Config.model_validate(values)
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False)
        lines = [_describe(one["loc"], one["type"], one["msg"], text, origin) for one in found[:_ERRORS_MAX]]
        raise ConfigError("\n".join(lines)) from exc


def _describe(loc: tuple[int | str, ...], kind: str, message: str, text: str, origin: str) -> str:
    keys = [str(part) for part in loc]
    line = _line_of(keys, text)
    where = f"{origin}:{line}" if line else origin
    if kind == "extra_forbidden":
        message = "no such key (see the commented file that `vmfs-stub init` writes)"
    elif kind == "missing":
        message = "is missing"
    return ": ".join(filter(None, (where, ".".join(keys), message.removeprefix("Value error, "))))


def _line_of(keys: list[str], text: str) -> int | None:
    """Line (from 1) of ``section.key``, else of its section; None when neither is written plainly."""
    section, section_line = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        header, closed, _ = line.strip().partition("]")
        if closed and header.startswith("[") and not header.startswith("[["):
            section = header[1:].strip()
            if keys and section == keys[0]:
                section_line = number
            continue
        pair = re.match(r"\s*([A-Za-z0-9_.\-]+)\s*=", line)
        if pair is not None and [*filter(None, [section]), *pair[1].split(".")] == keys:
            return number
    return section_line
