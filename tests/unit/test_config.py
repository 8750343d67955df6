"""The configuration is read in full or refused with file, line and key."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from vmfs_stub.config import DEFAULT_CONFIG_PATH, config_path, load_config, parse_bytes, parse_config
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.retention import Retention

MINIMAL = """\
[datastore]
name = "main"
backing = "/srv/backing"
mountpoint = "/srv/vms"

[store]
url = "file:///srv/store"
"""


def test_defaults_and_derived_paths() -> None:
    config = parse_config(MINIMAL, origin="c.toml")
    assert config.recall.recall_deadline_s == 25
    assert config.archive.enabled is False
    assert config.archive.resident_head_bytes == config.archive.resident_tail_bytes == 1 << 20
    assert config.archive.placeholder_bytes_min == 8 << 20
    assert config.retention.rules.keeps_all
    assert config.retention.keep_deleted_days is None
    assert config.datastore.runtime_dir == Path("/run/vmfs-stub/main")
    assert config.socket_path == Path("/run/vmfs-stub/main/control.sock")
    assert config.warnings == ()


def test_it_cannot_be_changed() -> None:
    config = parse_config(MINIMAL, origin="c.toml")
    with pytest.raises(ValidationError):
        config.recall.recall_deadline_s = 99


def test_copies_are_as_many_as_there_are_places() -> None:
    assert parse_config(MINIMAL, origin="c.toml").min_copies == 1
    with_replica = MINIMAL + '[replica]\nurl = "file:///srv/replica"\n'
    assert parse_config(with_replica, origin="c.toml").min_copies == 2
    for copies in (1, 2):
        text = f"{with_replica}[archive]\nmin_copies = {copies}\n"
        assert parse_config(text, origin="c.toml").min_copies == copies


def test_sizes_may_have_units() -> None:
    config = parse_config(MINIMAL + '[archive]\nresident_head_bytes = "4 MiB"\n', origin="c.toml")
    assert config.archive.resident_head_bytes == 4 << 20
    assert parse_bytes("512") == 512
    with pytest.raises(ConfigError, match="not a size"):
        parse_config(MINIMAL + '[archive]\nresident_head_bytes = "4 megs"\n', origin="c.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recall]\nrecall_dedline_s = 3\n", r"c\.toml:10: recall\.recall_dedline_s: no such key"),
        ("[recal]\nx = 3\n", r"c\.toml:9: recal: no such key"),
        ("[recall]\n\nrecall_deadline_s = -1\n", r"c\.toml:11: recall\.recall_deadline_s: .*greater than 0"),
        ("[recall]\nrecall_bytes_max = -1\n", r"c\.toml:10: recall\.recall_bytes_max: .*greater"),
        ("[retention]\nkeep_daily = -1\n", r"c\.toml:10: retention\.keep_daily: .*greater"),
        ("[retention]\nkeep_deleted_days = 0\n", r"c\.toml:10: retention\.keep_deleted_days: .*greater"),
        ("[archive]\nmin_copies = 3\n", r"c\.toml:10: archive\.min_copies: .*less"),
        ("[archive]\nmin_copies = 2\n", r"c\.toml: archive\.min_copies is 2, and there is no second place"),
        ('[replica]\nurl = "file:///srv/store"\n', r"c\.toml: replica\.url is that of the store"),
        ('[replica]\nurl = "s3://b/p"\naccess_key_id = "a"\n', r"c\.toml:9: replica: .*go together"),
        ("recall = nope\n", r"c\.toml: not valid TOML: .*line 9"),
        ('[control]\nsocket = "rel/sock"\n', r"c\.toml:10: control\.socket: must be an absolute path"),
    ],
)
def test_errors_name_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL + "\n" + text, origin="c.toml")


def test_retention_has_all_rules() -> None:
    text = "[retention]\n" + "".join(f"{each.name} = {n}\n" for n, each in enumerate(fields(Retention), start=1))
    config = parse_config(f"{MINIMAL}{text}keep_deleted_days = 30\n", origin="c.toml")
    assert config.retention.rules == Retention(1, 2, 3, 4, 5, 6)
    assert config.retention.keep_deleted_days == 30


def test_every_error_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config('[datastore]\nname = "a/b"\nbacking = "x"\n', origin="c.toml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "datastore.name",
        "datastore.backing",
        "datastore.mountpoint",
        "store",
    ]
    assert lines[2].endswith("is missing")


@pytest.mark.parametrize(
    ("backing", "mountpoint", "message"),
    [
        ("/srv/a", "/srv/a/", "must not be the same"),
        ("/srv/a", "/srv/a/b", r"mountpoint \(/srv/a/b\) must not lie in backing"),
        ("/srv/a/b", "/srv/a", r"backing \(/srv/a/b\) must not lie in mountpoint"),
    ],
)
def test_directories_are_apart(backing: str, mountpoint: str, message: str) -> None:
    text = MINIMAL.replace("/srv/backing", backing).replace("/srv/vms", mountpoint)
    with pytest.raises(ConfigError, match=message):
        parse_config(text, origin="c.toml")


def test_a_deadline_beyond_the_guests_is_warned_of() -> None:
    config = parse_config(MINIMAL + "[recall]\nrecall_deadline_s = 30\n", origin="c.toml")
    assert len(config.warnings) == 1
    assert "recall_deadline_s" in config.warnings[0]


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMFS_STUB_CONFIG", raising=False)
    assert config_path(None) == DEFAULT_CONFIG_PATH
    monkeypatch.setenv("VMFS_STUB_CONFIG", str(tmp_path / "env.toml"))
    assert config_path(None) == tmp_path / "env.toml"
    assert config_path(Path("/x.toml")) == Path("/x.toml")
    with pytest.raises(ConfigError, match=r"env\.toml: no such file.*init"):
        load_config(config_path(None))
    (tmp_path / "env.toml").write_text(MINIMAL)
    assert load_config(config_path(None)).datastore.name == "main"
    (tmp_path / "env.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(config_path(None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "9" * 5_000, "not valid TOML"),
        ("x = " + "[" * 5_000 + "]" * 5_000, "nested too deeply"),
        ('[recall]\nrecall_bytes_max = "' + "9" * 4_290 + ' TiB"', "not a size"),
        ("[recall]\nrecall_bytes_max = " + "9" * 20, "less than or equal"),
        ('[recall]\nrecall_bytes_max = "9000000000000000000 TiB"', "less than or equal"),
        ('[control]\nsocket = "/run/a\\u0000b"', "NUL"),
    ],
)
def test_what_no_configuration_needs_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL + "\n" + text + "\n", origin="c.toml")


@pytest.mark.parametrize(
    "text",
    [
        '[recall]\nrecall_bytes_max = "1' + " " * 50_000 + '!"',
        "x" + ".y" * 30_000 + " = 1",
        ("x" + ".y" * 128 + " = 1\n") * 800,
        'x = """\n[' + " " * 50_000 + '\n"""',
        "[recall]\n" + "\n".join(f"x{number} = 1" for number in range(5_000)),
    ],
)
def test_a_refusal_takes_no_long_time(text: str) -> None:
    started_s = time.process_time()
    with pytest.raises(ConfigError):
        parse_config(text + "\n", origin="c.toml")
    assert time.process_time() - started_s < 1


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(path)


@pytest.mark.parametrize(("text", "enabled"), [('"auto"', "auto"), ("true", True), ("false", False)])
def test_whether_libvirt_is_used(text: str, enabled: object) -> None:
    assert parse_config(f"{MINIMAL}[libvirt]\nenabled = {text}\n", origin="c.toml").libvirt.enabled == enabled
    with pytest.raises(ConfigError, match="enabled"):
        parse_config(f'{MINIMAL}[libvirt]\nenabled = "perhaps"\n', origin="c.toml")
