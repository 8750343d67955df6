"""Random lives of a datastore: what guests, operators and fate do to it, against bytes in memory.

Which seeds, and how long each plays, can be chosen for a longer run: VMFS_STUB_MODEL_SEEDS=1000:3000 and
VMFS_STUB_MODEL_STEPS=200; `scripts/soak model` plays many on all cores.  A failure names its seed.
"""

from __future__ import annotations

import os

import pytest

from tests.model.play import play

FIRST, END = (int(number) for number in os.environ.get("VMFS_STUB_MODEL_SEEDS", "0:120").split(":"))
STEPS = int(os.environ.get("VMFS_STUB_MODEL_STEPS", "40"))


@pytest.mark.parametrize("seed", range(FIRST, END))
def test_a_datastore_holds_what_was_written_to_it(seed: int) -> None:
    play(seed, step_count=STEPS)
