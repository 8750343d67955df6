"""What the directory inventory takes for a VM, and how a VM keeps its identity."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmfs_stub.core.errors import AmbiguousName, PrimaryIOError, Unsupported, VmNotFound
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import PRIVATE_DIR, VM_XATTR
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.identity import Group, write_vm_id
from vmfs_stub.inventory.vm import Scan, Vm


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.mkdir()
    return path


def make(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_directories_and_files_are_vms(backing: Path) -> None:
    make(backing / "db/disk.raw", 5)
    make(backing / "db/state/nvram.fd", 7)
    make(backing / "web.qcow2", 3)
    make(backing / PRIVATE_DIR / "maps/x")
    (backing / "lost+found").mkdir()
    (backing / "empty").mkdir()
    vms = DirectoryInventory(backing).scan().vms
    assert [(vm.name, vm.entry) for vm in vms] == [("db", "db/"), ("empty", "empty/"), ("web", "web.qcow2")]
    assert [(f.path, f.relative, f.size) for f in vms[0].files] == [
        ("db/disk.raw", "disk.raw", 5),
        ("db/state/nvram.fd", "state/nvram.fd", 7),
    ]
    assert [(f.path, f.relative, f.ino) for f in vms[2].files] == [
        ("web.qcow2", "web.qcow2", (backing / "web.qcow2").stat().st_ino)
    ]


@pytest.mark.parametrize("name", ["db", "web.qcow2"])
def test_protection_stays_with_the_entry(backing: Path, name: str) -> None:
    make(backing / "db/disk.raw")
    make(backing / "web.qcow2")
    inventory = DirectoryInventory(backing)
    stem = name.partition(".")[0]

    def protected() -> list[str]:
        return [vm.name for vm in inventory.scan().vms if vm.is_protected]

    assert protected() == []
    vm = inventory.find(stem)
    inventory.protect(vm, False)
    inventory.protect(vm, True)
    inventory.protect(vm, True)
    assert protected() == [stem]
    (backing / name).rename(backing / "renamed")
    assert protected() == ["renamed"]
    with pytest.raises(VmNotFound, match="renamed or replaced"):
        inventory.protect(vm, False)
    make(backing / name / "disk.raw" if stem == "db" else backing / name)
    with pytest.raises(VmNotFound, match="renamed or replaced"):
        inventory.protect(vm, False)
    assert protected() == ["renamed"]
    inventory.protect(inventory.find("renamed"), False)
    assert protected() == []


def test_protecting_breaks_no_lease(backing: Path) -> None:
    """As an archive in progress holds one."""
    path = make(backing / "web.raw")
    inventory = DirectoryInventory(backing)
    vm = inventory.find("web")
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        inventory.protect(vm, True)
        assert inventory.find("web").is_protected
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    finally:
        os.close(fd)


def test_symlinks_and_special_files_are_not_followed(backing: Path, tmp_path: Path) -> None:
    make(tmp_path / "outside/secret.raw")
    (backing / "link").symlink_to(tmp_path / "outside")
    (backing / "file-link.raw").symlink_to(tmp_path / "outside/secret.raw")
    make(backing / "vm/disk.raw")
    (backing / "vm/link.raw").symlink_to(tmp_path / "outside/secret.raw")
    (backing / "vm/up").symlink_to(tmp_path / "outside")
    os.mkfifo(backing / "vm/fifo")
    os.mkfifo(backing / "fifo")
    vms = DirectoryInventory(backing).scan().vms
    assert [vm.name for vm in vms] == ["vm"]
    assert [f.relative for f in vms[0].files] == ["disk.raw"]


def test_identity_survives_scan_rename_and_move(backing: Path) -> None:
    make(backing / "a/disk.raw")
    make(backing / "b.raw")
    inventory = DirectoryInventory(backing)
    before = {vm.name: vm.id for vm in inventory.scan().vms}
    (backing / "a").rename(backing / "c")
    (backing / "b.raw").rename(backing / "d.raw")
    after = {vm.name: vm.id for vm in DirectoryInventory(backing).scan().vms}
    assert after == {"c": before["a"], "d": before["b"]}


def test_a_copy_gets_an_identity_of_its_own(backing: Path) -> None:
    make(backing / "a.raw")
    make(backing / "dir/disk.raw")
    inventory = DirectoryInventory(backing)
    before = {vm.name: vm.id for vm in inventory.scan().vms}
    subprocess.run(["cp", "-a", backing / "a.raw", backing / "b.raw"], check=True)
    subprocess.run(["cp", "-a", backing / "dir", backing / "dir2"], check=True)
    assert os.getxattr(backing / "b.raw", VM_XATTR) == os.getxattr(backing / "a.raw", VM_XATTR)
    after = {vm.name: vm.id for vm in inventory.scan().vms}
    assert len(set(after.values())) == 4
    assert after["a"] == before["a"]
    assert after["dir"] == before["dir"]
    assert {vm.name: vm.id for vm in inventory.scan().vms} == after


@pytest.mark.parametrize(
    "record", [b"", b"{}", b"[]", b"\xff", b'{"vm": "../x", "ino": 1, "generation": ""}', b"[" * 1_500 + b"]" * 1_500]
)
def test_a_damaged_identity_is_replaced(backing: Path, record: bytes) -> None:
    os.setxattr(make(backing / "a.raw"), VM_XATTR, record)
    inventory = DirectoryInventory(backing)
    (vm,) = inventory.scan().vms
    assert len(vm.id) == 32
    assert inventory.scan().vms == (vm,)


def test_ambiguous_names_are_refused_with_candidates(backing: Path) -> None:
    make(backing / "a/disk.raw")
    make(backing / "a.raw")
    make(backing / "a.qcow2")
    make(backing / "b.raw")
    inventory = DirectoryInventory(backing)
    with pytest.raises(AmbiguousName) as caught:
        inventory.find("a")
    assert all(entry in str(caught.value) for entry in ("a/", "a.raw", "a.qcow2"))
    assert inventory.find("a.raw").path == "a.raw"
    assert inventory.find("a/").is_directory
    assert inventory.find("b").path == "b.raw"
    by_id = inventory.find("a.qcow2").id
    assert inventory.find(by_id).path == "a.qcow2"
    with pytest.raises(VmNotFound, match="'nope'"):
        inventory.find("nope")
    with pytest.raises(VmNotFound):
        Scan(()).find("a")


def test_names_that_are_not_text(backing: Path) -> None:
    raw = os.fsencode(backing) + b"/bad\xff\n.raw"
    with open(raw, "wb") as file:  # noqa: PTH123 - a bytes path
        file.write(b"1")
    (vm,) = DirectoryInventory(backing).scan().vms
    assert vm.name == r"bad\xff\n"
    assert os.fsencode(vm.path) == b"bad\xff\n.raw"


def test_a_scan_does_not_break_a_lease(backing: Path) -> None:
    path = make(backing / "vm/disk.raw")
    top = make(backing / "top.raw")
    inventory = DirectoryInventory(backing)
    fds = [os.open(p, os.O_RDWR) for p in (path, top)]
    try:
        for fd in fds:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert len(inventory.scan().vms) == 2
        assert [fcntl.fcntl(fd, fcntl.F_GETLEASE) for fd in fds] == [fcntl.F_WRLCK] * 2
    finally:
        for fd in fds:
            os.close(fd)


def test_a_missing_backing_directory_is_an_error(backing: Path) -> None:
    shutil.rmtree(backing)
    with pytest.raises(PrimaryIOError, match="cannot open the backing directory"):
        DirectoryInventory(backing).scan()


@pytest.mark.parametrize("spoil", ["nest", "fill"])
def test_a_vm_that_cannot_be_read_hides_no_other(backing: Path, spoil: str) -> None:
    make(backing / "good/disk.raw")
    bad = backing / "bad"
    bad.mkdir()
    if spoil == "nest":
        (bad / "/".join(["d"] * 70)).mkdir(parents=True)
    else:
        fill_attributes(bad)
    inventory = DirectoryInventory(backing)
    scan = inventory.scan()
    assert [vm.name for vm in scan.vms] == ["good"]
    assert [vm.name for vm in scan.unread] == ["bad"]
    assert inventory.find("good").name == "good"
    for name in ("bad", "bad/"):
        with pytest.raises(PrimaryIOError, match=r"^VM bad cannot be read: "):
            inventory.find(name)
    make(backing / "bad.raw")
    with pytest.raises(AmbiguousName, match=r"bad\.raw .*bad$"):
        inventory.find("bad")


def fill_attributes(path: Path) -> None:
    """As a user may do, until no room is left for an identity."""
    for size in (3000, 300, 30, 1):
        for number in range(200):
            try:
                os.setxattr(path, f"user.{size}.{number}", b"x" * size)
            except OSError:
                break


def test_an_identity_that_is_there_needs_no_room(backing: Path) -> None:
    (backing / "vm").mkdir()
    inventory = DirectoryInventory(backing)
    before = inventory.scan()
    fill_attributes(backing / "vm")
    assert inventory.scan() == before


def test_what_the_process_is_short_of_is_no_fault_of_a_vm(backing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(backing / "vm/disk.raw")

    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(DirectoryInventory, "_vm", no_descriptors)
    with pytest.raises(PrimaryIOError, match="Too many open files"):
        DirectoryInventory(backing).scan()


def test_ids_are_those_that_a_scan_gave(backing: Path) -> None:
    (backing / PRIVATE_DIR).mkdir()
    (backing / "link").symlink_to("nowhere")
    inventory = DirectoryInventory(backing)
    assert inventory.ids() == frozenset()
    make(backing / "a/disk.raw")
    make(backing / "b.raw")
    scanned = {vm.name: vm.id for vm in inventory.scan().vms}
    make(backing / "new.raw")
    subprocess.run(["cp", "-a", backing / "a", backing / "copy"], check=True)
    assert inventory.ids() == frozenset(scanned.values())
    assert VM_XATTR not in os.listxattr(backing / "new.raw")
    shutil.rmtree(backing / "a")
    assert inventory.ids() == {scanned["b"]}


def test_ids_that_cannot_be_told_are_an_error(backing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every VM would be taken for deleted."""
    inventory = DirectoryInventory(backing)
    with pytest.raises(PrimaryIOError, match="is what belongs there mounted"):
        inventory.ids()
    (backing / PRIVATE_DIR).mkdir()
    make(backing / "a.raw")
    with pytest.raises(PrimaryIOError, match="run this as root"):
        inventory.ids()
    inventory.scan()
    assert len(inventory.ids()) == 1
    (backing / "b").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", backing / "b"], check=True)
    try:
        with pytest.raises(PrimaryIOError, match=r"b in .* hides what is below it"):
            inventory.ids()
    finally:
        subprocess.run(["umount", backing / "b"], check=True)
    monkeypatch.setattr("vmfs_stub.inventory.directory._list_names", lambda fd: [PRIVATE_DIR, "a.raw", "gone"])
    with pytest.raises(PrimaryIOError, match="cannot read the backing directory"):
        inventory.ids()
    shutil.rmtree(backing)
    with pytest.raises(PrimaryIOError, match="cannot open"):
        inventory.ids()


