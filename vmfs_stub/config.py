"""The configuration: one frozen object, read from a TOML file and validated once, at start.

What an operator may have to change takes its limit from here; other bounds are constants beside their use.  Unknown
keys are refused, so that a misspelt limit is not silently the default.  Must not know who uses a value, and touches no
path that it names: whether a directory exists is asked by ``init``, ``doctor`` and the daemon.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from vmfs_stub.config_policy import PolicyConfig
from vmfs_stub.config_values import ByteCount
from vmfs_stub.config_values import Section as _Section
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.names import LOCK_FILE, MAPS_DIR, PRIVATE_DIR, printable
from vmfs_stub.core.policy import Policy
from vmfs_stub.core.retention import Retention
from vmfs_stub.core.toml_places import Place, TomlPlaces
from vmfs_stub.core.windows import Window, Windows, minute_of

DEFAULT_CONFIG_PATH = Path("/etc/vmfs-stub/config.toml")
CONFIG_ENVIRONMENT = "VMFS_STUB_CONFIG"
RUNTIME_ROOT = Path("/run/vmfs-stub")

GUEST_TIMEOUT_S = 30
"""SCSI time-out of a Linux guest: a recall that takes longer than this resets the guest's disk."""

CONFIG_BYTES_MAX = 256 << 10
_DOTS_MAX = 128
"""In one line: tomllib needs time by the square of a dotted key's parts, and no key here has more than two."""
_ERRORS_MAX = 20
"""More are not told at once."""
_PARSER_PLACE = re.compile(r" \(at line ([0-9]+), column ([0-9]+)\)$")
_AT_END = " (at end of document)"
_PLAIN_MESSAGES = {
    "tuple_type": 'must be a list, as in ["one", "two"]; one of tables has its name in [[double brackets]] above each',
    "model_type": "must be a table, as in { key = value }",
    "dict_type": "must be a table, as in { key = value }",
}
"""What the validator says of Python's types, in the words of the file."""


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    if "\0" in str(value):
        raise ValueError("must not hold the character NUL")
    return Path(os.path.normpath(value))


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


class WindowConfig(_Section):
    """A time of day, in the host's time zone, and how many bytes per second backups may read in it; 0: no limit."""

    start: Annotated[int, BeforeValidator(_minute), Field(alias="from", ge=0, lt=1440)]
    end: Annotated[int, BeforeValidator(_minute), Field(alias="to", ge=0, lt=1440)]
    bytes_per_s_max: ByteCount = 0


class JobsConfig(_Section):
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


class HooksConfig(_Section):
    """Commands to run before and after something is done to a VM, each a list of words; empty: none."""

    before: tuple[str, ...] = Field(default=(), max_length=100)
    after: tuple[str, ...] = Field(default=(), max_length=100)
    limit_s: float = Field(default=60, gt=0, le=3600)

    @field_validator("before", "after")
    @classmethod
    def _is_command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            _absolute(Path(value[0]))
        if any("\0" in word for word in value):
            raise ValueError("must not hold the character NUL")
        return value


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


class UsageConfig(_Section):
    """How it is found out how VMs are used; ``hypervisors`` are shell patterns of the names of executables.

    Only what these open and read counts as use of a disk.
    """

    interval_s: float = Field(default=300, ge=1, le=3600)
    hypervisors: tuple[str, ...] = (
        "qemu-system-*",
        "qemu-kvm",
        "qemu-storage-daemon",
        "kvm",
        "cloud-hypervisor",
        "firecracker",
        "crosvm",
        "VBoxHeadless",
        "VirtualBoxVM",
    )


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


class LibvirtConfig(_Section):
    """The hypervisor; ``enabled`` of "auto": used where its binding is installed and its socket is there.

    ``save_dir`` is where it puts the memory of guests that it saves.
    """

    enabled: bool | Literal["auto"] = "auto"
    uri: str = Field(default="qemu:///system", min_length=1, max_length=4096)
    timeout_s: float = Field(default=10, gt=0, le=600)
    require_stop_on_error: bool = True
    save_dir: Path = Path("/var/lib/libvirt/qemu/save")

    @field_validator("save_dir")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        return _absolute(value)


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


class MonitoringConfig(_Section):
    """What is told of this datastore, and when that is unhealthy; a limit of 0 is none.

    Without ``listen`` metrics are on the control socket alone.  Of more than ``vms_max`` VMs, those beyond share a
    series.
    """

    listen: str = ""
    connections_max: int = Field(default=16, ge=1, le=1024)
    vms_max: int = Field(default=1000, ge=0, le=100_000)
    backup_age_max_hours: float = Field(default=0, ge=0, le=876_000)
    recall_failure_hours: float = Field(default=1, ge=0, le=876_000)
    free_percent_min: float = Field(default=1, ge=0, lt=100)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value:
            listen_address(value)
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """IP address and port to listen on; None where there is none."""
        return listen_address(self.listen) if self.listen else None


