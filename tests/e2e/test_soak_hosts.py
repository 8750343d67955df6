"""Two real daemons that share an S3 store for a few rounds; ``scripts/soak hosts`` does it for long.

The soak is itself put to the test: what is lost in the store, or read of what is absent, must be found.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from scripts.lab.datastore import Datastore
from scripts.lab.failure import LabError
from scripts.lab.s3_server import Bucket
from scripts.lab.soak_hosts import Host, Hosts, Vm, _expect_refused, play_hosts
from vmfs_stub.control.client import ControlClient

SEED = 1
ROUNDS = 4

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("troubled", [False, True])
def test_a_few_rounds(base: Path, bucket: Bucket, troubled: bool) -> None:
    said = play_hosts(base, bucket, SEED, rounds=ROUNDS, troubled=troubled)
    print(said)
    assert f"{ROUNDS} rounds, nothing was wrong" in said
    assert ("answered 503" in said) == troubled


def test_a_pack_that_is_lost_is_found(base: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    check_end = Hosts.check_end

    def lose(self: Hosts) -> None:
        objects = self._hosts[0].datastore.objects()
        for info in objects.list("packs/"):
            objects.delete(info.key)
        check_end(self)

    monkeypatch.setattr(Hosts, "check_end", lose)
    with pytest.raises(LabError, match=r"exit code 6|Input/output error"):
        play_hosts(base, bucket, SEED, rounds=1)


def test_what_is_read_of_an_adopted_vm_is_found(tmp_path: Path) -> None:
    vm = Vm("a0", bytearray(b"x" * 100_000))
    datastore = cast(Datastore, SimpleNamespace(mountpoint=tmp_path))
    host = Host("a", datastore, cast(ControlClient, None))
    (tmp_path / "a0").mkdir()
    host.disk(vm).write_bytes(vm.content)
    with pytest.raises(LabError, match="adopted elsewhere"):
        _expect_refused(host, vm)
