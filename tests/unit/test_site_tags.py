"""Every file call carries a site tag, and what needs none says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.site_tags import Source

EXEMPT = {
    "catalog/catalog.py:in_memory": "no file",
    "catalog/catalog.py:_prepare": "the schema, which is a part of the program",
    "cli/": "a command of its own, of which an operator sees the outcome",
    "config/file.py": "read before anything is touched",
    "control/": "the socket and its place in the runtime directory",
    "daemon.py": "the copy of the store's description; unit/test_daemon_store_copy.py fails each",
    "datastore.py:__init__": "whether recalls are held: a file of our own in the runtime directory",
    "datastore_backups.py:__init__": "whether backup jobs are paused: a file of our own in the private directory",
    "inventory/libvirt_binding.py:has_socket": "whether libvirt has its socket; no file of ours",
    "mount/mountpoint.py": "where the mount goes, before it is there",
    "mount/session.py": "the kernel's end of the mount",
    "mover/shared_slots.py": "memory that two processes share; no filesystem is behind it",
    "paced_io.py:resume_read_ahead": "sets a flag in memory",
    "primary/file_lock.py": "a lock; contract/test_movers.py and unit/test_daemon_start.py fail its only call",
    "primary/identity.py:_as_seen_by_init": "/proc; what cannot be seen there is looked at from here",
    "primary/read_ring.py": "memory that is shared with the kernel; the reads themselves are tagged",
    "primary/serving_mark.py:this": "the machine's id, whose absence changes little",
    "services/datastore_lock.py": "the lock's place, before anything is looked at; unit/test_daemon_start.py fails it",
    "store/cache_file.py": "of commands of their own, whose tests damage it; the chunk index opens it under a site",
    "store/key_sources.py": "read or made before anything is opened; unit/test_store_keys.py",
    "store/local.py": "behind the store's own sites; fault/test_store_files.py fails each of its calls",
}


def planted(tmp_path: Path, text: str) -> Source:
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    return Source(tmp_path)


def test_every_file_call_has_a_site_tag() -> None:
    assert [str(mention) for mention in Source(exempt=EXEMPT).untagged()] == []


def test_nothing_is_exempt_that_need_not_be() -> None:
    for where in EXEMPT:
        others = {other: why for other, why in EXEMPT.items() if other != where}
        assert Source(exempt=others).untagged(), f"{where} needs no exemption"


def test_every_site_is_written_out() -> None:
    tags = Source(exempt=EXEMPT).tags
    assert len(tags) > 80
    assert "archive.punch" in tags


@pytest.mark.parametrize(
    "line",
    [
        "os.unlink(path)",
        "path.unlink()",
        "fd = os.open(path, 0)",
        "fd = open(path)",
        "fd = path.open('rb')",
        "shutil.rmtree(path)",
        "memory = mmap.mmap(fd, 10)",
        "_libc.syncfs(fd)",
        "threads.files(os.fsync, fd)",
        "later = partial(os.fsync, fd)",
        "(base / 'x').write_bytes(b'')",
        "files.call('a.b', os.close, os.open(path, 0)) or os.unlink(path)",
        "[os.stat(name) for name in names]",
        "action = lambda: os.truncate(fd, 0)",
        "database = sqlite3.connect(path)",
        "call(os.fsync, fd)",
    ],
)
def test_a_call_without_a_tag_is_found(line: str, tmp_path: Path) -> None:
    (found,) = planted(tmp_path, f"def f():\n    {line}\n").untagged()
    assert (found.path, found.line) == ("a.py", 2)


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    files.call('a.b', os.unlink, path)",
        "def f():\n    files.call('a.b', path.unlink, missing_ok=True)",
        "def f():\n    return threads.files(files.call, 'a.b', os.pread, fd, 1, 0)",
        "def f():\n    files.call('a.b', g, 1)\ndef g(fd):\n    h(fd)\ndef h(fd):\n    os.fsync(fd)",
        "def f():\n    files.call('a.b', os.fsync if all else os.fdatasync, fd)",
        "async def f():\n    await filesystem.unlink(1)\n    Path('/proc/1/exe').readlink()\n    os.close(1)",
        "def f(site):\n    files.call(site, os.fsync, fd)\ndef g():\n    f('a.b')",
    ],
)
def test_a_call_with_a_tag_or_without_need_is_not(text: str, tmp_path: Path) -> None:
    assert planted(tmp_path, text).untagged() == []


def test_a_function_that_is_also_called_without_a_tag_is_found(tmp_path: Path) -> None:
    source = planted(tmp_path, "def f():\n    files.call('a.b', g)\ndef g():\n    os.sync()\ndef h():\n    g()\n")
    assert [mention.line for mention in source.untagged()] == [4]


def test_a_site_that_is_not_written_out_is_refused(tmp_path: Path) -> None:
    source = planted(tmp_path, "def f(name, site):\n    g(site, 1)\ndef g(site, x):\n    pass\ng('a' + name, 1)\n")
    with pytest.raises(ValueError, match="a\\.py:5"):
        _ = source.tags


def test_tags_are_found_wherever_they_are_given(tmp_path: Path) -> None:
    source = planted(
        tmp_path,
        "def f(files, site, fd): ...\ndef walk(fd, *, site): ...\n"
        "f(files, 'a.f', 1)\nwalk(1, site='a.walk')\n"
        "threads.files(files.call, 'a.handed', g)\nthreads.files(f, files, 'a.handed_f', 1)\nfiles.call('a.call', g)\n",
    )
    assert sorted(source.tags) == ["a.call", "a.f", "a.handed", "a.handed_f", "a.walk"]
