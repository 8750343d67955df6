"""The configuration is read in full or refused with file, line and key."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from vmfs_stub.config import DEFAULT_CONFIG_PATH, config_path, load_config, parse_config
from vmfs_stub.config.values import parse_bytes
from vmfs_stub.core.errors import ConfigError
from vmfs_stub.core.policy import DEFAULT_RULE, Idleness, Match, Policy, Rule, WhenRunning
from vmfs_stub.core.retention import Retention
from vmfs_stub.core.usage import DAY_S

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
        ("[recall]\nrecall_dedline_s = 3\n", r"c\.toml:10:1: recall\.recall_dedline_s: no such key"),
        ("[recal]\nx = 3\n", r"c\.toml:9:2: recal: no such key"),
        ("[recall]\n\nrecall_deadline_s = -1\n", r"c\.toml:11:21: recall\.recall_deadline_s: .*greater than 0"),
        ("[recall]\nrecall_bytes_max = -1\n", r"c\.toml:10:20: recall\.recall_bytes_max: .*greater"),
        ("[retention]\nkeep_daily = -1\n", r"c\.toml:10:14: retention\.keep_daily: .*greater"),
        ("[retention]\nkeep_deleted_days = 0\n", r"c\.toml:10:21: retention\.keep_deleted_days: .*greater"),
        ("[archive]\nmin_copies = 3\n", r"c\.toml:10:14: archive\.min_copies: .*less"),
        ("[archive]\nmin_copies = 2\n", r"c\.toml: archive\.min_copies is 2, and there is no second place"),
        ('[replica]\nurl = "file:///srv/store"\n', r"c\.toml: replica\.url is that of the store"),
        ('[monitoring]\nlisten = "localhost:1"\n', r"c\.toml:10:10: monitoring\.listen: 'localhost' is no IP address"),
        (
            '[monitoring]\nlisten = "127.0.0.1"\n',
            r"c\.toml:10:10: monitoring\.listen: must be an IP address and",
        ),
        ('[replica]\nurl = "s3://b/p"\naccess_key_id = "a"\n', r"c\.toml:9:2: replica: .*go together"),
        ("recall = nope\n", r"c\.toml:9:10: not valid TOML: Invalid value$"),
        ('x = "', r"c\.toml:9:6: not valid TOML: Expected.*|c\.toml:9:6: .*Unterminated string"),
        ('"a\\nb" = 1\n', r"c\.toml:9:1: store\.a\\nb: no such key"),
        ("[policy]\nrule = 1\n", r"c\.toml:10:1: policy\.rule: no such key"),
        ("policy.archives_per_job_max = -1\n", r"c\.toml:9:1: store\.policy: no such key"),
        ("[policy]\nrecalled_for_min = '7 dayz'\n", r"c\.toml:10:20: policy\.recalled_for_min: not a length of time"),
        ("[policy]\nunused_for_min = 3\n", r"c\.toml:10:18: policy\.unused_for_min: must be at least"),
        ("[policy]\nhigh_watermark_percent = 80\nlow_watermark_percent = 81\n", r"c\.toml:9:2: policy: low_w"),
        ('[control]\nsocket = "rel/sock"\n', r"c\.toml:10:10: control\.socket: must be an absolute path"),
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
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_config(tmp_path)
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


def test_metrics_for_everybody_are_a_warning() -> None:
    for listen, expected in (("127.0.0.1:9640", 0), ("[::1]:9640", 0), ("0.0.0.0:9640", 1), ("10.1.2.3:9640", 1)):
        config = parse_config(MINIMAL + f'[monitoring]\nlisten = "{listen}"\n', origin="c.toml")
        assert len(config.warnings) == expected, listen


RULES = (
    MINIMAL
    + """
[policy]
archives_per_job_max = 3
recalled_for_min = "36h"
high_watermark_percent = 85
low_watermark_percent = 80.5

[[policy.rules]]   # the lab
name = "lab"
names = ["lab-*", "test?"]
metadata = { group = "lab", "a.b" = "c" }
idle = { window = "2d", share = 0.9, cpu_percent_max = 2, disk_bytes_per_s_max = "1 MiB" }
when_running = "shutdown"
target = "90s"

[[policy.rules]]
name = "kept"
paths = ["keep/*"]
size_min = "1 GiB"
size_max = "2 GiB"
archive = false

