"""From a store's URL to its objects: ``file:///path`` and ``memory://name``."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import MemoryStore

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.store.local import LocalObjects
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.retrying import RetryingObjects

_memory: dict[str, RemoteObjects] = {}
_memory_lock = threading.Lock()


def open_objects(url: str) -> ObjectStore:
    """Open the object store at ``url``, with retries around it.

    ``file:///path`` (or a plain absolute path) is a directory, made when absent; ``memory://name`` lives as long as
    this process.  Raises: ConfigError for another URL; StoreUnavailable, StoreDenied.
    """
    if url.startswith("/"):
        return RetryingObjects(LocalObjects(Path(url)))
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return RetryingObjects(LocalObjects(Path(unquote(parts.path))))
    if parts.scheme == "memory" and parts.netloc:
        with _memory_lock:
            if url not in _memory:
                _memory[url] = RemoteObjects(MemoryStore(), name=url)
            return RetryingObjects(_memory[url])
    msg = f"{url!r}: not a store URL; use file:///absolute/path"
    raise ConfigError(msg)
