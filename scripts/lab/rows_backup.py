"""Rows of backups against public backup tools, on the same data and the same disk.

Each sample begins with cold data and a warm program and ends with everything durable; both sides are whole commands,
ours a command to a daemon that runs.  The image is several GiB of a real guest's files, in which nothing is twice.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from scripts.lab.content import change_extents, salted_copies
from scripts.lab.datastore import Datastore, copy_sparse, drop_caches, seconds, working_directory
from scripts.lab.failure import LabError, run
from scripts.lab.peers import PEERS, Peer, Repository
from scripts.lab.ratios import Target
from scripts.lab.row import Laboratory, Measures, Row
from vmfs_stub.config import load_config
from vmfs_stub.control.client import ControlClient

IMAGE_BYTES: Final = 4 << 30
_VM: Final = "vm"
_CHANGED_SHARE: Final = 0.01
_CHANGED_EXTENT: Final = 1 << 20
_CLONES: Final = 10
_CLONE_SHARE: Final = 0.02
_CLONE_EXTENT: Final = 256 << 10
_JOB_TIMEOUT_S: Final = 900.0
_PAIRS: Final = 3


@contextmanager
def _image(laboratory: Laboratory) -> Iterator[Path]:
    """The image that all rows begin with."""
    source, image = laboratory.guest.qcow2, laboratory.home / "backed-up.img"
    laboratory.say("making an image of several GiB")
    salted_copies(source, image, copies=max(1, IMAGE_BYTES // source.stat().st_size), salt=0)
    yield image


def _put_vm(datastore: Datastore, image: Path, name: str = _VM) -> Path:
    """A VM with this image for a disk, on primary; the disk's path through the mount."""
    disk = datastore.backing / name / "disk.img"
    disk.parent.mkdir()
    copy_sparse(image, disk)
    return datastore.mountpoint / name / "disk.img"


def _timed(warm: Callable[[], object], work: Callable[[], object]) -> float:
    drop_caches()
    warm()
    return seconds(work)


def _ours(datastore: Datastore, *words: str) -> float:
    return _timed(partial(datastore.vmfs, "status"), partial(datastore.vmfs, *words))


def _repository(home: Path, peer: Peer) -> Repository:
    return Repository(peer, home / peer.name)


@contextmanager
def _first(laboratory: Laboratory, peer: Peer) -> Iterator[Measures]:
    image = laboratory.shared(_image)

    def ours() -> float:
        with laboratory.datastore() as datastore:
            _put_vm(datastore, image)
            datastore.mount()
            return _ours(datastore, "backup", _VM)

    def baseline() -> float:
        with working_directory(laboratory.home) as home:
            repository = _repository(home, peer)
            return _timed(repository.warm, partial(repository.back_up, image))

    yield Measures(ours, baseline)


@contextmanager
def _restored(laboratory: Laboratory, peer: Peer) -> Iterator[Measures]:
    image = laboratory.shared(_image)
    with laboratory.datastore() as datastore, working_directory(laboratory.home) as home:
        _put_vm(datastore, image)
        datastore.mount()
        datastore.vmfs("backup", _VM)
        repository = _repository(home, peer)
        repository.back_up(image)
        target = home / "restored"

        def measured(restore: Callable[[], float]) -> float:
            target.mkdir()
            took_s = restore()
            (found,) = (path for path in target.rglob("*") if path.is_file())
            run(["cmp", image, found], deadline_s=_JOB_TIMEOUT_S)
            shutil.rmtree(target)
            return took_s

        yield Measures(
            lambda: measured(lambda: _ours(datastore, "restore", _VM, "--to", str(target))),
            lambda: measured(lambda: _timed(repository.warm, partial(repository.restore, target))),
        )


