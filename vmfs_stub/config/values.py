"""What the sections of a configuration are made of: sizes, times and paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SIZE_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,19}) *([A-Za-z]*)")
BYTES_MAX = 2**63 - 1
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TIME = re.compile(r"([0-9]{1,9}) *([smhdw])")
DURATION_S_MAX = 100 * 365 * 86400.0


def parse_bytes(value: object) -> object:
    """Number of bytes of ``"8 MiB"``; whatever is not a string is returned as it is, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise ValueError('not a size: write bytes, or a whole number with KiB, MiB, GiB or TiB, as in "8 MiB"')
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def parse_duration(value: object) -> object:
    """Seconds of ``"14d"``; whatever is not a string is returned as it is, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise ValueError('not a length of time: write seconds, or a whole number with s, m, h, d or w, as in "14d"')
    return float(int(match[1]) * _TIME_UNITS[match[2]])


def absolute(value: Path) -> Path:
    """The path without ``.`` and ``..``; raises ValueError for what is not absolute, or no path at all."""
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    if "\0" in str(value):
        raise ValueError("must not hold the character NUL")
    return Path(os.path.normpath(value))


ByteCount = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=BYTES_MAX)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, le=DURATION_S_MAX)]
AbsolutePath = Annotated[Path, AfterValidator(absolute)]


class Section(BaseModel):
    """A table of the file; frozen, and without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
