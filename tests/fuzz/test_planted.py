"""The fuzzer finds what it is for: each kind of fault is planted into the product, and found within few inputs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.fuzz import campaign, targets_primary, targets_sealed, targets_store
from tests.fuzz.campaign import Campaign, Result, bounded_address_space
from tests.fuzz.registry import TARGETS
from tests.unit.control_fakes import FakeTarget
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptStoreObject
from vmfs_stub.core.ids import JobId
from vmfs_stub.inventory import domain_xml, image_header
from vmfs_stub.primary import envelope, record
from vmfs_stub.store import aes_sealing, associated_files, frames, key_documents, manifest
from vmfs_stub.store.documents import Fields
from vmfs_stub.store.key_documents import encode_key_document
from vmfs_stub.store.pins import Pin

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fuzz(tmp_path: Path) -> Callable[..., Result]:
    """Runs a target in this process."""

    def run(name: str, *, count: int, seed: int = 7) -> Result:
        place = tmp_path / f"place-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        target = TARGETS[name](place)
        try:
            campaign = Campaign(target, seed)
            with bounded_address_space():
                campaign.run(count=count)
            return campaign.result
        finally:
            target.close()

    return run


Fuzz = Callable[..., Result]


def signatures(result: Result) -> list[str]:
    return [finding.signature for finding in result.findings]


def test_a_key_error_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signatures(fuzz("description", count=500)) == []
    monkeypatch.setattr(Fields, "text", lambda self, name: self.values[name])
    assert any(one.startswith("KeyError") for one in signatures(fuzz("description", count=500)))


def test_memory_by_a_length_field_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = frames.decode

    def trusting(frame: memoryview, ref: FrameRef) -> bytes:
        room = bytearray(min(ref.raw_length, 16 << 20))
        return decode(frame, ref) if room is not None else b""

    monkeypatch.setattr(targets_store.frames, "decode", trusting)
    found = signatures(fuzz("frame", count=500))
    assert any(one == "memory" or "MemoryError" in one for one in found)


def test_a_path_that_leads_out_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_check_tree", lambda files, key: None)
    assert "a path that leads out" in signatures(fuzz("manifest", count=3_000))


def test_a_base_that_is_missed_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signatures(fuzz("image-header", count=2_000)) == []
    name = image_header._name

    def careless(head: bytes, at: int, length: int, cluster_bytes: int) -> str | None:
        return name(head, at, length, cluster_bytes) if length < 100 else None

    monkeypatch.setattr(image_header, "_name", careless)
    assert "a base that is missed, or made up" in signatures(fuzz("image-header", count=5_000))


def test_a_name_of_an_associated_file_that_leads_out_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signatures(fuzz("associated", count=2_000)) == []
    monkeypatch.setattr(associated_files, "_is_name", lambda part: True)
    assert "a path that leads out" in signatures(fuzz("associated", count=3_000))


def test_a_file_that_is_written_outside_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    def restore_carelessly(store: object, point: Any, to: Path) -> None:
        to.mkdir()
        for stored in point.manifest.files:
            path = to / stored.path
            if ".." in path.parts and len(str(path)) < 200 and "\0" not in stored.path:
                path.resolve().parent.mkdir(parents=True, exist_ok=True)
                (to.parent / path.name).write_bytes(b"x")

    monkeypatch.setattr(manifest, "_check_tree", lambda files, key: None)
    monkeypatch.setattr(targets_store, "restore_point", restore_carelessly)
    monkeypatch.setattr(targets_store.RestoreTarget, "_check", lambda self, to, stored: None)
    found = signatures(fuzz("restore", count=3_000))
    assert "something was made outside the target" in found


def test_a_checksum_that_is_ignored_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(raw: bytes, *, magic: bytes, version: int) -> dict[str, object]:
        try:
            body = json.loads(raw[16 : 16 + int.from_bytes(raw[12:16], "little")])
        except (ValueError, RecursionError) as exc:
            raise envelope.Damaged("no JSON") from exc
        if not isinstance(body, dict) or raw[:8] != magic:
            raise envelope.Damaged("another kind")
        return body

    monkeypatch.setattr(record, "unseal", believe)
    assert "damage not detected" in signatures(fuzz("record", count=500))


@pytest.mark.parametrize("name", ["pack", "segment", "index-object", "manifest", "durable-map", "frame"])
def test_a_digest_that_says_nothing_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every checksummed format: with a constant for a checksum, all damage goes through it."""

    class Constant:
        def __init__(self, data: object = b"") -> None:
            pass

        def digest(self) -> bytes:
            return bytes(32)

        def hexdigest(self) -> str:
            return "0" * 64

    modules = ("store.packs", "store.segments", "store.index_objects", "store.documents", "primary.durable_map")
    for module in modules:
        if "durable" in module:
            monkeypatch.setattr(f"vmfs_stub.{module}.xxhash.xxh3_128_digest", lambda data: bytes(16))
        else:
            monkeypatch.setattr(f"vmfs_stub.{module}.blake3", Constant)
    monkeypatch.setattr("vmfs_stub.store.frames.xxh3_128_digest", lambda data: bytes(16))
    monkeypatch.setattr("tests.fuzz.targets_store.xxh3_128_digest", lambda data: bytes(16))
    monkeypatch.setattr("tests.fuzz.targets_store.blake3", Constant)
    assert "damage not detected" in signatures(fuzz(name, count=1_000))


