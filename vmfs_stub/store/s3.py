"""S3 and its like: from ``s3://bucket/prefix`` and credentials to an obstore transport.

The URL says where, and holds no secret: ``?endpoint=`` (default: AWS of that region), ``region=``, ``path_style=``
(default: true with an endpoint).  Who asks comes from the configuration, else from the standard chain: environment,
the shared credentials file, the machine's own role.  This module must not know what objects mean.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import S3Store

from vmfs_stub.core.errors import ConfigError
from vmfs_stub.store.keys import check_prefix
from vmfs_stub.store.remote import RemoteObjects

if TYPE_CHECKING:
    from obstore.store import S3Config

_OPTIONS: Final = ("endpoint", "region", "path_style")
_CONNECT_TIMEOUT_S: Final = 5


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """Who asks; empty for the standard chain.  Nothing of it but the id is ever shown."""

    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)


STANDARD_CHAIN: Final = S3Credentials()


def open_s3(url: str, credentials: S3Credentials, *, timeout_s: float, transfer_timeout_s: float) -> RemoteObjects:
    """The objects at an ``s3://`` URL; opens no connection.  Time-outs are of one request, and of one that moves much.

    Raises: ConfigError.
    """
    parts = urlsplit(url)
    options = _options(url, parts.query)
    prefix = unquote(parts.path).strip("/")
    if not parts.netloc or "@" in parts.netloc or ":" in parts.netloc:
        raise ConfigError(f"{_shown(url)!r}: not an S3 URL; write s3://bucket/prefix, credentials belong elsewhere")
    if prefix:
        check_prefix(f"{prefix}/")
    endpoint = options.get("endpoint", "")
    settings: S3Config = {
        "virtual_hosted_style_request": options.get("path_style", "true" if endpoint else "false") == "false",
        "region": options.get("region")
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or "us-east-1",
        "disable_tagging": True,
    }
    if endpoint:
        settings["endpoint"] = endpoint.rstrip("/")
    settings |= _known(credentials)
    try:
        quick, patient = (
            S3Store(
                parts.netloc,
                prefix=prefix or None,
                config=settings,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "timeout": f"{limit_s:g}s",
                    "connect_timeout": f"{min(_CONNECT_TIMEOUT_S, limit_s):g}s",
                },
                retry_config={"max_retries": 0},  # that is RetryingObjects' business
            )
            for limit_s in (timeout_s, transfer_timeout_s)
        )
    except BaseError as exc:  # of what is in the environment
        said = str(exc).splitlines()[0]
        raise ConfigError(f"{_shown(url)!r}: cannot be asked: {said}; look at the variables AWS_… and the URL") from exc
    return RemoteObjects(quick, name=_shown(url), patient=patient)


def _options(url: str, query: str) -> Mapping[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(found) - set(_OPTIONS)):
        raise ConfigError(
            f"{_shown(url)!r}: {', '.join(unknown)} is not an option of an S3 URL; there are {', '.join(_OPTIONS)}"
        )
    if found.get("path_style", "true") not in ("true", "false"):
        raise ConfigError(f"{_shown(url)!r}: path_style is true or false")
    if "endpoint" in found and not found["endpoint"].startswith(("http://", "https://")):
        raise ConfigError(f"{_shown(url)!r}: endpoint begins with https:// (or http://, unprotected)")
    return found


def _shown(url: str) -> str:
    """The URL without anything that might be a secret in the wrong place."""
    return f"s3://{url.partition('?')[0].removeprefix('s3://').rpartition('@')[2]}"


def _known(credentials: S3Credentials) -> S3Config:
    """What is known of who asks; obstore looks at the environment and the machine's role by itself."""
    if not credentials.access_key_id and "AWS_ACCESS_KEY_ID" not in os.environ:
        credentials = _from_shared_file()
    known: S3Config = {}
    if credentials.access_key_id:
        known["access_key_id"] = credentials.access_key_id
        known["secret_access_key"] = credentials.secret_access_key
    if credentials.session_token:
        known["session_token"] = credentials.session_token
    return known


def _from_shared_file() -> S3Credentials:
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path("~/.aws/credentials").expanduser())
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
        section = parser[os.environ.get("AWS_PROFILE", "default")]
    except (KeyError, OSError, RuntimeError, configparser.Error, UnicodeDecodeError):
        return S3Credentials()
    values = [section.get(f"aws_{name}", "") for name in ("access_key_id", "secret_access_key", "session_token")]
    return S3Credentials(*values)