[[policy.rules]]
name = "rest"
off_for = "14d"
not_started_for = 5184000
point_age_max = "30m"
[policy.rules.idle]
window = "14d"
"""
)


def test_policy() -> None:
    assert parse_config(MINIMAL, origin="c.toml").archive_policy == Policy((DEFAULT_RULE,))
    assert parse_config(RULES, origin="c.toml").archive_policy == Policy(
        (
            Rule(
                "lab",
                Match(("lab-*", "test?"), metadata={"group": "lab", "a.b": "c"}),
                idle=Idleness(2 * DAY_S, 0.9, 2.0, 1 << 20),
                when_running=WhenRunning.SHUTDOWN,
                target_s=90.0,
            ),
            Rule("kept", Match((), ("keep/*",), {}, 1 << 30, 2 << 30), archives=False),
            Rule(
                "rest",
                off_for_s=14 * DAY_S,
                not_started_for_s=60 * DAY_S,
                idle=Idleness(14 * DAY_S),
                point_age_max_s=1800,
            ),
        ),
        archives_per_job_max=3,
        recalled_for_s_min=1.5 * DAY_S,
        high_watermark=0.85,
        low_watermark=0.805,
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "lab"', 'nam = "lab"', r"c.toml:16:1: policy.rules[1].nam: no such key"),
        ('name = "lab"', 'nam = "lab"', r"c.toml:15:1: policy.rules[1].name: is missing"),
        ('"test?"', "7", r"c.toml:17:19: policy.rules[1].names[2]: Input should be a valid string"),
        ('"a.b" = "c"', '"a.b" = 1', r"c.toml:18:37: policy.rules[1].metadata.a.b: Input should be a valid string"),
        ('["lab-*", "test?"]', '"lab-*"', r"c.toml:17:9: policy.rules[1].names: must be a list"),
        ('{ group = "lab", "a.b" = "c" }', '"c"', r"c.toml:18:12: policy.rules[1].metadata: must be a table"),
        ("share = 0.9", "share = 0.999", r"c.toml:19:33: policy.rules[1].idle.share: Input should be less"),
        ("share = 0.9", "shar = 0.9", r"c.toml:19:25: policy.rules[1].idle.shar: no such key"),
        ('window = "2d"', 'window = "2h"', r'c.toml:19:19: policy.rules[1].idle.window: must be at least "1d"'),
        ('"1 MiB"', '"1 Mb"', r"c.toml:19:82: policy.rules[1].idle.disk_bytes_per_s_max: not a size"),
        (
            '"shutdown"',
            '"destroy"',
            r"c.toml:20:16: policy.rules[1].when_running: Input should be 'skip', 'shutdown' or",
        ),
        ('"90s"', "-1", r"c.toml:21:10: policy.rules[1].target: Input should be greater"),
        ("archive = false", "", r"c.toml:23:1: policy.rules[2]: has no condition"),
        ('name = "rest"', 'name = "lab"', r"c.toml:15:10: policy.rules: two rules are called 'lab'"),
        ('off_for = "14d"', 'off_for = "14 moons"', r"c.toml:32:11: policy.rules[3].off_for: not a length of time"),
        (
            '[policy.rules.idle]\nwindow = "14d"',
            "[policy.rules.idle]\n",
            r"c.toml:35:15: policy.rules[3].idle.window: is mis",
        ),
        ('window = "14d"', 'window = "14d"\nwindw = 1', r"c.toml:37:1: policy.rules[3].idle.windw: no such key"),
    ],
)
def test_errors_of_rules_name_line_and_column(old: str, new: str, message: str) -> None:
    assert RULES.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        parse_config(RULES.replace(old, new), origin="c.toml")
    assert any(line.startswith(message) for line in str(caught.value).splitlines()), str(caught.value)


JOBS = """
[jobs]
parallel = 4
windows = [
    {from = "22:00", to = "06:00", bytes_per_s_max = "200 MiB"},
    {from = "06:00", to = "24:00"},
]
bytes_per_s_max_outside = "10 MiB"
[hooks]
before = ["/usr/local/bin/hook", "--flag"]
"""


def test_windows_and_hooks() -> None:
    config = parse_config(MINIMAL + JOBS, origin="test")
    windows = config.jobs.bandwidth
    assert [windows.limit(minute) for minute in (0, 359, 360, 1319, 1320)] == [200 << 20, 200 << 20, 0, 0, 200 << 20]
    assert windows.outside == 10 << 20
    assert config.hooks.before == ("/usr/local/bin/hook", "--flag")
    assert config.hooks.after == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[jobs]\nwindows = [{from = "25:00", to = "06:00"}]', "jobs.windows[1].from: not a time of day"),
        ('[jobs]\nwindows = [{from = "22:00"}]', "jobs.windows[1].to: is missing"),
        ('[jobs]\nwindows = [{from = "22:00", to = "06:00", rate = 1}]', "no such key"),
        ('[hooks]\nafter = ["hook"]', "hooks.after: must be an absolute path"),
        ('[hooks]\nbefore = "/bin/true"', "hooks.before"),
        ("[jobs]\nparallel = 0", "jobs.parallel"),
    ],
)
def test_what_is_wrong_with_jobs_and_hooks(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse_config(MINIMAL + text, origin="test")


@pytest.mark.parametrize(("text", "enabled"), [('"auto"', "auto"), ("true", True), ("false", False)])
def test_whether_libvirt_is_used(text: str, enabled: object) -> None:
    assert parse_config(f"{MINIMAL}[libvirt]\nenabled = {text}\n", origin="c.toml").libvirt.enabled == enabled
    with pytest.raises(ConfigError, match="enabled"):
        parse_config(f'{MINIMAL}[libvirt]\nenabled = "perhaps"\n', origin="c.toml")
