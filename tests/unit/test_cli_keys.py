"""Encrypted stores on the command line: `init --encrypt`, `store …`, and reading with ``--key`` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Outcome, Run, runner
from store_points import back_up

from vmfs_stub.cli.exit_codes import ExitCode
from vmfs_stub.config import load_config
from vmfs_stub.store import key_documents
from vmfs_stub.store.key_sources import source_of
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store

CONTENT = b"secret of the guest " * 20_000
PHRASE = "correct horse battery staple"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setattr(key_documents.Scrypting.__init__, "__defaults__", (1 << 14, 8, 1))
    call = runner(monkeypatch, capsys, config=tmp_path / "config.toml")

    def watched(*arguments: str | Path) -> Outcome:
        """No output ever shows what a key file or a passphrase's file holds."""
        outcome = call(*arguments)
        for path in tmp_path.glob("*.key"):
            if path.is_file():
                secret = path.read_text().strip()
                assert not secret or secret not in outcome.out + outcome.err
        return outcome

    return watched


def init_words(tmp_path: Path, mountpoint: Path) -> list[str | Path]:
    where = ["--backing", tmp_path / "backing", "--mountpoint", mountpoint, "--store", tmp_path / "store"]
    return ["init", *where, "--runtime-dir", tmp_path / "run"]


@pytest.fixture
def url(run: Run, tmp_path: Path, mountpoint: Path) -> str:
    """An encrypted store with a point of the VM "db", its key in the configuration."""
    made = run(*init_words(tmp_path, mountpoint), "--encrypt", "--key-file", tmp_path / "own.key")
    assert made.code == 0, made
    assert "made the encrypted store" in made.out
    assert "keep copies" in made.out
    settings = load_config(tmp_path / "config.toml").store
    store = Store.open(open_objects(StoreAt(settings.url)), source_of(settings))
    back_up(store, {"disk.raw": CONTENT}, vm_name="db")
    return settings.url


def phrase_file(tmp_path: Path, name: str = "phrase.key", phrase: str = PHRASE) -> Path:
    path = tmp_path / name
    path.write_text(phrase + "\n")
    path.chmod(0o600)
    return path


def test_a_datastore_with_an_encrypted_store(run: Run, url: str, tmp_path: Path, mountpoint: Path) -> None:
    key = tmp_path / "own.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert load_config(tmp_path / "config.toml").store.key_file == key
    for command in (["points"], ["verify"], ["restore", "db", "--to", tmp_path / "out"], ["store", "keys"]):
        outcome = run(*command)
        assert outcome.code == 0, outcome
    assert (tmp_path / "out/disk.raw").read_bytes() == CONTENT
    joined = run("--config", tmp_path / "b.toml", *init_words(tmp_path, mountpoint), "--key-file", key)
    assert joined.code == 0, joined
    assert "joined the store" in joined.out
    refused = run("--config", tmp_path / "c.toml", *init_words(tmp_path, mountpoint))
    assert refused.code == ExitCode.KEY
    assert not (tmp_path / "c.toml").exists()


def test_a_key_file_may_lie_beside_a_configuration_whose_directory_is_still_to_be_made(
    run: Run, tmp_path: Path, mountpoint: Path
) -> None:
    words = init_words(tmp_path, mountpoint)
    refused = run(*words, "--encrypt", "--key-file", tmp_path / "no" / "own.key")
    assert refused.code == ExitCode.USAGE, refused
    assert "its directory does not exist" in refused.err
    config = tmp_path / "etc" / "config.toml"
    made = run("--config", config, *words, "--encrypt", "--key-file", tmp_path / "etc" / "own.key")
    assert made.code == 0, made
    assert config.is_file()


