"""`forget`, and what `points` says of pins and of VMs that were deleted; no daemon is needed for either."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from command_line import Run, runner
from store_points import new_id, put_point

from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.core.ids import DatastoreId, PlaceholderId, PointId, VmId
from vmfs_stub.core.names import PRIVATE_DIR
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.store.claims import Claim, ClaimState, put_claim
from vmfs_stub.store.keys import forgotten_key, manifest_key, pin_key
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.pins import Pin, encode_pin
from vmfs_stub.store.store import Store

HERE = socket.gethostname()
DAY_S = 86_400
ELSEWHERE = VmId("e" * 32)


class Place:
    """A datastore with the VM "db", a store, and a configuration; nothing serves it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.backing = base / "backing"
        (self.backing / PRIVATE_DIR).mkdir(parents=True)
        self.make_vm("db")
        self.url = f"file://{base}/store"
        self.store = Store.create(open_objects(StoreAt(self.url), create=True))
        self.configure("")

    def configure(self, retention: str) -> None:
        (self.base / "config.toml").write_text(
            f'[datastore]\nname = "vms"\nbacking = "{self.backing}"\nmountpoint = "{self.base}/vms"\n'
            f'runtime_dir = "{self.base}/run"\n[store]\nurl = "{self.url}"\n[retention]\n{retention}'
        )

    def make_vm(self, name: str) -> VmId:
        (self.backing / name).mkdir()
        return self.vm_id(name)

    def vm_id(self, name: str) -> VmId:
        return DirectoryInventory(self.backing).find(name).id

    def add(self, vm_id: VmId, name: str, *ages_days: float, host: str = HERE, datastore: str = "vms") -> list[PointId]:
        now_s = time.time()
        return [
            put_point(
                self.store,
                vm_id=vm_id,
                name=name,
                created_s=now_s - age * DAY_S,
                host=host,
                datastore=datastore,
            )
            for age in ages_days
        ]

    def pin(self, vm_id: VmId, point_id: PointId) -> None:
        pin = Pin(PlaceholderId(new_id()), "host2", "images", 1.0, new_id())
        self.store.objects.put(pin_key(vm_id, point_id, pin.placeholder_id), encode_pin(pin, vm_id, point_id))

    def left(self, vm_id: VmId) -> list[PointId]:
        return [point.point_id for point in self.store.points(vm_id, with_damaged=True)]

    def marks(self) -> set[PointId]:
        return {point_id for _, point_id, _ in self.store.forgotten()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return runner(monkeypatch, capsys, config=tmp_path / "config.toml")


def test_points_are_forgotten_by_name(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    first, second, third = place.add(db, "db", 3, 2, 1)
    result = run("forget", f"db@{first}", f"{db}@{second[:12]}", f"db@{first}")
    assert result.code == 0, result
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert rows[0] == ["VM", "POINT", "CREATED", "OUTCOME", "WHY"]
    assert [(row[0], row[1], row[3], row[4]) for row in rows[1:]] == [
        ("db", first, "forgotten", "by hand"),
        ("db", second, "forgotten", "by hand"),
    ]
    assert place.left(db) == [third]
    for command in (["forget", f"db@{first}"], ["verify", f"db@{first}"], ["restore", f"db@{first}", "--to", "/tmp/x"]):
        assert run(*command).code == ExitCode.NOT_FOUND
    marks = {point_id: mark for _, point_id, mark in place.store.forgotten()}
    assert {point_id: mark and (mark.host, mark.why) for point_id, mark in marks.items()} == {
        first: (HERE, "by hand"),
        second: (HERE, "by hand"),
    }


def test_nothing_is_forgotten_when_a_name_is_wrong(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    (only,) = place.add(db, "db", 1)
    for names, code in (
        ((f"db@{only}", "db@nope"), ExitCode.NOT_FOUND),
        ((f"db@{only}", "web@latest"), ExitCode.NOT_FOUND),
        ((f"db@{only}", "db"), ExitCode.USAGE),
        ((), ExitCode.USAGE),
        (("--by-rules", "--store", place.url), ExitCode.USAGE),
    ):
        result = run("forget", *names)
        assert (result.code, result.out) == (code, ""), names
    assert place.left(db) == [only]


def test_the_store_alone_is_enough(run: Run, place: Place) -> None:
    (only,) = place.add(ELSEWHERE, "web", 1, host="host9")
    (place.base / "config.toml").unlink()
    assert run("forget", "web@latest", "--store", place.url).code == 0
    assert place.marks() == {only}


def test_a_pinned_point_is_refused_and_others_are_forgotten(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    pinned, free = place.add(db, "db", 2, 1)
    place.pin(db, pinned)
    dry = run("forget", f"db@{pinned}", f"db@{free}", "--dry-run")
    assert (dry.code, place.marks()) == (ExitCode.REFUSED, set())
    assert [line.split("\t")[3] for line in dry.out.splitlines()[1:]] == ["kept", "would be forgotten"]
    result = run("forget", f"db@{pinned}", f"db@{free}", "--json")
    assert result.code == ExitCode.REFUSED
    assert "1 placeholder in datastore images of host host2" in result.err
    rows = json.loads(result.out)
    assert [(row["point"], row["kept"]) for row in rows] == [(pinned, True), (free, False)]
    assert list(rows[0]) == ["vm", "vm_id", "point", "created", "kept", "why"]
    assert place.marks() == {free}


def test_rules_apply_to_the_vms_of_this_datastore(run: Run, place: Place) -> None:
    place.configure("keep_last = 1\n")
    db, web = place.vm_id("db"), place.make_vm("web")
    old, pinned, new = place.add(db, "db", 3, 2, 1)
    place.pin(db, pinned)
    of_web = place.add(web, "web", 9, 8)
    place.add(ELSEWHERE, "other", 9, 8, host="host9")
    place.add(VmId("d" * 32), "gone", 9, 8)
    wanted = [
        (old, False, "not kept by keep_last 1"),
        (pinned, True, "needed by 1 placeholder"),
        (new, True, "newest, last"),
    ]
    for arguments in (["db", "--dry-run"], ["db"]):
        result = run("forget", "--by-rules", "--json", *arguments)
        assert result.code == 0, result
        rows = json.loads(result.out)
        assert [(row["point"], row["kept"]) for row in rows] == [each[:2] for each in wanted]
        assert all(why in row["why"] for row, (_, _, why) in zip(rows, wanted, strict=True))
        assert place.marks() == (set() if "--dry-run" in arguments else {old})
    everything = json.loads(run("forget", "--by-rules", "--json").out)
    assert {row["vm"]: row["why"] for row in everything if row["vm"] not in ("db", "web")} == {
        "gone": "deleted, and keep_deleted_days is not set"
    }
    assert place.marks() == {old, of_web[0]}
    other = json.loads(run("forget", "--by-rules", "other", "--json").out)
    assert [(row["kept"], row["why"]) for row in other] == [(True, "not a VM of this datastore")] * 2


def test_a_wrong_clock_stops_the_rules_and_is_told(run: Run, place: Place) -> None:
    place.configure("keep_last = 1\n")
    db = place.vm_id("db")
    place.add(db, "db", 2, 1, -3)
    result = run("forget", "--by-rules", "--json")
    assert (result.code, place.marks()) == (ExitCode.REFUSED, set())
    assert f"VM {db}: a restore point of this VM is from the future" in result.err
    assert [row["kept"] for row in json.loads(result.out)] == [True] * 3


def test_without_rules_all_is_kept(run: Run, place: Place) -> None:
    place.add(place.vm_id("db"), "db", 300, 200, 1)
    rows = json.loads(run("forget", "--by-rules", "--json").out)
    assert [(row["kept"], row["why"]) for row in rows] == [(True, "no rules are set")] * 3


def test_points_of_deleted_vms_go_when_the_newest_is_old(run: Run, place: Place) -> None:
    place.configure("keep_daily = 1\nkeep_deleted_days = 30\n")
    db = place.vm_id("db")
    of_db = place.add(db, "db", 90, 80)
    (lately, long_ago) = VmId("c" * 32), VmId("d" * 32)
    place.add(lately, "lately", 60, 29)
    gone = place.add(long_ago, "gone", 60, 31)
    for host, datastore in (("host9", "vms"), (HERE, "images"), (HERE, "")):
        place.add(VmId(new_id()), "other", 60, host=host, datastore=datastore)
    moved = VmId("f" * 32)
    place.add(moved, "moved", 60)
    put_claim(place.store.objects, Claim(moved, 1, ClaimState.HELD, DatastoreId("9" * 32), HERE, "vms", time.time()))
    result = run("forget", "--by-rules")
    assert result.code == 0, result
    assert place.marks() == {of_db[0], *gone}
    assert {row["deleted"] for row in json.loads(run("points", "moved", "--json").out)} == {None}
    assert result.out.count("deleted, and the newest is older than keep_deleted_days 30") == 2


def test_memory_of_guests_alone_is_no_vm_of_which_nobody_can_tell(run: Run, place: Place) -> None:
    place.configure(f'keep_daily = 1\nkeep_deleted_days = 30\n[libvirt]\nsave_dir = "{place.base}/vms/save"\n')
    gone = place.add(place.vm_id("db"), "db", 60, 31)
    shutil.rmtree(place.backing / "db")
    (place.backing / "save").mkdir()
    (place.backing / "save/db.save").write_bytes(b"memory")
    assert run("forget", "--by-rules").code == 0
    assert place.marks() == set(gone)


@pytest.mark.parametrize("how", ["not mounted", "not there", "without identities"])
def test_no_vm_is_taken_for_deleted_when_that_cannot_be_told(run: Run, place: Place, how: str) -> None:
    place.configure("keep_daily = 1\nkeep_deleted_days = 1\n")
    place.add(place.vm_id("db"), "db", 90, 80)
    shutil.rmtree(place.backing)
    if how != "not there":
        place.backing.mkdir()
    if how == "without identities":
        (place.backing / PRIVATE_DIR).mkdir()
        (place.backing / "db").mkdir()
    result = run("forget", "--by-rules")
    assert (result.code, result.out, place.marks()) == (ExitCode.PRIMARY, "", set())
    assert {row["deleted"] for row in json.loads(run("points", "--json").out)} == {None}


def test_what_was_done_is_told_when_the_store_goes_away(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = place.vm_id("db")
    place.configure("keep_last = 1\n")
    first, second, _ = place.add(db, "db", 3, 2, 1)
    forget = Store.forget

    def once(self: Store, vm_id: VmId, point_id: PointId, *, host: str, why: str) -> None:
        if point_id == second:
            shutil.rmtree(place.base / "store")
        forget(self, vm_id, point_id, host=host, why=why)

    monkeypatch.setattr(Store, "forget", once)
    result = run("forget", "--by-rules", "--json")
    assert result.code == ExitCode.STORE
    assert [(row["point"], row["kept"]) for row in json.loads(result.out)] == [(first, False)]


def test_a_damaged_point_can_be_forgotten_by_name_only(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    place.configure("keep_last = 1\n")
    bad, new = place.add(db, "db", 2, 1)
    path = place.base / "store" / manifest_key(db, bad)
    path.write_bytes(path.read_bytes()[:-9])
    rows = json.loads(run("forget", "--by-rules", "--json").out)
    assert {row["point"]: row["kept"] for row in rows} == {bad: True, new: True}
    assert run("forget", f"db@{bad}").code == 0
    assert place.left(db) == [new]
    assert place.store.objects.size(forgotten_key(db, bad)) > 0


def test_what_is_forgotten_is_listed_until_it_is_removed(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    old, _ = place.add(db, "db", 2, 1)
    (only,) = place.add(ELSEWHERE, "other", 1)
    for name in (f"db@{old}", "other@latest"):
        assert run("forget", name).code == 0
    place.store.objects.put(forgotten_key(db, PointId("f" * 32)), b"damaged")
    rows = {row["point"]: row for row in json.loads(run("points", "--forgotten", "--json").out)}
    assert {point: (row["vm"], row["host"], row["why"]) for point, row in rows.items()} == {
        old: ("db", HERE, "by hand"),
        only: ("", HERE, "by hand"),
        "f" * 32: ("db", "", "its mark cannot be read"),
    }
    assert abs(rows[old]["forgotten"] - time.time()) < 60
    lines = run("points", ELSEWHERE, "--forgotten", "--store", place.url).out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["VM", "POINT"], [ELSEWHERE, only]]
    assert len(run("points", "db", "--forgotten").out.splitlines()) == 3


def test_points_show_pins_and_deleted_vms(run: Run, place: Place) -> None:
    db = place.vm_id("db")
    pinned, free = place.add(db, "db", 2, 1)
    place.pin(db, pinned)
    place.pin(db, pinned)
    place.add(VmId("c" * 32), "gone", 1)
    place.add(ELSEWHERE, "other", 1, host="host9")
    rows = json.loads(run("points", "--json").out)
    assert [(row["vm"], row["pins"], row["deleted"]) for row in rows] == [
        ("db", 2, False),
        ("db", 0, False),
        ("gone", 0, True),
        ("other", 0, None),
    ]
    table = [line.split("\t") for line in run("points").out.splitlines()]
    assert [(row[0], row[1], row[-1]) for row in table[:3]] == [
        ("VM", "POINT", "PINS"),
        ("db", pinned, "2"),
        ("db", free, "0"),
    ]
    assert [row[0] for row in table[3:]] == ["gone (deleted)", "other"]
    alone = json.loads(run("points", "db", "--json", "--store", place.url).out)
    assert [(row["pins"], row["deleted"]) for row in alone] == [(2, None), (0, None)]
