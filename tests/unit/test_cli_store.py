"""Commands that work on the store alone: `points`, `restore`, `verify`; no daemon, and no configuration either."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest
from command_line import Run, runner
from store_points import back_up

from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.core.errors import AmbiguousName, PointNotFound, VmNotFound
from vmfs_stub.core.ids import PackId, PointId, VmId
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.services.stored_vms import find_point, find_stored, find_stored_vm, named_points, split_name
from vmfs_stub.store import objects_url
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.manifest import FileKind, StoredFile
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.points import PointSummary, StoredVm
from vmfs_stub.store.store import Store

CONTENT = bytes(range(256)) * 1024 + bytes(1 << 20) + b"end"
CHUNK = 64 * 1024


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, config=Path("/nonexistent/config.toml"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with the VM "db" (two points) and the VM "web" (one)."""
    where = f"file://{tmp_path}/store"
    store = Store.create(open_objects(StoreAt(where), create=True))
    add_point(store, "a" * 32, "db", "1111" + "0" * 28)
    add_point(store, "a" * 32, "db", "2222" + "0" * 28)
    add_point(store, "b" * 32, "web", "3333" + "0" * 28)
    return where


def configured(tmp_path: Path, url: str, more: str) -> str:
    """The configuration of a datastore with that store; ``more`` comes after its url."""
    return f"""
[datastore]
name = "main"
backing = "{tmp_path}/backing"
mountpoint = "{tmp_path}/mount"
[store]
url = "{url}"
{more}
"""


def add_point(store: Store, vm_id: str, name: str, point_id: str, content: bytes = CONTENT) -> None:
    index = ChunkIndex(None, store.id)
    writer = store.begin_backup(index=index)
    appended = writer.append(writer.encode(content))
    for pack in (*appended.sealed, writer.finish()):
        if pack is not None:
            writer.put_pack(pack)
    disk = StoredFile(
        path="disk.raw",
        kind=FileKind.FILE,
        size=len(content),
        mode=0o640,
        uid=0,
        gid=0,
        mtime_ns=10**18,
        atime_ns=10**18,
        segments=writer.add_file(appended.entries),
    )
    writer.commit(vm_id=VmId(vm_id), point_id=PointId(point_id), vm_name=name, host="host", files=[disk], metadata={})
    index.close()


def test_points(run: Run, url: str) -> None:
    rows = json.loads(run("points", "--store", url, "--json").out)
    assert [(row["vm"], row["point"][:4]) for row in rows] == [("db", "1111"), ("db", "2222"), ("web", "3333")]
    assert rows[0]["size_bytes"] == len(CONTENT)
    one = run("points", "web", "--store", url)
    assert one.code == 0
    assert [line.split("\t")[0] for line in one.out.splitlines()] == ["VM", "web"]
    assert run("points", "nope", "--store", url).code == ExitCode.NOT_FOUND


def test_restore_needs_only_the_store(run: Run, url: str, tmp_path: Path) -> None:
    result = run("restore", "db", "--to", tmp_path / "out", "--store", url)
    assert result.code == 0, result
    assert (tmp_path / "out/disk.raw").read_bytes() == CONTENT
    assert f"db@2222{'0' * 28}: 1 files" in result.out
    taken = run("restore", "db@1111", "--to", tmp_path / "out", "--store", url)
    assert taken.code == ExitCode.REFUSED
    assert run("restore", "db@1111", "--to", tmp_path / "older", "--store", url).code == 0
    assert run("restore", "db@latest", "--to", tmp_path / "newest", "--store", url).code == 0
    assert run("restore", "db@9999", "--to", tmp_path / "x", "--store", url).code == ExitCode.NOT_FOUND
    assert not (tmp_path / "x").exists()


def test_a_store_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("points", "--store", f"file://{tmp_path}/no-store")
    assert result.code == ExitCode.STORE
    assert "there is no vmfs-stub store at" in result.err
    # A mount that is missing looks the same: nobody may be led to make an empty store under it.
    assert "is what belongs there mounted" in result.err
    assert "init" not in result.err


