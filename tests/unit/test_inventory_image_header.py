"""The heads of images: what QEMU writes is understood; what a guest makes up never passes for one without a base."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from vmfs_stub.inventory.image_header import HEAD_BYTES, RAW, is_asked, local_names, read_header


def made(path: Path, *words: str) -> bytes:
    """The head of an image that qemu-img makes at ``path``."""
    command = ["qemu-img", "create", "-q", *words[:-1], str(path), *words[-1:]]
    for _ in range(12):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # Where the kernel counts processor time in ticks, LUKS often finds that it took none, and gives up.
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("clusters", ["512", "65536", "2097152"])
def test_what_qemu_img_makes_is_understood(tmp_path: Path, compat: str, clusters: str) -> None:
    options = f"compat={compat},cluster_size={clusters}"
    assert made(tmp_path / "base.raw", "-f", "raw", "3M") == bytes(HEAD_BYTES)
    plain = read_header(made(tmp_path / "plain.qcow2", "-f", "qcow2", "-o", options, "3M"))
    assert (plain.format, plain.base, plain.problem) == ("qcow2", None, "")
    base = ("-b", "base.raw", "-F", "raw")
    overlay = read_header(made(tmp_path / "over.qcow2", "-f", "qcow2", "-o", options, *base, "3M"))
    assert (overlay.base, overlay.problem) == ("base.raw", "")
    assert overlay.data_file is None


def test_a_data_file_is_seen_and_encryption_hides_no_base(tmp_path: Path) -> None:
    data = read_header(made(tmp_path / "with.qcow2", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data.raw'}", "1M"))
    assert data.data_file == str(tmp_path / "data.raw")
    made(tmp_path / "base.raw", "-f", "raw", "1M")
    secret = ("--object", "secret,id=s,data=abc")
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=s", "-b", "base.raw", "-F", "raw")
    head = read_header(made(tmp_path / "luks.qcow2", *secret, "-f", "qcow2", *options, "1M"))
    assert (head.base, head.problem) == ("base.raw", "")


def test_a_base_named_by_json_is_understood(tmp_path: Path) -> None:
    made(tmp_path / "base.qcow2", "-f", "qcow2", "1M")
    named = "json:" + json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "base.qcow2")}}
    )
    head = read_header(made(tmp_path / "over.qcow2", "-f", "qcow2", "-b", named, "-F", "qcow2", "1M"))
    assert head.base is not None
    assert local_names(head.base) == (str(tmp_path / "base.qcow2"),)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("base.img", ("base.img",)),
        ("/a/b:c.img", ("/a/b:c.img",)),
        ("file:base.img", ("base.img",)),
        ("nbd://host/x", ()),
        ("json:" + json.dumps({"file.filename": "/a", "backing": {"file": {"filename": "file:/b"}}}), ("/a", "/b")),
        ("json:" + json.dumps({"driver": "quorum", "children": [{"file": {"filename": "x"}}]}), ("x",)),
    ],
)
def test_names_of_bases(name: str, found: tuple[str, ...]) -> None:
    assert local_names(name) == found


@pytest.mark.parametrize("name", ["json:", "json:{", 'json:{"file": "node3"}', "json:" + "[" * 1000])
def test_a_name_that_is_not_understood_is_said_to_be(name: str) -> None:
    with pytest.raises(ValueError, match=r"base"):
        local_names(name)


def header(**changes: int) -> bytes:
    """A head of version 3 with a base, and with fields as they are given."""
    fields = {
        "magic": 0x514649FB, "version": 3, "at": 0x1F0, "length": 4, "bits": 16, "size": 1 << 20, "crypt": 0, "l1": 1,
        "l1_at": 0x30000, "refcounts": 0x10000, "clusters": 1, "snapshots": 0, "snapshots_at": 0,
        "features": 0, "compatible": 0, "auto": 0, "order": 4, "header": 112,
    } | changes  # fmt: skip
    return struct.pack(">IIQIIQIIQQIIQQQQII", *fields.values()).ljust(0x1F0, b"\0") + b"base"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": 4},
        {"bits": 8},
        {"bits": 22},
        {"length": 1024},
        {"at": 1 << 20},
        {"at": 2**63},
        {"crypt": 3},
        {"header": 50},
        {"header": 1 << 20},
        {"bits": 21, "at": 70_000},
    ],
)
def test_a_head_that_is_not_understood_is_never_one_without_a_base(changes: dict[str, int]) -> None:
    assert read_header(header()).base == "base"
    found = read_header(header(**changes))
    assert found.problem
    assert found.format == "qcow2"


def test_every_cut_is_a_problem_or_has_the_base() -> None:
    whole = header()
    for length in range(4, len(whole)):
        assert read_header(whole[:length]).problem


def test_other_formats_with_bases_are_not_taken_for_raw() -> None:
    assert read_header(b"QED\0" + bytes(100)).problem
    assert read_header(b"KDMV" + bytes(508) + b'parentFileNameHint="a.vmdk"').problem
    assert read_header(b"anything else") is RAW


def test_a_disk_that_domains_say_is_raw_is_never_asked() -> None:
    """Its guest can write any head."""
    assert not is_asked("a.qcow2", {"raw"})
    assert is_asked("a.raw", {"qcow2"})
    assert is_asked("a.raw", {"raw", "qcow2"})
    assert is_asked("vm/disk.img", ())
    assert not is_asked("vm/disk.RAW", ())
