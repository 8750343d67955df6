"""Every call on every kind of path, by root and by others: the same result or errno as on a plain directory.

After a call that succeeded the whole tree is compared too, and made anew.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from places import Places
from plain_comparison import acting_as, outcome, status

from vmfs_stub.mount import syscalls

Call = Callable[[str], object]
PairCall = Callable[[str, str], object]

USER = 1000
ELSEWHERE = "/dev/shm"
"""Another filesystem."""

NEW_NAMES = ("absent", "readonly/new", "sticky/new", "closed/new", "mine/new", "n" * 255, "n" * 256)
PATHS = (
    *NEW_NAMES,
    "file",
    "theirs",
    "empty",
    "full",
    "fifo",
    "to_file",
    "to_directory",
    "dangling",
    "loop",
    "one",
    "closed/file",
    "readonly/file",
    "sticky/file",
    "sticky/theirs",
    "mine/file",
    "setid",
    "setid_of_root",
    # what is no name of a thing, or leads through one that is no directory
    "",
    ".",
    "..",
    "full/.",
    "full/..",
    "file/",
    "empty/",
    "absent/",
    "to_file/",
    "to_directory/",
    "dangling/",
    "loop/",
    "file/below",
    "absent/below",
    "fifo/below",
    "to_file/below",
    "to_directory/file",
    "dangling/below",
    "loop/below",
    "one/below",
    "empty/" + "n" * 256,
    "./" * 2047 + "f",
    "./" * 2048 + "f",
    "n" * 5000,
)


def plant(top: Path) -> None:
    """The tree that the calls meet; ``theirs`` and ``mine`` belong to the other user."""
    (top / "file").write_text("text")
    (top / "theirs").write_text("theirs")
    os.chown(top / "theirs", USER, USER)
    for name, mode in (("empty", 0o755), ("full", 0o755), ("closed", 0o700), ("readonly", 0o755), ("mine", 0o755)):
        (top / name).mkdir()
        (top / name).chmod(mode)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    for name in ("full", "closed", "readonly", "sticky", "mine"):
        (top / name / "file").write_text(name)
        (top / name / "file").chmod(0o644)
    (top / "sticky/theirs").write_text("theirs")
    os.chown(top / "sticky/theirs", USER, USER)
    os.chown(top / "mine", USER, USER)
    os.mkfifo(top / "fifo", 0o640)
    for name, uid in (("setid", USER), ("setid_of_root", 0)):
        (top / name).write_text("set")
        os.chown(top / name, uid, uid)
        (top / name).chmod(0o6755)
    for name, target in (
        ("to_file", "file"),
        ("to_directory", "full"),
        ("dangling", "nowhere"),
        ("loop", "loop"),
        ("one", "two"),
        ("two", "one"),
    ):
        (top / name).symlink_to(target)


def snapshot(top: Path) -> list[object]:
    """All names below, with what stat tells (but for the size of directories, which keep room for what was there)."""
    found: list[object] = []
    for path in sorted(top.rglob("*")):
        mode, links, uid, gid, size, device = status(path)
        content: object = None
        if stat.S_ISLNK(mode):
            content = str(path.readlink())
        elif stat.S_ISREG(mode):
            content = path.read_bytes()[:100]
        shown = None if stat.S_ISDIR(mode) else size
        found.append((str(path.relative_to(top)), oct(mode), links, uid, gid, shown, device, content))
    return found


def opened(flags: int, path: str) -> object:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    try:
        return status(fd)[0]
    finally:
        os.close(fd)


def remove_tree(top: Path) -> None:
    for path in top.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def stat_mode(path: str) -> object:
    return oct(os.stat(path).st_mode)  # noqa: PTH116 - of a path as it is written


def listed(path: str) -> object:
    names = os.listdir(path)  # noqa: PTH208 - of a path as it is written
    return None if path == ".." else sorted(names)


READING: dict[str, Call] = {
    "stat": stat_mode,
    "lstat": lambda path: oct(os.lstat(path).st_mode),
    "readlink": os.readlink,
    "access": lambda path: [os.access(path, kind, effective_ids=True) for kind in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
    "listdir": listed,
    "open to read": partial(opened, os.O_RDONLY),
    "open to write": partial(opened, os.O_WRONLY),
    "open for both": partial(opened, os.O_RDWR),
    "open a directory": partial(opened, os.O_RDONLY | os.O_DIRECTORY),
    "open no link": partial(opened, os.O_RDONLY | os.O_NOFOLLOW),
    "open a path": partial(opened, os.O_PATH),
    "getxattr": lambda path: os.getxattr(path, "user.x"),
    "listxattr": os.listxattr,
    "statvfs": lambda path: os.statvfs(path).f_namemax,
    "open directly": partial(opened, os.O_RDONLY | os.O_DIRECT),
}
"""Calls that change nothing, but for times."""
CHANGING: dict[str, Call] = {
    "open and cut": partial(opened, os.O_WRONLY | os.O_TRUNC),
    "create": partial(opened, os.O_CREAT | os.O_WRONLY),
    "create and read": partial(opened, os.O_CREAT | os.O_RDONLY),
    "create or cut": partial(opened, os.O_CREAT | os.O_WRONLY | os.O_TRUNC),
    "create only": partial(opened, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
    "create no link": partial(opened, os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY),
    "create without access": lambda path: os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0)),
    "mkdir": lambda path: os.mkdir(path, 0o750),  # noqa: PTH102
    "mkfifo": lambda path: os.mkfifo(path, 0o640),
    "mknod of a file": lambda path: os.mknod(path, stat.S_IFREG | 0o640),
    "mknod of a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o640, os.makedev(1, 3)),
    "mknod of nonsense": lambda path: os.mknod(path, stat.S_IFDIR | 0o640),
    "symlink": partial(os.symlink, "target"),
    "symlink to nothing": partial(os.symlink, ""),
    "symlink to much": partial(os.symlink, "t" * 4096),
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "truncate": lambda path: os.truncate(path, 2),
    "truncate up": lambda path: os.truncate(path, 9000),
    "truncate below 0": lambda path: os.truncate(path, -1),
    "truncate beyond all": lambda path: os.truncate(path, (1 << 63) - 1),
    "chmod": lambda path: os.chmod(path, 0o2770),  # noqa: PTH101
    "chmod with sticky": lambda path: os.chmod(path, 0o1777),  # noqa: PTH101
    "chown to another": lambda path: os.chown(path, 1234, 1235),
    "chown to the user's group": lambda path: os.chown(path, -1, USER),
    "chown to nobody": lambda path: os.chown(path, -1, -1),
    "lchown": lambda path: os.lchown(path, 77, 78),
    "utime now": os.utime,
    "utime": lambda path: os.utime(path, ns=(5, 6)),
    "utime of a link": lambda path: os.utime(path, ns=(5, 6), follow_symlinks=False),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "setxattr, trusted": lambda path: os.setxattr(path, "trusted.x", b"1"),
    "removexattr": lambda path: os.removexattr(path, "user.x"),
}


def link(old: str, new: str) -> object:
    return os.link(old, new, follow_symlinks=False)


def link_followed(old: str, new: str) -> object:
    return os.link(old, new, follow_symlinks=True)


def renamed(flags: int, old: str, new: str) -> object:
    at = os.open(".", os.O_PATH)
    try:
        return syscalls.rename(at, os.fsencode(old), at, os.fsencode(new), flags=flags)
    finally:
        os.close(at)


PAIR_CALLS: dict[str, PairCall] = {
    "link": link,
    "link of what is meant": link_followed,
    "rename": partial(renamed, 0),
    "rename without replacing": partial(renamed, syscalls.RENAME_NOREPLACE),
    "exchange": partial(renamed, syscalls.RENAME_EXCHANGE),
}
PAIRED_BY_ROOT = (
    "file",
    "empty",
    "full",
    "full/file",
    "to_file",
    "dangling",
    "loop/x",
    "absent",
    "absent/x",
    "file/x",
    "empty/below",
    "full/below",
    "n" * 256,
    "empty/",
    "absent/",
    ".",
    "",
    f"{ELSEWHERE}/vmfs-stub-not-there",
)
PAIRED_BY_OTHERS = (
    "file",
    "theirs",
    "empty",
    "absent",
    "closed/file",
    "sticky/file",
    "sticky/theirs",
    "readonly/file",
    "mine/file",
    "mine/new",
)


EXPECTED = {f"chown to nobody by {USER}": frozenset({"setid_of_root"})}
"""Differences that docs/SEMANTICS.md names."""


def run(top: Path, calls: list[Callable[[], object]], *, uid: int, is_changing: bool) -> list[object]:
    """Outcomes of ``calls`` in a tree that is whole before each; with the tree, where something was changed."""
    found: list[object] = []
    before = Path.cwd()
    os.chdir(top)
    try:
        plant(top)
        whole = snapshot(top)
        for call in calls:
            with acting_as(uid):
                got = outcome(call)
            has_failed = isinstance(got, str) and got.startswith("E")
            after = None if has_failed or not is_changing else snapshot(top)
            found.append((got, after))
            if after is not None and after != whole:
                remove_tree(top)
                plant(top)
        assert is_changing or snapshot(top) == whole
    finally:
        os.chdir(before)
    return found


def assert_same(
    places: Places, name: str, calls: dict[str, Callable[[], object]], *, uid: int, is_changing: bool = True
) -> None:
    mounted, plain = places.results(name, lambda top: run(top, list(calls.values()), uid=uid, is_changing=is_changing))
    assert isinstance(mounted, list)
    assert isinstance(plain, list)
    found = {what: (one, other) for what, one, other in zip(calls, mounted, plain, strict=True) if one != other}
    expected = EXPECTED.get(name, frozenset())
    differing = {what: pair for what, pair in found.items() if what not in expected}
    assert differing == {}
    assert found.keys() == expected  # else docs/SEMANTICS.md can have a line less
    places.assert_no_bugs()


@pytest.mark.parametrize("uid", (0, USER, USER + 1))
def test_looking_at_each_kind_of_path(places: Places, uid: int) -> None:
    calls = {f"{name} {path[:60]}": partial(READING[name], path) for name in READING for path in PATHS}
    assert_same(places, f"looking by {uid}", calls, uid=uid, is_changing=False)


@pytest.mark.parametrize("uid", (0, USER))
@pytest.mark.parametrize("name", CHANGING)
def test_a_change_of_each_kind_of_path(places: Places, name: str, uid: int) -> None:
    calls = {path[:60]: partial(CHANGING[name], path) for path in PATHS}
    assert_same(places, f"{name} by {uid}", calls, uid=uid)


@pytest.mark.parametrize("uid", (0, USER))
@pytest.mark.parametrize("name", PAIR_CALLS)
def test_a_call_on_each_pair_of_paths(places: Places, name: str, uid: int) -> None:
    chosen = PAIRED_BY_OTHERS if uid else PAIRED_BY_ROOT
    calls = {f"{old[:20]} to {new[:20]}": partial(PAIR_CALLS[name], old, new) for old in chosen for new in chosen}
    assert_same(places, f"{name} by {uid}", calls, uid=uid)


def test_a_difference_would_be_noticed(places: Places) -> None:
    def only_mounted() -> object:
        return os.mkdir("differs") if "/mount/" in os.getcwd() else None  # noqa: PTH102, PTH109

    with pytest.raises(AssertionError, match="differs"):
        assert_same(places, "planted", {"mkdir": only_mounted}, uid=0)
