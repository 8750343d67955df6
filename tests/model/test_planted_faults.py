"""The model finds what it is there to find: each fault that the design rules out is planted, and must be noticed."""

from __future__ import annotations

import pytest

from tests.model.planted import PLANTED, Plant
from tests.model.play import STEPS, play

SEEDS = range(600)
"""A fault that none of these finds is one that the model does not see."""


def found_by_a_seed(favoured: str) -> bool:
    for seed in SEEDS:
        try:
            play(seed, step_count=60, favoured={favoured})
        except BaseExceptionGroup as group:
            if group.subgroup(AssertionError) is None:
                raise
            return True
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize(("plant", "step"), [pytest.param(*case, id=case[0].__name__) for case in PLANTED])
def test_a_planted_fault_is_found(plant: Plant, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step in {"", *(act.__name__ for _, act in STEPS)}
    plant(monkeypatch)
    assert found_by_a_seed(step)
