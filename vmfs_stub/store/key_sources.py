"""What an operator has to open an encrypted store with: a key file or a passphrase, each in a file of its own.

Invariants: a file that others may read is refused, since it protects nothing; no error, log or repr shows what a file
holds.  This module must not know stores.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from vmfs_stub.core.errors import AlreadyExists, ConfigError
from vmfs_stub.directory_sync import sync_directory

KEY_FILE_BYTES: Final = 32
PASSPHRASE_BYTES_MAX: Final = 1024
_FILE_BYTES_MAX: Final = 4096


class KeyKind(Enum):
    """What opens a wrapped store key."""

    KEY_FILE = "key-file"
    PASSPHRASE = "passphrase"


@dataclass(frozen=True, slots=True)
class KeySource:
    """A secret that wraps store keys; ``origin`` names its file in messages."""

    kind: KeyKind
    origin: str
    secret: bytes = field(repr=False)


class KeySettings(Protocol):
    """What of a configuration says where the key of the store is; at most one of the two."""

    @property
    def key_file(self) -> Path | None: ...
    @property
    def passphrase_file(self) -> Path | None: ...


def source_of(settings: KeySettings) -> KeySource | None:
    """What is configured.  Raises: ConfigError."""
    return read_source(key_file=settings.key_file, passphrase_file=settings.passphrase_file)


def read_source(*, key_file: Path | None, passphrase_file: Path | None) -> KeySource | None:
    """What the file holds; None when neither is named.

    Raises: ConfigError when both are named, or the file is missing, readable by others, or not what it should be.
    """
    if key_file is not None and passphrase_file is not None:
        raise ConfigError("a key file and a passphrase file were given; one of them opens the store: leave one out")
    if key_file is not None:
        return _key_file(key_file)
    return None if passphrase_file is None else _passphrase_file(passphrase_file)


def new_key_file(path: Path) -> KeySource:
    """Make a key file of mode 0600, durably.  Raises: AlreadyExists, ConfigError."""
    secret = secrets.token_bytes(KEY_FILE_BYTES)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(base64.b64encode(secret) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.absolute().parent)
    except FileExistsError as exc:
        raise AlreadyExists(f"{path} exists already; it was not changed") from exc
    except FileNotFoundError as exc:
        raise ConfigError(f"cannot make the key file {path}: its directory does not exist; make it first") from exc
    except OSError as exc:
        raise ConfigError(f"cannot write the key file {path}: {exc.strerror}") from exc
    return KeySource(KeyKind.KEY_FILE, f"key file {path}", secret)


def _key_file(path: Path) -> KeySource:
    what = f"key file {path}"
    try:
        secret = base64.b64decode(_private_bytes(path, what).strip(), validate=True)
    except binascii.Error:
        secret = b""
    if len(secret) != KEY_FILE_BYTES:  # the cause would show a part of it
        raise ConfigError(f"{what}: is not one: it holds {KEY_FILE_BYTES} bytes in base64; is it a passphrase's file?")
    return KeySource(KeyKind.KEY_FILE, what, secret)


def _passphrase_file(path: Path) -> KeySource:
    what = f"passphrase file {path}"
    secret = _private_bytes(path, what).rstrip(b"\r\n")
    if not 0 < len(secret) <= PASSPHRASE_BYTES_MAX:
        raise ConfigError(f"{what}: is empty, or longer than {PASSPHRASE_BYTES_MAX} bytes")
    return KeySource(KeyKind.PASSPHRASE, what, secret)


def _private_bytes(path: Path, what: str) -> bytes:
    """All of a small file that nobody but its owner can read, who is root or the user of this process."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise ConfigError(f"{what}: is not a file")
            if st.st_mode & 0o077 or st.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{what}: others may read or change it; chown it to root and chmod 600 {path}")
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"{what}: cannot be read: {exc.strerror}") from exc
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{what}: is larger than {_FILE_BYTES_MAX} bytes")
    return data
