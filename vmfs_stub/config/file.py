"""The file of a configuration: which one it is, how it is read, and where in it something is wrong."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vmfs_stub.config.config import Config
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.names import printable
from vmfs_stub.core.toml_places import Place, TomlPlaces

DEFAULT_CONFIG_PATH = Path("/etc/vmfs-stub/config.toml")
CONFIG_ENVIRONMENT = "VMFS_STUB_CONFIG"

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
