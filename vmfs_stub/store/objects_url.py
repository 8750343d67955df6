"""From a store's URL to its objects: ``file:///path`` and ``memory://name``."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import MemoryStore

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.store.late import LateObjects
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.retrying import RetryingObjects, RetryPolicy

_memory: dict[str, RemoteObjects] = {}
_memory_lock = threading.Lock()


def open_objects(url: str, *, create: bool = False, retries_max: int = 3) -> ObjectStore:
    """The object store at ``url``, with retries around it; opened when it is first used.

    ``file:///path`` (or a plain absolute path) is a directory, made when absent if ``create``; without ``create`` it
    must hold a store, so that the empty place of a mount that is missing is not taken for one.  ``memory://name``
    lives as long as this process.  Raises: ConfigError for another URL.
    """
    policy = RetryPolicy(attempts_max=1 + retries_max)
    path = _local_path(url)
    if path is not None:
        return RetryingObjects(LateObjects(lambda: LocalObjects(path, create=create)), policy)
    parts = urlsplit(url)
    if parts.scheme == "memory" and parts.netloc:
        with _memory_lock:
            if url not in _memory:
                _memory[url] = RemoteObjects(MemoryStore(), name=url)
            return RetryingObjects(_memory[url], policy)
    msg = f"{url!r}: not a store URL; use file:///absolute/path"
    raise ConfigError(msg)


def _local_path(url: str) -> Path | None:
    if url.startswith("/"):
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return Path(unquote(parts.path))
    return None