def test_the_configured_store_is_tried_as_often_as_configured(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tried = tmp_path / "config.toml", []
    path.write_text(configured(tmp_path, url, "retries_max = 7"))

    def opening(at: StoreAt) -> ObjectStore:
        tried.append(at.retries_max)
        return open_objects(at)

    monkeypatch.setattr(objects_url, "open_objects", opening)
    assert run("--config", path, "points").code == 0
    assert run("--config", path, "verify", "web").code == 0
    assert run("--config", path, "restore", "web", "--to", tmp_path / "out").code == 0
    assert run("--config", path, "points", "--store", url).code == 0
    assert tried == [7, 7, 7, 3]


def test_verify_finds_planted_damage(run: Run, url: str, tmp_path: Path) -> None:
    sound = run("verify", "--store", url)
    assert sound.code == 0, sound
    assert "3 restore points, 3 files" in sound.out
    assert "2 restore points" in run("verify", "db", "--store", url).out
    assert "1 restore points" in run("verify", "db@2222", "--store", url).out
    for pack in (tmp_path / "store/packs").rglob("*"):
        if pack.is_file():
            content = bytearray(pack.read_bytes())
            content[100] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)
    damaged = run("verify", "web", "--store", url)
    assert damaged.code == ExitCode.INTEGRITY
    assert f"web@3333{'0' * 28} disk.raw chunk 0" in damaged.err
    restored = run("restore", "web", "--to", tmp_path / "out", "--store", url)
    assert restored.code == ExitCode.INTEGRITY
    assert list((tmp_path / "out").iterdir()) == []


def test_verify_folds_neighbours_with_the_same_problem(run: Run, url: str, tmp_path: Path) -> None:
    """A pack that is missing takes hundreds of chunks with it; one line says so."""
    content = random.Random(5).randbytes(6 * CHUNK)
    made = back_up(Store.open(open_objects(StoreAt(url))), {"big.raw": content}, vm_name="big")
    verified = run("verify", "big", "--store", url)
    assert verified.code == 0, verified
    found = Store.open(open_objects(StoreAt(url))).open_point(made.vm_id, made.point_id).chunks(0).locate(0, 6)
    refs = [ref for ref in found if ref is not None]
    pack = tmp_path / "store" / pack_key(refs[0].pack_id)
    whole = pack.read_bytes()
    pack.unlink()
    gone = run("verify", "big", "--store", url)
    assert gone.code == ExitCode.INTEGRITY
    assert len(gone.err.splitlines()) == 2  # what it does, and the finding
    assert f"big@{made.point_id} big.raw chunks 0 to 5: " in gone.err
    assert "6 findings" in gone.out
    damaged = bytearray(whole)
    for ref in (refs[1], refs[4]):
        damaged[ref.end - 1] ^= 1
    pack.write_bytes(damaged)
    apart = run("verify", "big", "--store", url)
    assert [word in apart.err for word in ("chunk 1: ", "chunk 4: ", " to ")] == [True, True, False]


def stored(vm_id: str, name: str, *points: str, damaged: str = "") -> StoredVm:
    summaries = tuple(
        PointSummary(VmId(vm_id), PointId(point), name, 1.0, "h", 1, 10, damaged="bad" if point == damaged else None)
        for point in points
    )
    return StoredVm(VmId(vm_id), name, summaries)


def test_names_of_points() -> None:
    vms = [
        stored("a" * 32, "db", "aaaa1", "aaaa2", "bbbb1", damaged="bbbb1"),
        stored("b" * 32, "twin", "cccc1"),
        stored("c" * 32, "twin", "dddd1"),
        stored("d" * 32, "user@host", "eeee1"),
    ]
    assert split_name("db") == ("db", "latest")
    assert split_name("a@b@c") == ("a@b", "c")
    assert find_stored(vms, "db")[1].point_id == "aaaa2"  # the newest that can be read
    assert find_stored(vms, "db@bbbb")[1].point_id == "bbbb1"
    assert find_stored(vms, f"{'c' * 32}@dddd1")[1].point_id == "dddd1"
    assert find_stored(vms, "user@host")[1].point_id == "eeee1"
    assert find_stored(vms, "user@host@eeee1")[1].point_id == "eeee1"
    assert named_points(vms, None).size_bytes == 60
    assert named_points(vms, "user@host").only is None
    with pytest.raises(AmbiguousName, match="b" * 32):
        find_stored_vm(vms, "twin")
    with pytest.raises(AmbiguousName, match="2 restore points"):
        find_point(vms[0], "aaaa")
    with pytest.raises(PointNotFound):
        find_point(vms[0], "aaa")  # too short to be meant
    with pytest.raises(VmNotFound):
        find_stored(vms, "nope@aaaa1")
    with pytest.raises(PointNotFound, match="can be read"):
        find_stored([stored("a" * 32, "db", "x", damaged="x")], "db")


