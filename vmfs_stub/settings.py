"""The configuration in force, and how it is replaced while the daemon runs: all of it, or nothing.

Invariants: `current` is always one whole, valid Config; of what is not in `LIVE` it never differs from what the daemon
started with.  Whoever reads a value when it is needed reads it from `current`; who was given one at the start registers
by `follow`: it prepares for the new configuration first, and may refuse; only when nobody does is it taken everywhere.
Must not know what a value is for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio
from pydantic import BaseModel

from vmfs_stub.config import Config, parse_config, place_of, read_config_text
from vmfs_stub.core.errors import ConfigError, Refused

log = logging.getLogger(__name__)

LIVE: Final = frozenset(
    {
        "store.access_key_id",
        "store.secret_access_key",
        "store.retries_max",
        "store.listing_lag_s",
        "replica.access_key_id",
        "replica.secret_access_key",
        "recall.recall_deadline_s",
        "recall.recall_concurrency",
        "recall.recall_bytes_max",
        "recall.recall_queue_max",
        "hydration.*",
        "archive.enabled",
        "archive.dry_run",
        "archive.min_copies",
        "archive.resident_head_bytes",
        "archive.resident_tail_bytes",
        "archive.placeholder_bytes_min",
        "jobs.parallel",
        "jobs.failures_percent_max",
        "jobs.failures_count_min",
        "jobs.windows",
        "jobs.set_aside_bytes_max",
        "jobs.bytes_per_s_max_outside",
        "jobs.shutdown_limit_s",
        "hooks.*",
        "policy.*",
        "retention.*",
        "scrub.*",
        "primary.free_floor_percent",
        "primary.sync_interval_s",
        "control.request_timeout_s",
        "control.start_timeout_s",
        "control.jobs_running_max",
        "control.jobs_kept",
        "libvirt.require_stop_on_error",
        "monitoring.vms_max",
        "monitoring.backup_age_max_hours",
        "monitoring.recall_failure_hours",
        "monitoring.free_percent_min",
    }
)
"""What `reload` can change: ``section.key``, or ``section.*`` for all of a section."""

AT_START: Final = frozenset(
    {
        "datastore.*",
        "store.url",
        "store.threads",
        "store.key_file",
        "store.passphrase_file",
        "replica.url",
        "recall.store_timeout_s",
        "archive.workers",
        "primary.threads",
        "mount.*",
        "control.socket",
        "control.connections_max",
        "monitoring.listen",
        "monitoring.connections_max",
        "libvirt.enabled",
        "libvirt.uri",
        "libvirt.timeout_s",
        "libvirt.save_dir",
        "usage.*",
    }
)
"""What counts as it was when the daemon started.  A test sees that each key is in exactly one of the two."""

Take = Callable[[], None]
"""Takes what was prepared, and never fails."""
Prepare = Callable[[Config], Awaitable[Take]]
"""Makes everything ready for a new configuration, or raises ConfigError, and changes nothing yet."""


class Settings:
    """The configuration of one daemon; ``path`` is the file that it came from, None where it came from none."""

    def __init__(self, config: Config, path: Path | None = None) -> None:
        self.current = config
        self._path = None if path is None else path.absolute()
        self._followers: list[Prepare] = []
        self._turn = trio.Lock()

    def follow(self, prepare: Prepare) -> None:
        """Whenever the configuration is replaced, ``prepare`` for it; what that returns is called when all have."""
        self._followers.append(prepare)

    async def reload(self) -> list[str]:
        """Read the file again and take what it says; returns the keys that have another value now.

        Raises ConfigError, and has changed nothing, when it is invalid, or changes what cannot change now, which is
        named with its line; Refused when there is no file.
        """
        async with self._turn:
            if self._path is None:
                raise Refused("this daemon was not started from a configuration file: there is none to read again")
            text = await trio.to_thread.run_sync(read_config_text, self._path)
            new = parse_config(text, origin=str(self._path))
            changed = changed_keys(self.current, new)
            refuse_fixed(changed, text, origin=str(self._path))
            prepared = [await prepare(new) for prepare in self._followers]
            self.current = new
            for take in prepared:
                take()
            log.info("the configuration was read again; changed: %s", ", ".join(changed) or "nothing")
            return changed


def changed_keys(old: Config, new: Config) -> list[str]:
    """Every ``section.key`` whose value differs, in the order of the sections."""
    found = []
    for section in Config.model_fields:
        before, after = getattr(old, section), getattr(new, section)
        if not isinstance(before, BaseModel):
            found += [section] * (before != after)
            continue
        found += [
            f"{section}.{key}" for key in type(before).model_fields if getattr(before, key) != getattr(after, key)
        ]
    return found


def is_live(key: str) -> bool:
    """Whether ``section.key`` can change while the daemon runs."""
    return key in LIVE or f"{key.partition('.')[0]}.*" in LIVE


def refuse_fixed(changed: list[str], text: str, *, origin: str) -> None:
    """Raise ConfigError with the place of each key that cannot change now."""
    lines = [
        f"{place_of(key.split('.'), text, origin)}: {key}: cannot change while the daemon runs: `vmfs-stub unmount`, "
        "then `mount`; nothing was changed"
        for key in changed
        if not is_live(key)
    ]
    if lines:
        raise ConfigError("\n".join(lines))
