"""The peers of the bench make restore points and write them out; and what the bench changes is what it says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts.lab.content import BLOCK, CHUNK, change_extents, salted_copies
from scripts.lab.datastore import allocated_bytes
from scripts.lab.peers import PEERS, Peer, Repository


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_restores_its_last_point(tmp_path: Path, peer: Peer) -> None:
    source, target = tmp_path / "disk.img", tmp_path / "restored"
    source.write_bytes(random.Random(1).randbytes(1 << 20) + bytes(1 << 20))
    target.mkdir()
    repository = Repository(peer, tmp_path / "peer")
    repository.warm()
    repository.back_up(source)
    first_bytes = allocated_bytes(tmp_path / "peer")
    with source.open("r+b") as file:
        file.write(b"changed")
    repository.back_up(source)
    assert 1 << 20 < first_bytes <= allocated_bytes(tmp_path / "peer")
    repository.restore(target)
    (found,) = (path for path in target.rglob("*") if path.is_file())
    assert found.read_bytes() == source.read_bytes()


def test_no_chunk_of_salted_copies_is_there_twice(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(3 * CHUNK + 100))
    starts = []
    for salt in (0, 1):
        salted_copies(source, tmp_path / "target", copies=2, salt=salt)
        content = (tmp_path / "target").read_bytes()
        for first in (0, source.stat().st_size):
            starts += [content[first + at : first + at + 8] for at in range(0, source.stat().st_size, CHUNK)]
    assert len(set(starts)) == len(starts) == 16


def test_as_much_is_changed_as_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 << 20))
    said = change_extents(disk, random.Random(1), share=0.1, extent_bytes=64 << 10)
    content = disk.read_bytes()
    blocks = [any(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
    assert said == blocks.count(True) * BLOCK == 13 * (64 << 10)