def test_a_seal_that_is_not_checked_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = aes_sealing.AesSealing.open

    def trusting(self: aes_sealing.AesSealing, data: bytes, key: str) -> bytes:
        try:
            return opened(self, data, key)
        except CorruptStoreObject:
            return data[28:]

    monkeypatch.setattr(aes_sealing.AesSealing, "open", trusting)
    assert "a sealed object does not read back" in signatures(fuzz("sealed-object", count=500))


def test_a_passphrase_that_costs_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    phrase = targets_sealed.sample_keys()[1]
    assert phrase.scrypting is not None
    data = encode_key_document(replace(phrase, scrypting=replace(phrase.scrypting, n=1 << 30)))
    target = targets_sealed.KeyDocumentTarget(Path())
    assert campaign.judge(target, data)[2] is None  # refused as it should be
    monkeypatch.setattr(key_documents, "_N_MAX", 1 << 30)
    finding = campaign.judge(target, data)[2]
    assert finding is not None
    assert finding.signature == "a passphrase that costs too much to try"


def test_a_loss_on_the_way_back_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = targets_store.decode_pin

    def forgetful(data: bytes, key: str) -> Pin:
        pin = decode(data, key)
        return Pin(pin.placeholder_id, pin.host, pin.datastore, pin.created_s, f"{pin.nonce}+"[:40])

    monkeypatch.setattr(targets_store, "decode_pin", forgetful)
    target = targets_store.PinTarget(Path())
    outcome, _, finding = campaign.judge(target, target.seeds()[1])
    assert outcome is None
    assert finding is not None
    assert finding.signature == "a pin does not read back"


def test_a_wrong_type_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope.Body, "integer", lambda self, name, low=0, high=0: self._taken(name))
    found = signatures(fuzz("record", count=1_000))
    assert any(one.startswith("the type of .") for one in found)


def test_a_call_that_does_not_end_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = targets_primary.decode_record

    def stuck(raw: bytes, *, label: str) -> record.PlaceholderRecord:
        while len(raw) < 100:
            pass
        return decode(raw, label=label)

    monkeypatch.setattr(targets_primary, "decode_record", stuck)
    monkeypatch.setattr(campaign, "HANG_S", 0.1)
    assert any("_Hang" in one for one in signatures(fuzz("record", count=200)))


def test_a_call_that_takes_long_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = targets_primary.decode_record

    def slow(raw: bytes, *, label: str) -> record.PlaceholderRecord:
        until_s = time.process_time() + (0.06 if len(raw) > 5_000 else 0)
        while time.process_time() < until_s:
            pass
        return decode(raw, label=label)

    monkeypatch.setattr(targets_primary, "decode_record", slow)
    monkeypatch.setattr(targets_primary.RecordTarget, "bound", targets_primary.Bound(per_byte=200, cpu_s=0.03))
    assert "time" in signatures(fuzz("record", count=200))


def test_a_bug_in_a_handler_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    start = FakeTarget.start_backup

    async def broken(
        self: FakeTarget, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer
    ) -> JobId:
        if list(vms) != ["db", "wéb"] and not rehearsal:
            raise LookupError
        return await start(self, vms, archive=archive, rehearsal=rehearsal, peer=peer)

    async def recalling(self: FakeTarget, vms: Sequence[str], *, peer: Peer) -> JobId:
        return await broken(self, vms if list(vms) != ["db"] else ["db", "wéb"], archive=True, peer=peer)

    monkeypatch.setattr(FakeTarget, "start_backup", broken)
    monkeypatch.setattr(FakeTarget, "start_recall", recalling)
    assert "the daemon failed unexpectedly" in signatures(fuzz("control-request", count=600))


def test_the_end_of_the_process_is_found_with_its_input() -> None:
    program = (
        "import os, sys, signal\n"
        "from tests.fuzz import campaign, targets_primary\n"
        "class Crashing(targets_primary.TopModeTarget):\n"
        "    def call(self, data):\n"
        "        if data.startswith(b'-'):\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return data\n"
        "result = campaign.run_apart(Crashing, 3, count=3000)\n"
        "print(campaign._text_of(result))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    result = json.loads(done.stdout)
    (finding,) = result["findings"]
    assert finding["signature"] == "the process ended: signal 11"
    assert bytes.fromhex(finding["data"]).startswith(b"-")
    assert 0 < result["executions"] < 3000


def test_the_same_seed_makes_the_same_inputs(fuzz: Fuzz) -> None:
    made = [_inputs(fuzz, seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def _inputs(fuzz: Fuzz, seed: int) -> list[bytes]:
    target = targets_primary.RecordTarget(Path())
    seen: list[bytes] = []
    Campaign(target, seed, announce=seen.append).run(count=300)
    assert len(seen) == 300
    return seen


def test_a_path_of_a_domain_that_is_not_absolute_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signatures(fuzz("domain-xml", count=300)) == []
    monkeypatch.setattr(domain_xml, "_absolute", lambda text: Path(text) if text else None)
    assert any("a path that is not absolute" in each for each in signatures(fuzz("domain-xml", count=8000)))


def test_a_document_type_that_is_read_is_found(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_xml, "_root", ElementTree.fromstring)
    assert signatures(fuzz("domain-xml", count=8000)) != []
