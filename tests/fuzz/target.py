"""What a fuzz target is: one format that the program reads, and what must hold whatever the bytes are."""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar

Edit = Callable[[bytes], bytes]


class Violation(Exception):
    """A rule was broken that no exception of the program tells: a wrong type, a path that leads out, lost bytes.

    ``rule`` is the same for every input that breaks it.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Bound:
    """What one call may cost: memory at most ``base_bytes`` and ``per_byte`` for each byte of the input, and CPU."""

    base_bytes: int = 1 << 20
    per_byte: int = 64
    cpu_s: float = 1.0


class Target(ABC):
    """One format.  ``call`` gets the bytes and returns what they mean, raises what is ``permitted``, or has a bug.

    Attributes: ``is_checked``: every damage must be found, unless the checksum is made right again; ``is_mixable``:
    valid parts of several inputs make a valid one, so that damage is never made of pieces of another.  Each target has
    the directory ``place`` for itself.
    """

    name: ClassVar[str]
    permitted: ClassVar[tuple[type[Exception], ...]]
    tokens: ClassVar[tuple[bytes, ...]] = ()
    bound: ClassVar[Bound] = Bound()
    is_checked: ClassVar[bool] = False
    is_mixable: ClassVar[bool] = False

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Valid inputs, made by the product's own encoders."""

    @abstractmethod
    def call(self, data: bytes) -> object:
        """Read ``data`` as the program would; raises Violation when a rule is broken."""

    def reseal(self, data: bytes) -> bytes:
        """``data`` with its checksums, and the lengths they depend on, made right."""
        return data

    def edit_json(self, data: bytes, edit: Edit) -> bytes | None:
        """``data`` with its JSON text edited; None when it has none."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what was opened; ``place`` is removed by the caller."""


def require(condition: bool, rule: str, detail: str = "") -> None:
    """Raise Violation unless ``condition``."""
    if not condition:
        raise Violation(rule, detail)


def check_types(value: Any, where: str = "") -> None:
    """Every field of a dataclass, at any depth, has the type that it is declared with.  Raises Violation."""
    for name, kind in _hints(type(value)).items():
        _check_type(getattr(value, name), kind, f"{where}.{name}")


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def _check_type(value: object, kind: Any, where: str) -> None:
    if isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return
        kind = next(one for one in arguments if one is not type(None))
        _check_type(value, kind, where)
    elif origin is tuple:
        require(isinstance(value, tuple), f"the type of {where}", f"{value!r:.80}")
        for item in typing.cast("tuple[object, ...]", value):
            _check_type(item, arguments[0], where)
    elif origin is not None:
        kind = Mapping if issubclass(origin, Mapping) else origin
        require(isinstance(value, kind), f"the type of {where}", f"{value!r:.80}")
    else:
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        require(right, f"the type of {where}", f"no {kind.__name__} but {value!r:.80}")
        if dataclasses.is_dataclass(value):
            check_types(value, where)
