"""Extent sets against sets of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vmfs_stub.core.extents import Extent, ExtentSet

POINTS = 24
extents = st.builds(Extent, st.integers(0, POINTS), st.integers(0, POINTS))
"""Some are empty, some turned round; both stand for no points."""
lists = st.lists(extents, max_size=8)


def points(found: ExtentSet) -> set[int]:
    return {point for extent in found for point in range(extent.start, extent.end)}


def expected(given_extents: list[Extent]) -> set[int]:
    return {point for extent in given_extents for point in range(extent.start, extent.end)}


def assert_normal(found: ExtentSet) -> None:
    parts = list(found)
    assert all(part.start < part.end for part in parts)
    assert all(before.end < after.start for before, after in itertools.pairwise(parts))


@given(lists)
def test_a_set_holds_the_points_of_its_extents(a: list[Extent]) -> None:
    found = ExtentSet(a)
    assert_normal(found)
    assert points(found) == expected(a)
    assert found.length == len(expected(a))
    assert bool(found) == bool(expected(a))


@given(lists, lists)
def test_algebra_is_that_of_sets(a: list[Extent], b: list[Extent]) -> None:
    one, other = ExtentSet(a), ExtentSet(b)
    for found, wanted in (
        (one.union(other), expected(a) | expected(b)),
        (one.intersection(other), expected(a) & expected(b)),
        (one.difference(other), expected(a) - expected(b)),
    ):
        assert_normal(found)
        assert points(found) == wanted


@given(lists, lists)
def test_equality_is_equality_of_points(a: list[Extent], b: list[Extent]) -> None:
    one, other = ExtentSet(a), ExtentSet(b)
    assert (one == other) == (expected(a) == expected(b))
    if one == other:
        assert hash(one) == hash(other)
    assert one != object()


def test_touching_extents_become_one() -> None:
    assert list(ExtentSet([Extent(2, 4), Extent(0, 2)])) == [Extent(0, 4)]
    assert Extent(3, 7).length == 4
    assert repr(ExtentSet([Extent(0, 1)])) == "ExtentSet([Extent(start=0, end=1)])"