def test_a_bare_command_needs_the_key(run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").unlink()
    there = ["--store", url]
    for command in (["points"], ["verify"], ["restore", "db", "--to", tmp_path / "out"], ["store", "keys"]):
        without = run(*command, *there)
        assert without.code == ExitCode.KEY, without
        assert "--key FILE" in without.err
        given = run(*command, *there, "--key", tmp_path / "own.key")
        assert given.code == 0, given
    assert (tmp_path / "out/disk.raw").read_bytes() == CONTENT
    (tmp_path / "own.key").chmod(0o644)
    open_to_all = run("points", *there, "--key", tmp_path / "own.key")
    assert open_to_all.code == ExitCode.USAGE
    assert "chmod 600" in open_to_all.err


def test_keys_are_changed(run: Run, url: str, tmp_path: Path) -> None:
    phrase = phrase_file(tmp_path)
    assert run("store", "add-key", "--new-passphrase", phrase).code == 0
    rows = json.loads(run("store", "keys", "--json").out)
    assert sorted((row["kind"], row["used"]) for row in rows) == [("key-file", True), ("passphrase", False)]
    old = next(row["key"] for row in rows if row["used"])
    assert run("points", "--store", url, "--passphrase", phrase).code == 0
    wrong = phrase_file(tmp_path, "wrong.key", "a phrase of nobody")
    refused = run("points", "--store", url, "--passphrase", wrong)
    assert (refused.code, PHRASE in refused.err) == (ExitCode.KEY, False)
    in_use = run("store", "remove-key", old)
    assert in_use.code == ExitCode.REFUSED
    assert run("store", "remove-key", old, "--passphrase", phrase).code == 0
    assert run("points").code == ExitCode.KEY  # as configured
    made = run("store", "add-key", "--new-key", tmp_path / "new.key", "--store", url, "--passphrase", phrase)
    assert made.code == 0
    assert run("restore", "db", "--to", tmp_path / "o", "--store", url, "--key", tmp_path / "new.key").code == 0
    assert run("store", "remove-key", "f" * 32, "--passphrase", phrase).code == ExitCode.NOT_FOUND


def test_adding_needs_a_key_that_opens_and_one_to_add(run: Run, url: str, tmp_path: Path) -> None:
    assert run("store", "add-key").code == ExitCode.USAGE
    wrong = phrase_file(tmp_path, "wrong.key", "a phrase of nobody")
    refused = run("store", "add-key", "--new-key", tmp_path / "new.key", "--passphrase", wrong)
    assert refused.code == ExitCode.KEY
    assert not (tmp_path / "new.key").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--encrypt"], ExitCode.USAGE, "--key-file FILE or --passphrase-file FILE"),
        (["--key-file", "own.key"], ExitCode.USAGE, "cannot be read"),
        (["--encrypt", "--passphrase-file", "missing.key"], ExitCode.USAGE, "cannot be read"),
        (["--passphrase-file", "phrase.key"], ExitCode.USAGE, "--encrypt makes an encrypted one"),
        (["--encrypt", "--key-file", "a.key", "--passphrase-file", "phrase.key"], ExitCode.USAGE, "give one of them"),
        (["--encrypt", "--key-file", "phrase.key"], ExitCode.USAGE, "is not one"),
    ],
)
def test_init_refuses_what_opens_nothing(
    run: Run, tmp_path: Path, mountpoint: Path, words: list[str], code: ExitCode, told: str
) -> None:
    phrase_file(tmp_path)
    resolved = [str(tmp_path / word) if word.endswith(".key") else word for word in words]
    refused = run(*init_words(tmp_path, mountpoint), *resolved)
    assert refused.code == code, refused
    assert told in refused.err
    assert not (tmp_path / "config.toml").exists()
    assert not (tmp_path / "store/vmfs-store.json").exists()


def test_a_plain_store_is_neither_encrypted_later_nor_opened_with_a_key(
    run: Run, tmp_path: Path, mountpoint: Path
) -> None:
    assert run(*init_words(tmp_path, mountpoint)).code == 0
    phrase = phrase_file(tmp_path)
    url = f"file://{tmp_path}/store"
    again = run(
        "--config", tmp_path / "b.toml", *init_words(tmp_path, mountpoint), "--encrypt", "--passphrase-file", phrase
    )
    assert again.code == ExitCode.KEY
    assert run("points", "--store", url, "--passphrase", phrase).code == ExitCode.KEY
    for command in (["keys"], ["add-key", "--new-passphrase", phrase], ["remove-key", "f" * 32]):
        refused = run("store", *command)
        assert refused.code == ExitCode.REFUSED, refused
        assert "not encrypted" in refused.err


def test_doctor_names_the_option(run: Run, url: str, tmp_path: Path) -> None:
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("key_file =", "# key_file ="))
    found = run("doctor", "--json")
    assert "store.key_file or store.passphrase_file" in found.out