# The memory of saved guests


class Failing(FileCalls):
    """Fails each call that is about ``name``."""

    def __init__(self, name: str, code: int) -> None:
        self.name = name
        self.code = code

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if args[0] == self.name:
            raise OSError(self.code, os.strerror(self.code))
        return function(*args, **kwargs)


def paths_of(vm: Vm) -> list[tuple[str, str]]:
    return [(file.path, file.relative) for file in vm.files]


@pytest.fixture
def saved(backing: Path) -> DirectoryInventory:
    """A directory, a file, and files of a group; of each there is a memory image, that of web is given to it."""
    make(backing / "db/disk.raw")
    make(backing / "web.raw")
    for name in ("db", "web", "group"):
        make(backing / f"save/{name}.save", 7)
    group = Group("group", "d" * 32)
    for number in (1, 2):
        path_fd = os.open(make(backing / f"part{number}.raw"), os.O_PATH)
        write_vm_id(path_fd, VmId("e" * 32), group=group)
        os.close(path_fd)
    return DirectoryInventory(backing, memory_dir="save")


def test_memory_images_are_files_of_the_vms_they_were_given_to(backing: Path, saved: DirectoryInventory) -> None:
    assert [(vm.name, len(vm.files)) for vm in saved.scan().vms] == [("db", 1), ("group", 2), ("web", 1)]
    for vm in saved.scan().vms:
        saved.give_memory(vm, f"{vm.name}.save")
    db, group, web = saved.scan().vms
    assert paths_of(db) == [("db/disk.raw", "disk.raw"), ("save/db.save", "db.save")]
    assert paths_of(web) == [("web.raw", "web.raw"), ("save/web.save", "web.save")]
    assert [path for path, _ in paths_of(group)] == ["part1.raw", "part2.raw", "save/group.save"]
    st = (backing / "save/db.save").stat()
    assert (db.files[-1].size, db.files[-1].ino) == (7, st.st_ino)
    assert saved.find("web.raw") == web
    assert (web.tops, db.tops, group.tops) == (("web.raw",), ("db",), ("part1.raw", "part2.raw"))
    (backing / "save/web.save").unlink()  # its guest goes on
    assert paths_of(saved.find("web")) == [("web.raw", "web.raw")]
    saved.protect(web, True)  # as it was found before
    assert saved.find("web").is_protected


