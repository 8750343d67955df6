"""Listings of an S3 server that lag: of what changed a moment ago each key may be listed as it was before.

Only what conditional puts made can be left out, since a name that is put over was there before.
"""

from __future__ import annotations

import random
import re
import threading
import time
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

_ENTRY: Final = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_KEY: Final = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)
_TRUNCATED: Final = b"<IsTruncated>true</IsTruncated>"


class LateListings:
    """What was put and deleted in the last ``lag_s``; learns from requests that the server has done.

    Attributes: ``_made`` and ``_gone`` are times of keys; ``_entries`` is how each key was last listed.
    """

    def __init__(self, lag_s: float) -> None:
        self.lag_s = lag_s
        self._made: dict[bytes, float] = {}
        self._gone: dict[bytes, float] = {}
        self._entries: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def note(self, method: str, path: str, body: bytes, answer: bytes, *, is_new: bool) -> None:
        """The server has done this request; ``is_new``: and made a key that was not there."""
        if not self.lag_s:
            return
        now_s = time.monotonic()
        with self._lock:
            if method == "PUT" and is_new:
                self._made[_key(path)] = now_s
            elif method == "DELETE":
                self._gone.setdefault(_key(path), now_s)
            elif method == "POST":  # many deletes in one
                self._gone = dict.fromkeys(_KEY.findall(body), now_s) | self._gone  # what is gone was so at first
            elif _is_listing(path):
                self._entries.update((_KEY.search(entry)[1], entry) for entry in _ENTRY.findall(answer))  # type: ignore[index]

    def late(self, path: str, answer: bytes) -> bytes | None:
        """The answer to a listing without some of the last changes; None where it has no part in any."""
        if not _is_listing(path) or _TRUNCATED in answer:
            return None
        prefix = parse_qs(urlsplit(path).query).get("prefix", [""])[0].encode()
        since_s = time.monotonic() - self.lag_s
        with self._lock:
            made = {key for key, at_s in self._made.items() if at_s > since_s and random.random() < 0.5}
            gone = {key for key, at_s in self._gone.items() if at_s > since_s and random.random() < 0.5} - made
            back = [entry for key, entry in self._entries.items() if key in gone and key.startswith(prefix)]
        kept = _ENTRY.sub(lambda found: b"" if _KEY.search(found[0])[1] in made else found[0], answer)  # type: ignore[index]
        late = kept.replace(b"</ListBucketResult>", b"".join(back) + b"</ListBucketResult>")
        return late if late != answer else None


def _is_listing(path: str) -> bool:
    return "list-type=2" in urlsplit(path).query


def _key(path: str) -> bytes:
    """The key of a request in the path style."""
    return unquote(urlsplit(path).path).partition("/")[2].partition("/")[2].encode()
