"""From a store's URL to its objects: ``file:///path``, ``s3://bucket/prefix`` and ``memory://name``."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from obstore.store import MemoryStore

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.store.late import LateObjects
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy
from vmfs_stub.store.s3 import STANDARD_CHAIN, S3Credentials, open_s3

_memory: dict[str, RemoteObjects] = {}
_memory_lock = threading.Lock()


class ReplicaSettings(Protocol):
    """What of a configuration says where a replica is."""

    @property
    def url(self) -> str: ...
    @property
    def access_key_id(self) -> str: ...
    @property
    def secret_access_key(self) -> str: ...


class StoreSettings(ReplicaSettings, Protocol):
    """What of a configuration says where a store is and how to ask it."""

    @property
    def retries_max(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StoreAt:
    """Where a store is, and how it is asked: times in seconds, of a short call, retries included, and of a transfer."""

    url: str
    retries_max: int = 3
    credentials: S3Credentials = STANDARD_CHAIN
    timeout_s: float = 10
    transfer_timeout_s: float = 60

    @property
    def is_far(self) -> bool:
        """Whether it is asked across a network by this program itself, so that an answer takes long."""
        return urlsplit(self.url).scheme == "s3"

    def replica(self, settings: ReplicaSettings) -> StoreAt | None:
        """The replica that is configured, asked like this store; None where there is none."""
        if not settings.url:
            return None
        credentials = S3Credentials(settings.access_key_id, settings.secret_access_key)
        return replace(self, url=settings.url, credentials=credentials)

    @classmethod
    def of(cls, settings: StoreSettings) -> StoreAt:
        """The one that is configured."""
        credentials = S3Credentials(settings.access_key_id, settings.secret_access_key)
        return cls(settings.url, settings.retries_max, credentials)


def open_objects(at: StoreAt, *, create: bool = False) -> ObjectStore:
    """The object store there, with retries around it; opened when it is first used.

    ``file:///path`` (or a plain absolute path) is a directory, made when absent if ``create``; without ``create`` it
    must hold a store, so that the empty place of a mount that is missing is not taken for one.  ``memory://name``
    lives as long as this process.  Raises: ConfigError for another URL.
    """
    policy, url = RetryPolicy(attempts_max=1 + at.retries_max), at.url
    path = _local_path(url)
    if path is not None:
        return RetryingObjects(LateObjects(lambda: LocalObjects(path, create=create)), policy)
    parts = urlsplit(url)
    if parts.scheme == "memory" and parts.netloc:
        with _memory_lock:
            if url not in _memory:
                _memory[url] = RemoteObjects(MemoryStore(), name=url)
            return RetryingObjects(_memory[url], policy)
    if parts.scheme == "s3":
        # A request that nobody answers leaves time for another one.
        request_s = at.timeout_s / 2
        remote = open_s3(url, at.credentials, timeout_s=request_s, transfer_timeout_s=at.transfer_timeout_s)
        return RetryingObjects(remote, policy)
    msg = f"{url!r}: not a store URL; use file:///absolute/path or s3://bucket/prefix"
    raise ConfigError(msg)


def _local_path(url: str) -> Path | None:
    if url.startswith("/"):
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return Path(unquote(parts.path))
    return None