def test_a_memory_image_is_the_vms_that_it_was_given_to_last_and_no_copys(
    backing: Path, saved: DirectoryInventory
) -> None:
    saved.give_memory(saved.find("web"), "db.save")
    saved.give_memory(saved.find("db"), "db.save")
    subprocess.run(["cp", "-a", backing / "save/db.save", backing / "save/copy.save"], check=True)
    assert [len(vm.files) for vm in saved.scan().vms] == [2, 2, 1]
    (backing / "save/db.save").unlink()
    make(backing / "save/db.save")  # saved anew: it is given anew
    assert len(saved.find("db").files) == 1
    saved.give_memory(saved.find("db"), "db.save")
    before = (backing / "save/db.save").stat()
    saved.give_memory(saved.find("db"), "db.save")
    assert (backing / "save/db.save").stat() == before
    shutil.rmtree(backing / "db")
    assert [vm.name for vm in saved.scan().vms] == ["group", "web"]


def test_a_file_of_the_vm_keeps_its_name(backing: Path, saved: DirectoryInventory) -> None:
    make(backing / "db/db.save", 3)
    saved.give_memory(saved.find("db"), "db.save")
    assert paths_of(saved.find("db")) == [("db/db.save", "db.save"), ("db/disk.raw", "disk.raw")]