class Config(_Section):
    """Everything that can be configured; all paths are absolute, all sizes bytes, all times seconds."""

    datastore: DatastoreConfig
    store: StoreConfig
    replica: ReplicaConfig = ReplicaConfig()
    recall: RecallConfig = RecallConfig()
    hydration: HydrationConfig = HydrationConfig()
    archive: ArchiveConfig = ArchiveConfig()
    policy: PolicyConfig = PolicyConfig()
    jobs: JobsConfig = JobsConfig()
    hooks: HooksConfig = HooksConfig()
    retention: RetentionConfig = RetentionConfig()
    usage: UsageConfig = UsageConfig()
    scrub: ScrubConfig = ScrubConfig()
    primary: PrimaryConfig = PrimaryConfig()
    mount: MountConfig = MountConfig()
    control: ControlConfig = ControlConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    libvirt: LibvirtConfig = LibvirtConfig()

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
    def archive_policy(self) -> Policy:
        """Which VMs a backup job makes placeholders of; what is too small for `archive` is too small there, too."""
        return self.policy.policy(size_bytes_min=self.archive.placeholder_bytes_min)

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
    def jobs_paused_path(self) -> Path:
        """Exists while backup jobs are paused."""
        return self.private_dir / "jobs-paused"

    @property
    def store_copy_path(self) -> Path:
        """The store's description as it was last seen."""
        return self.private_dir / "store.json"

    @property
    def catalog_path(self) -> Path:
        """Local catalog of VMs, jobs, accesses and usage."""
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
        address = self.monitoring.address
        if address is not None and not ipaddress.ip_address(address[0]).is_loopback:
            found.append(
                f"monitoring.listen is {self.monitoring.listen}: whoever reaches that port sees the names of VMs and "
                "when they were backed up; nobody is asked who they are"
            )
        return tuple(found)


def listen_address(text: str) -> tuple[str, int]:
    """IP address and port of ``"127.0.0.1:9640"`` or ``"[::1]:9640"``.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise ValueError('must be an IP address and a port from 1 to 65535, as in "127.0.0.1:9640" or "[::1]:9640"')
    is_bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if is_bracketed else host)
    except ValueError:
        raise ValueError(
            f"{host!r} is no IP address (names are not looked up): write one, as in 127.0.0.1:9640 or [::1]:9640"
        ) from None
    if is_bracketed != (address.version == 6) or "%" in host:
        raise ValueError("an IPv6 address, and no other, is written in brackets and without a zone, as in [::1]:9640")
    return str(address), int(port)


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
    return parse_config(read_config_text(path), origin=str(path))


def read_config_text(path: Path) -> str:
    """What the file says, not yet validated.  Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path}: no such file; name one with --config or ${CONFIG_ENVIRONMENT}, or write one with `vmfs-stub init`"
        ) from exc
    except OSError as exc:
        hint = "; are you root?" if isinstance(exc, PermissionError) else ""
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}{hint}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes: not a configuration")
    return text


def parse_config(text: str, *, origin: str) -> Config:
    """Validate the TOML ``text``; ``origin`` names it in errors.  Raises ConfigError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _DOTS_MAX and not line.startswith("#"):
            raise ConfigError(f"{origin}:{number}: more than {_DOTS_MAX} dots in one line")
    try:
        values = tomllib.loads(text)
    except ValueError as exc:  # tomllib's own kind, and that of a number of too many digits
        raise ConfigError(_not_toml(str(exc), text, origin)) from exc
    except RecursionError as exc:
        raise ConfigError(f"{origin}: not valid TOML: nested too deeply") from exc
    try:
        return Config.model_validate(values)
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False)
        places = TomlPlaces(text)
        lines = [_describe(one["loc"], one["type"], one["msg"], places, origin) for one in found[:_ERRORS_MAX]]
        raise ConfigError("\n".join(lines)) from exc


def _not_toml(message: str, text: str, origin: str) -> str:
    """What the parser says, with the place where everybody looks for it."""
    match = _PARSER_PLACE.search(message)
    if match is not None:
        return f"{origin}:{match[1]}:{match[2]}: not valid TOML: {message.removesuffix(match[0])}"
    if message.endswith(_AT_END):
        line = text.count("\n") + 1
        return f"{origin}:{line}:{len(text) - text.rfind(chr(10))}: not valid TOML: {message}"
    return f"{origin}: not valid TOML: {message}"


def _describe(loc: tuple[int | str, ...], kind: str, message: str, places: TomlPlaces, origin: str) -> str:
    """One line of an error: an unknown key is shown where it is, what is missing where it should be, else the value."""
    where = _where(places.of(loc, value=kind != "extra_forbidden"), origin)
    if kind == "extra_forbidden":
        message = "no such key (see the commented file that `vmfs-stub init` writes)"
    elif kind == "missing":
        message = "is missing"
    else:
        message = _PLAIN_MESSAGES.get(kind, message)
    return ": ".join(filter(None, (where, _key_text(loc), message.removeprefix("Value error, "))))


def place_of(keys: Sequence[str], text: str, origin: str) -> str:
    """``origin:line:column`` of a key in the TOML ``text``, or of the table that it belongs to."""
    return _where(TomlPlaces(text).of(keys), origin)


def _where(place: Place | None, origin: str) -> str:
    return origin if place is None else f"{origin}:{place.line}:{place.column}"


def _key_text(loc: tuple[int | str, ...]) -> str:
    """``policy.rules[2].idle``: elements are counted from 1, as people do."""
    text = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in loc)
    return printable(text.removeprefix("."))
