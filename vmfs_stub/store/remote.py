"""Object stores that obstore reaches: memory, S3 and its like.

Invariants: every obstore exception is translated here; a read that returns fewer bytes than asked is an error.
A put is as durable as the service promises when it answers.  This module must not know what the objects mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import obstore
from obstore import exceptions

from vmfs_stub.core.errors import ObjectExists, ObjectMissing, StoreDenied, StoreUnavailable
from vmfs_stub.store.keys import check_key, check_prefix
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, Buffer, ObjectInfo, oversized, truncated

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Transport

LIST_PAGE = 1000
QUICK_BYTES_MAX = 1 << 20
_ROLE_REQUEST = "/latest/api/token"
"""What obstore asks of the machine's metadata service when it was given no credentials."""


class RemoteObjects:
    """Object store over one obstore transport; ``name`` is its URL, for messages.

    ``patient`` is the same with a longer time limit, for what may be large.
    """

    def __init__(self, transport: Transport, *, name: str, patient: Transport | None = None) -> None:
        self.name = name
        self._transport = transport
        self._patient = patient or transport

    def get(self, key: str, *, size_max: int = OBJECT_SIZE_MAX) -> bytes:
        """Read a whole object; see ObjectStore."""
        check_key(key)
        with self._translated(key, "read"):
            answer = obstore.get(self._patient, key)
            size = answer.meta["size"]
            if size > size_max:
                raise oversized(key, size=size, size_max=size_max)
            data = bytes(answer.bytes())
        if len(data) != size:
            raise truncated(key, offset=0, length=size)
        return data

    def get_range(self, key: str, *, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes; see ObjectStore."""
        check_key(key)
        if offset < 0 or length < 0:
            raise truncated(key, offset=offset, length=length)
        if not length:
            if self.size(key) < offset:
                raise truncated(key, offset=offset, length=length)
            return b""
        try:
            with self._translated(key, "read"):
                data = bytes(obstore.get_range(self._transport, key, start=offset, length=length))
        except StoreUnavailable:
            # A range beyond the end has no exception of its own; only the size tells it from a failure.
            if self.size(key) < offset + length:
                raise truncated(key, offset=offset, length=length) from None
            raise
        if len(data) != length:
            raise truncated(key, offset=offset, length=length)
        return data

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        """Store an object; see ObjectStore."""
        check_key(key)
        mode: Literal["create", "overwrite"] = "create" if if_absent else "overwrite"
        transport = self._transport if len(data) <= QUICK_BYTES_MAX else self._patient
        try:
            with self._translated(key, "write"):
                # One request: a multipart upload cannot be conditional everywhere, and our objects are small.
                obstore.put(transport, key, bytes(data), mode=mode, use_multipart=False)
        except ObjectMissing as exc:
            raise StoreUnavailable(f"{self.name}: there is no such bucket; make it, or correct the URL") from exc

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder; see ObjectStore."""
        check_prefix(prefix)
        with self._translated(prefix or self.name, "list"):
            for page in obstore.list(self._transport, prefix or None, chunk_size=LIST_PAGE):
                for meta in page:
                    yield ObjectInfo(meta["path"], meta["size"])

    def delete(self, key: str) -> None:
        """Remove an object; see ObjectStore."""
        check_key(key)
        with contextlib.suppress(ObjectMissing), self._translated(key, "delete"):
            obstore.delete(self._transport, key)

    def size(self, key: str) -> int:
        """Size in bytes; see ObjectStore."""
        check_key(key)
        with self._translated(key, "look up"):
            return obstore.head(self._transport, key)["size"]

    @contextlib.contextmanager
    def _translated(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError) as exc:
            msg = f"{key}: is not in the store {self.name}"
            raise ObjectMissing(msg) from exc
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as exc:
            msg = f"{key}: exists already in {self.name}"
            raise ObjectExists(msg) from exc
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as exc:
            msg = f"{key}: cannot {verb}: {self.name} refuses it; check the store's credentials"
            raise StoreDenied(msg) from exc
        except (exceptions.BaseError, OSError, ValueError) as exc:
            said = str(exc).splitlines()[0]
            if _ROLE_REQUEST in said:
                msg = f"{key}: cannot {verb}: there are no credentials for {self.name}: set access_key_id and "
                msg += (
                    f"secret_access_key in the configuration, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({said})"
                )
            else:
                msg = f"{key}: cannot {verb}: {self.name} does not answer as it should ({said})"
            raise StoreUnavailable(msg) from exc
