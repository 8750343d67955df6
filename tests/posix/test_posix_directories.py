"""A very large directory that changes while it is read: what stays is listed exactly once."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from places import Places

STAYING = 100_000
CHANGES_MIN = 200


@contextmanager
def changing(directory: Path) -> Iterator[list[int]]:
    """Within the block a thread makes, renames and removes names; gives a list whose only item counts what it did."""
    done, ended, rng = [0], threading.Event(), random.Random(5)
    failures: list[BaseException] = []

    def change() -> None:
        try:
            number = 0
            while not ended.is_set():
                made = [directory / f"passing{number + each}" for each in range(20)]
                for path in made:
                    path.touch()
                for path in rng.sample(made, 10):
                    path.rename(path.with_name(f"{path.name}-moved"))
                for path in made:
                    path.unlink(missing_ok=True)
                    path.with_name(f"{path.name}-moved").unlink(missing_ok=True)
                number += 20
                done[0] += 50
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()
    assert failures == []


def assert_listed_once(names: Counter[str]) -> None:
    staying = {name: count for name, count in names.items() if name.startswith("staying")}
    assert len(staying) == STAYING
    assert set(staying.values()) == {1}
    assert max(names.values()) == 1
    assert all(name.startswith(("staying", "passing")) for name in names)


def test_a_hundred_thousand_entries_while_they_change(places: Places) -> None:
    # Made where the mount has not looked yet: by the mount it would take a minute.
    directory = places.datastore.backing_of(places.mounted) / "large"
    directory.mkdir()
    at = os.open(directory, os.O_RDONLY)
    for number in range(STAYING):
        os.mknod(f"staying{number}", dir_fd=at)
    os.close(at)
    mounted = places.mounted / "large"
    fd = os.open(mounted, os.O_RDONLY)
    with changing(mounted) as changes:
        at_first = changes[0]
        while changes[0] < at_first + CHANGES_MIN:
            assert_listed_once(Counter(os.listdir(fd)))  # noqa: PTH208 - of a descriptor
    # From the start again by the same descriptor, when nothing changes any more: what passed is gone.
    assert Counter(os.listdir(fd)).total() == STAYING  # noqa: PTH208
    os.close(fd)
    places.assert_no_bugs()
    shutil.rmtree(directory)
