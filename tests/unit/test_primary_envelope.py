"""Envelopes: what is sealed comes back, and nothing else is believed."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.primary.envelope import BODY_SIZE_MAX, Body, Damaged, NewerVersion, seal, unseal

MAGIC = b"TESTING\0"
bodies = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.lists(st.integers())
)


@given(bodies, st.binary(max_size=50))
def test_what_is_sealed_comes_back_whatever_follows(body: dict[str, object], rest: bytes) -> None:
    assert unseal(seal(MAGIC, 3, body) + rest, magic=MAGIC, version=3) == body


def test_every_flipped_bit_and_every_cut_is_damage() -> None:
    raw = seal(MAGIC, 3, {"name": "value", "number": 7})
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            with pytest.raises(Damaged):
                unseal(bytes(changed), magic=MAGIC, version=3)
        with pytest.raises(Damaged):
            unseal(raw[:at], magic=MAGIC, version=3)


@given(st.binary(max_size=200))
def test_noise_is_damage(raw: bytes) -> None:
    with pytest.raises(Damaged):
        unseal(raw, magic=MAGIC, version=3)


def test_another_version_is_told_from_damage() -> None:
    with pytest.raises(NewerVersion, match="4"):
        unseal(seal(MAGIC, 4, {}), magic=MAGIC, version=3)
    with pytest.raises(Damaged):
        unseal(seal(b"ANOTHER\0", 3, {}), magic=MAGIC, version=3)


def test_a_body_that_is_no_object_or_too_large_is_damage() -> None:
    with pytest.raises(Damaged):
        unseal(seal(MAGIC, 3, [1, 2]), magic=MAGIC, version=3)  # type: ignore[arg-type]
    with pytest.raises(Damaged):
        unseal(seal(MAGIC, 3, {"x": "y" * BODY_SIZE_MAX}), magic=MAGIC, version=3)


def test_a_body_that_is_nested_too_deeply_is_damage() -> None:
    text = b"[" * 30_000 + b"]" * 30_000
    head = MAGIC + (1).to_bytes(2, "little") + bytes(2) + len(text).to_bytes(4, "little") + text
    with pytest.raises(Damaged, match="parsed"):
        unseal(head + xxhash.xxh3_128_digest(head), magic=MAGIC, version=1)


def test_each_field_is_taken_once_and_none_is_left() -> None:
    body = Body({"a": 1, "b": None, "c": {"d": True}, "e": "text"})
    assert body.integer("a") == 1
    with pytest.raises(Damaged, match="a is missing"):
        body.integer("a")
    assert body.identifier_or_none("b") is None
    inner = body.body("c")
    assert inner.flag("d") is True
    inner.finish()
    with pytest.raises(Damaged, match="'e' is not a field"):
        body.finish()
    assert body.text("e") == "text"
    body.finish()
