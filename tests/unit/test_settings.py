# ruff: noqa: ASYNC240 - what these tests look at is on a local disk
"""Reloading the configuration: all of it or nothing, and every key is either live or named when it cannot change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from pydantic import BaseModel

from vmfs_stub.config import Config, load_config
from vmfs_stub.core.errors import ConfigError, Refused
from vmfs_stub.settings import AT_START, LIVE, Settings, Take, changed_keys, is_live

TEXT = """
[datastore]
name = "main"
backing = "/srv/backing"
mountpoint = "/srv/mount"
[store]
url = "s3://bucket/prefix"
access_key_id = "old"
secret_access_key = "secret"
[hydration]
bytes_per_s_max = 1000
[retention]
keep_last = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def settings(path: Path) -> Settings:
    return Settings(load_config(path), path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def follower(
    taken: list[Config], *, refuses: Callable[[Config], bool] = lambda new: False
) -> Callable[[Config], Awaitable[Take]]:
    async def prepare(new: Config) -> Take:
        await trio.lowlevel.checkpoint()
        if refuses(new):
            raise ConfigError("not this one")
        return lambda: taken.append(new)

    return prepare


def all_keys() -> set[str]:
    found = set()
    for section, field in Config.model_fields.items():
        model = field.annotation
        is_section = isinstance(model, type) and issubclass(model, BaseModel)
        found |= {f"{section}.{key}" for key in model.model_fields} if is_section else {section}
    return found


def test_every_key_is_live_or_counts_at_the_start() -> None:
    """A new section or key has to be entered into one of the two tables of settings.py."""
    keys, sections = all_keys(), {key.partition(".")[0] for key in all_keys()}
    for key in keys:
        whole = f"{key.partition('.')[0]}.*"
        places = [table for table in (LIVE, AT_START) for name in (key, whole) if name in table]
        assert len(places) == 1, f"{key} is in {len(places)} places of LIVE and AT_START"
        assert is_live(key) is (places[0] is LIVE)
    for name in LIVE | AT_START:
        section, _, key = name.partition(".")
        assert name in keys or (key == "*" and section in sections), f"there is no {name}"


def test_secrets_are_compared_and_not_named_by_value(settings: Settings, path: Path) -> None:
    edit(path, '"secret"', '"other"')
    assert changed_keys(settings.current, load_config(path)) == ["store.secret_access_key"]


async def test_what_changed_is_taken_everywhere(settings: Settings, path: Path) -> None:
    taken: list[Config] = []
    settings.follow(follower(taken))
    settings.follow(follower(taken))
    edit(path, "bytes_per_s_max = 1000", 'bytes_per_s_max = "2 MiB"')
    edit(path, "keep_last = 3", "keep_last = 4")
    assert await settings.reload() == ["hydration.bytes_per_s_max", "retention.keep_last"]
    assert settings.current.hydration.bytes_per_s_max == 2 << 20
    assert taken == [settings.current] * 2
    assert await settings.reload() == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"/srv/backing"', '"/srv/elsewhere"', r"config\.toml:4:\d+: datastore\.backing: cannot change"),
        ('"s3://bucket/prefix"', '"s3://bucket/other"', r"config\.toml:7:\d+: store\.url: cannot change"),
        ("[retention]", "[mount]\nmax_background = 99\n[retention]", r":13:\d+: mount\.max_background: cannot change"),
        ("keep_last = 3", "keep_last = -3", r"config\.toml:13:\d+: retention\.keep_last: "),
        ("keep_last = 3", "keep_lost = 3", r"config\.toml:13:\d+: retention\.keep_lost: no such key"),
        ("[retention]", "[retention", "not valid TOML"),
    ],
)
async def test_what_cannot_be_is_refused_as_a_whole(
    settings: Settings, path: Path, old: str, new: str, expected: str
) -> None:
    taken: list[Config] = []
    settings.follow(follower(taken))
    before = settings.current
    edit(path, "bytes_per_s_max = 1000", "bytes_per_s_max = 2000")
    edit(path, old, new)
    with pytest.raises(ConfigError, match=expected):
        await settings.reload()
    assert (settings.current, taken) == (before, [])


async def test_each_key_that_cannot_change_is_named(settings: Settings, path: Path) -> None:
    edit(path, 'name = "main"', 'name = "other"')
    edit(path, "[hydration]", "[primary]\nthreads = 3\n[hydration]")
    with pytest.raises(ConfigError) as raised:
        await settings.reload()
    named = [line.split(": ")[1] for line in str(raised.value).splitlines()]
    assert named == ["datastore.name", "datastore.runtime_dir", "primary.threads"]


async def test_one_who_refuses_stops_all(settings: Settings, path: Path) -> None:
    taken: list[Config] = []
    settings.follow(follower(taken))
    settings.follow(follower(taken, refuses=lambda new: new.retention.keep_last == 9))
    before = settings.current
    edit(path, "keep_last = 3", "keep_last = 9")
    with pytest.raises(ConfigError, match="not this one"):
        await settings.reload()
    assert (settings.current, taken) == (before, [])
    edit(path, "keep_last = 9", "keep_last = 8")
    await settings.reload()
    assert taken == [settings.current] * 2


async def test_one_after_the_other(settings: Settings, path: Path) -> None:
    """What two reloads prepare never mixes."""
    order: list[str] = []

    async def prepare(new: Config) -> Take:
        order.append("prepare")
        await trio.sleep(0.01)
        return lambda: order.append("take")

    settings.follow(prepare)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(settings.reload)
        nursery.start_soon(settings.reload)
    assert order == ["prepare", "take"] * 2


async def test_a_file_that_is_gone_and_none_at_all(settings: Settings, path: Path) -> None:
    path.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        await settings.reload()
    with pytest.raises(Refused, match="not started from a configuration file"):
        await Settings(settings.current).reload()