@contextmanager
def _second(laboratory: Laboratory, peer: Peer) -> Iterator[Measures]:
    image, chance = laboratory.shared(_image), random.Random(1)
    with laboratory.datastore() as datastore, working_directory(laboratory.home) as home:
        disk, copy = _put_vm(datastore, image), home / "disk.img"
        copy_sparse(image, copy)
        datastore.mount()
        datastore.vmfs("backup", _VM)
        repository = _repository(home, peer)
        repository.back_up(copy)

        def changed(path: Path) -> None:
            change_extents(path, chance, share=_CHANGED_SHARE, extent_bytes=_CHANGED_EXTENT)

        def ours() -> float:
            changed(disk)
            return _ours(datastore, "backup", _VM)

        def baseline() -> float:
            changed(copy)
            return _timed(repository.warm, partial(repository.back_up, copy))

        yield Measures(ours, baseline)


def _read_by_backup(datastore: Datastore) -> int:
    """What the report of a backup says that it read of primary."""
    client = ControlClient(load_config(datastore.config).socket_path, timeout_s=_JOB_TIMEOUT_S)
    info = client.wait_job(client.start_backup([_VM], archive=False), lambda _: None)
    if info.error is not None or info.result is None:
        raise LabError(f"the backup failed: {info.error}")
    (report,) = info.result["vms"]
    return int(report["read_bytes"])


@contextmanager
def _reads(laboratory: Laboratory) -> Iterator[Measures]:
    image, chance = laboratory.shared(_image), random.Random(2)
    with laboratory.datastore() as datastore:
        disk = _put_vm(datastore, image)
        datastore.mount()
        datastore.vmfs("backup", _VM)
        changed: list[int] = []

        def ours() -> float:
            changed.append(change_extents(disk, chance, share=_CHANGED_SHARE, extent_bytes=_CHANGED_EXTENT))
            return float(_read_by_backup(datastore))

        yield Measures(ours, lambda: float(changed[-1]))


@contextmanager
def _clones(laboratory: Laboratory) -> Iterator[Measures]:
    image = laboratory.guest.qcow2
    plain: list[float] = []

    def ours() -> float:
        """What all occupy; beside it is noted what one does, and the noise that is in no other."""
        chance, changed = random.Random(3), 0
        with laboratory.datastore() as datastore:
            names = [f"vm{number}" for number in range(_CLONES + 1)]
            for number, name in enumerate(names):
                disk = datastore.backing_of(_put_vm(datastore, image, name))
                if number:
                    changed += change_extents(disk, chance, share=_CLONE_SHARE, extent_bytes=_CLONE_EXTENT)
            datastore.mount()
            datastore.vmfs("backup", names[0])
            plain.append(float(datastore.store_bytes() + changed))
            datastore.vmfs("backup", *names[1:])
            return float(datastore.store_bytes())

    yield Measures(ours, lambda: plain[-1])


def _against(peer: Peer) -> tuple[Row, ...]:
    """The rows against one peer."""
    size = f"{IMAGE_BYTES >> 30} GiB"
    return (
        Row(
            f"first-{peer.name}",
            f"the first backup of a VM's image of {size}, into a directory",
            f"the same by {peer.settings}",
            "s",
            Target("at most", 1 / 1.5),
            _PAIRS,
            partial(_first, peer=peer),
        ),
        Row(
            f"restore-{peer.name}",
            f"restoring an image of {size}",
            f"the same by {peer.settings}",
            "s",
            Target("at most", 1),
            _PAIRS,
            partial(_restored, peer=peer),
        ),
        Row(
            f"second-{peer.name}",
            f"the second backup of {size} of which 1 % has changed, in extents of 1 MiB",
            f"the same by {peer.settings}",
            "s",
            Target("at most", 0.1),
            _PAIRS,
            partial(_second, peer=peer),
        ),
    )


ROWS = (
    *(row for peer in PEERS for row in _against(peer)),
    Row(
        "second-reads",
        "bytes of primary that the report of a second backup names, 1 % changed in extents of 1 MiB",
        "bytes that were changed",
        "B",
        Target("at most", 1.3),
        _PAIRS,
        _reads,
    ),
    Row(
        "clones",
        "bytes that a VM and ten clones of it occupy in the store, 2 % of each changed in extents of 256 KiB",
        "bytes that the one occupies, and the changes",
        "B",
        Target("at most", 1.3),
        1,
        _clones,
    ),
)