def test_what_is_no_memory_image_is_nobodys(backing: Path, saved: DirectoryInventory) -> None:
    web = saved.find("web")
    make(backing / "save/web.save.d/deeper")
    (backing / "save/link.save").symlink_to("../web.raw")
    for image in ("gone.save", "web.save.d", "link.save"):
        saved.give_memory(web, image)
    assert saved.find("web") == web
    saved.give_memory(web, "web.save")
    assert len(saved.find("web").files) == 2  # whatever else is there


def test_without_such_a_directory_nothing_is_given(backing: Path) -> None:
    make(backing / "db/disk.raw")
    make(backing / "save/db.save")
    plain = DirectoryInventory(backing)
    db = plain.find("db")
    plain.give_memory(db, "db.save")
    assert VM_XATTR not in os.listxattr(backing / "save/db.save")
    assert [vm.name for vm in plain.scan().vms] == ["db", "save"]
    absent = DirectoryInventory(backing, memory_dir="absent")
    absent.give_memory(db, "db.save")
    assert [vm.name for vm in absent.scan().vms] == ["db", "save"]


@pytest.mark.parametrize("name", ["save", "db.save"])
def test_memory_that_cannot_be_read_is_left_out_and_hides_no_other(
    backing: Path, saved: DirectoryInventory, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for vm in saved.scan().vms:
        saved.give_memory(vm, f"{vm.name}.save")
    failing = DirectoryInventory(backing, files=Failing(name, errno.EIO), memory_dir="save")
    assert [len(vm.files) for vm in failing.scan().vms] == ([1, 2, 1] if name == "save" else [1, 3, 2])
    (message,) = caplog.messages
    assert "Input/output error" in message
    vanished = DirectoryInventory(backing, files=Failing("db.save", errno.ENOENT), memory_dir="save")
    assert [len(vm.files) for vm in vanished.scan().vms] == [1, 3, 2]
    assert len(caplog.messages) == 1
    with pytest.raises(PrimaryIOError, match="Input/output error"):
        failing.give_memory(failing.find("db"), "db.save")
    short = DirectoryInventory(backing, files=Failing(name, errno.EMFILE), memory_dir="save")
    with pytest.raises(PrimaryIOError, match="Too many open files"):
        short.scan()


def test_memory_that_cannot_be_marked_is_an_error(backing: Path, saved: DirectoryInventory) -> None:
    class Refusing(FileCalls):
        def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if site == "inventory.identify":
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return function(*args, **kwargs)

    refusing = DirectoryInventory(backing, files=Refusing(), memory_dir="save")
    with pytest.raises(Unsupported, match=r"trusted\.\*"):
        refusing.give_memory(saved.find("web"), "web.save")


def test_memory_images_have_no_ids_of_their_own(backing: Path, saved: DirectoryInventory) -> None:
    """Commands ask for ids, and know of no directory of memory images."""
    (backing / PRIVATE_DIR).mkdir()
    ids = {vm.name: vm.id for vm in saved.scan().vms}
    saved.give_memory(saved.find("web"), "web.save")
    assert DirectoryInventory(backing).ids() == saved.ids() == frozenset(ids.values())
    (backing / "web.raw").unlink()
    assert DirectoryInventory(backing).ids() == saved.ids() == {ids["db"], ids["group"]}


def test_where_there_is_memory_alone_there_are_no_vms(backing: Path) -> None:
    """And not such as nobody may read."""
    (backing / PRIVATE_DIR).mkdir()
    make(backing / "save/gone.save")
    inventory = DirectoryInventory(backing, memory_dir="save")
    assert inventory.scan().vms == ()
    assert inventory.ids() == frozenset()
    make(backing / "new.raw")
    with pytest.raises(PrimaryIOError, match="run this as root"):
        inventory.ids()
    (backing / "new.raw").unlink()
    was_vm = DirectoryInventory(backing).find("save")
    assert inventory.ids() == {was_vm.id}


def test_a_directory_with_other_files_has_not_memory_alone(backing: Path) -> None:
    inventory = DirectoryInventory(backing)
    assert inventory.has_only("missing", ".save")
    make(backing / "save/a.save")
    assert inventory.has_only("save", ".save")
    make(backing / "save/disk.raw")
    assert not inventory.has_only("save", ".save")
    make(backing / "file.save")
    assert not inventory.has_only("file.save", ".save")