def test_gc_removes_what_was_forgotten_and_nothing_else(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("vmfs_stub.cli.gc.time.sleep", waits.append)

    def collected(*options: str) -> dict[str, int]:
        result = run("gc", "--store", url, "--json", *options)
        assert result.code == 0, result
        return {name: count for name, count in json.loads(result.out).items() if count}

    add_point(Store.open(open_objects(StoreAt(url))), "c" * 32, "own", "4444" + "0" * 28, CONTENT[::-1])
    assert collected("--dry-run") == collected() == {}
    assert run("forget", "db@2222", "web@3333", "own@4444", "--store", url).code == 0
    would = collected("--dry-run")
    assert (would["points"], would["packs"], would["segments"]) == (3, 1, 3)
    packs = [path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]
    assert len(packs) == 2
    assert would["bytes"] >= min(pack.stat().st_size for pack in packs)
    assert waits == [60, 30], "only runs wait, and one that has nothing to delete does not wait again"
    assert collected() == would
    assert len([path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]) == 1
    assert collected() == collected("--dry-run") == {}
    assert [row["vm"] for row in json.loads(run("points", "--store", url, "--json").out)] == ["db"]
    assert run("verify", "--store", url).code == 0
    assert run("restore", "db", "--to", tmp_path / "out", "--store", url).code == 0
    assert (tmp_path / "out/disk.raw").read_bytes() == CONTENT


@pytest.fixture
def mostly_garbage(url: str) -> bytes:
    """In the store is a pack of which a quarter is needed, by the VM "small", which has this content."""
    store, content = Store.open(open_objects(StoreAt(url))), random.Random(6).randbytes(8 * CHUNK)
    with closing(ChunkIndex(None, store.id)) as index:
        large = back_up(store, {"disk.raw": content}, vm_name="large", index=index)
        back_up(store, {"disk.raw": content[: 2 * CHUNK]}, vm_name="small", index=index)
    store.forget(large.vm_id, large.point_id, host="host1", why="by hand")
    return content[: 2 * CHUNK]


def test_gc_copies_what_is_needed_of_packs_that_are_mostly_garbage(
    run: Run, url: str, mostly_garbage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmfs_stub.cli.gc.time.sleep", lambda seconds: None)
    packs = set((tmp_path / "store/packs").rglob("?" * 32))

    def lines(*options: str) -> list[str]:
        result = run("gc", "--store", url, *options)
        assert result.code == 0, result
        assert ("copying what is needed of 1 packs" in result.err) == (not options)
        return result.out.splitlines()

    assert lines("--dry-run", "--no-repack") == ["1 restore points, 0 packs and 1 segments of 572 B would be removed"]
    assert lines("--dry-run")[1:] == [
        "1 of these packs are mostly garbage; since such packs are still needed, 128.1 KiB would be copied"
    ]
    assert lines("--no-repack") == ["1 restore points, 0 packs and 1 segments of 572 B were removed"]
    assert set((tmp_path / "store/packs").rglob("?" * 32)) == packs
    assert lines()[1:] == [
        "1 of these packs are mostly garbage; since such packs are still needed, 128.1 KiB were copied"
    ]
    again = json.loads(run("gc", "--store", url, "--json").out)
    assert (again["packs"], again["repacked"], again["copied_bytes"]) == (0, 0, 0)
    assert run("verify", "--store", url).code == 0
    assert run("restore", "small", "--to", tmp_path / "out", "--store", url).code == 0
    assert (tmp_path / "out/disk.raw").read_bytes() == mostly_garbage


@pytest.mark.parametrize("is_away", [False, True], ids=["there", "away"])
def test_gc_repacks_when_the_replica_has_the_copies(
    run: Run, url: str, mostly_garbage: bytes, is_away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmfs_stub.cli.gc.time.sleep", lambda seconds: None)
    config = tmp_path / "config.toml"
    config.write_text(configured(tmp_path, url, f'[replica]\nurl = "file://{tmp_path}/replica"'))
    assert run("--config", config, "replicate", "--create").code == 0
    if is_away:
        (tmp_path / "replica").rename(tmp_path / "elsewhere")
    result = run("--config", config, "gc")
    assert result.code == 0, result
    assert ("1 of these packs are mostly garbage" in result.out) == (not is_away)
    assert ("packs that are mostly garbage stay, since their replica could not have" in result.err) == is_away
    if not is_away:
        assert run("restore", "small", "--to", tmp_path / "out", "--store", f"file://{tmp_path}/replica").code == 0
        assert (tmp_path / "out/disk.raw").read_bytes() == mostly_garbage


def test_gc_refuses_to_guess_what_a_damaged_point_needs(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmfs_stub.cli.gc.time.sleep", lambda seconds: None)
    assert run("forget", "web@3333", "--store", url).code == 0
    (damaged, *_) = (tmp_path / "store/manifests" / ("a" * 32)).iterdir()
    damaged.write_bytes(b"?" + damaged.read_bytes())
    before = sorted((tmp_path / "store/packs").rglob("*"))
    for options in ((), ("--dry-run",)):
        result = run("gc", "--store", url, *options)
        assert (result.code, damaged.name in result.err) == (ExitCode.INTEGRITY, True), result
    assert sorted((tmp_path / "store/packs").rglob("*")) == before
    assert run("forget", f"db@{damaged.name}", "--store", url).code == 0
    assert run("gc", "--store", url).code == 0
    assert len([path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]) == 1


def test_scrub_names_who_needs_what_is_damaged(run: Run, url: str, tmp_path: Path) -> None:
    sound = run("scrub", "--store", url)
    assert sound.code == 0, sound
    assert "3 restore points, 3 segments, 1 packs" in sound.out
    (pack,) = [path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]
    pack.write_bytes(b"?" + pack.read_bytes()[1:])
    damaged = run("scrub", "--store", url)
    assert damaged.code == ExitCode.INTEGRITY, damaged
    assert f"packs/{pack.parent.name}/{pack.name}: the frame at 0+" in damaged.err
    assert f"needed by web@3333{'0' * 28} disk.raw: 4 chunks" in damaged.err
    told = run("scrub", "--store", url, "--json")
    assert told.code == ExitCode.INTEGRITY
    report = json.loads(told.out)
    assert [need["vm_name"] for need in report["damages"][0]["needs"]] == ["db", "db", "web"]
    assert report["is_whole"] is False


def test_scrub_repairs_what_the_next_backup_has_stored_again(run: Run, url: str, tmp_path: Path) -> None:
    (pack,) = [path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]
    pack.write_bytes(b"?" + pack.read_bytes()[1:])
    assert run("scrub", "--store", url).code == ExitCode.INTEGRITY
    add_point(Store.open(open_objects(StoreAt(url))), "a" * 32, "db", "4444" + "0" * 28)
    repaired = run("scrub", "--store", url)
    assert repaired.code == 0, repaired
    assert "1 of 1 frames that restore points need are repaired" in repaired.err
    assert run("verify", "--store", url).code == 0
    assert run("restore", "web", "--to", tmp_path / "out", "--store", url).code == 0
    assert (tmp_path / "out/disk.raw").read_bytes() == CONTENT


def test_scrub_goes_on_where_it_was_with_a_configuration(run: Run, url: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    (tmp_path / "backing/.vmfs-stub").mkdir(parents=True)
    path.write_text(configured(tmp_path, url, '[scrub]\nbytes_per_s_max = "1 GiB"'))
    (pack,) = [path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]

    def nearly_done() -> None:
        store_id = Store.open(open_objects(StoreAt(url))).id
        with closing(ScrubProgress(tmp_path / "backing/.vmfs-stub/scrub.sqlite", store_id)) as progress:
            progress.passed(PackId(pack.name), None)

    nearly_done()
    assert ", 0 packs" in run("--config", path, "scrub").out
    nearly_done()
    assert ", 1 packs" in run("--config", path, "scrub", "--restart").out
