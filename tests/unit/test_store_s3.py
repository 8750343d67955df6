"""Where an S3 store is and who asks: URLs, credentials that are shown nowhere, and stores that do half of it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from store_fakes import FakeObjects

from vmfs_stub.config import parse_config
from vmfs_stub.core.errors import ConfigError, StoreDenied, StoreUnavailable, Unsupported
from vmfs_stub.store import s3
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.probe import probe
from vmfs_stub.store.retrying import RetryingObjects
from vmfs_stub.store.s3 import S3Credentials

SECRET = "s3cr3t/of+the=operator"
CREDENTIALS = S3Credentials("KEYID", SECRET)
NOBODY = "endpoint=http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://", "not an S3 URL"),
        ("s3:///prefix", "not an S3 URL"),
        (f"s3://KEYID:{SECRET}@bucket/prefix", "credentials belong elsewhere"),
        ("s3://bucket:9000/prefix", "not an S3 URL"),
        ("s3://bucket/prefix?secret_access_key=x", "secret_access_key is not an option"),
        ("s3://bucket/../up", "not a"),
        ("s3://bucket/?path_style=maybe", "path_style"),
        ("s3://bucket/?endpoint=host:9000", "endpoint begins with"),
    ],
)
def test_urls_that_cannot_be_meant(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        open_objects(StoreAt(url))
    assert SECRET not in str(refused.value)


def test_a_secret_is_in_no_message_and_no_text_of_an_object() -> None:
    at = StoreAt(f"s3://bucket/prefix?{NOBODY}", retries_max=0, credentials=CREDENTIALS, timeout_s=2)
    objects = open_objects(at)
    with pytest.raises(StoreUnavailable) as failed:
        objects.get("packs/x")
    told = [str(failed.value), repr(failed.value.__cause__), repr(at), repr(CREDENTIALS), repr(objects)]
    assert not [text for text in told if SECRET in text]
    assert "s3://bucket/prefix" in told[0]


def test_who_has_no_credentials_is_told_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # where the machine's role is asked for
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    objects = open_objects(StoreAt(f"s3://bucket/prefix?{NOBODY}", retries_max=0, timeout_s=2))
    with pytest.raises(StoreUnavailable, match=r"no credentials for s3://bucket/prefix: set access_key_id"):
        objects.get("packs/x")
    known = open_objects(StoreAt(f"s3://bucket/prefix?{NOBODY}", retries_max=0, credentials=CREDENTIALS, timeout_s=2))
    with pytest.raises(StoreUnavailable, match="does not answer as it should"):
        known.get("packs/x")


def test_an_id_in_the_environment_without_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    for given in ("KEYID", ""):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", given)
        with pytest.raises(ConfigError, match=r"s3://bucket/prefix.*SecretAccessKey; look at the variables AWS_"):
            open_objects(StoreAt(f"s3://bucket/prefix?{NOBODY}"))


def test_a_request_that_nobody_answers_is_sent_again_within_the_time_of_a_call() -> None:
    def answer() -> None:
        with listener.accept()[0] as _silent, listener.accept()[0] as answering:
            answering.recv(10_000)
            headers = b"content-length: 2\r\netag: x\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT"
            answering.sendall(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        answering = threading.Thread(target=answer)
        answering.start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        objects = open_objects(StoreAt(f"s3://bucket?endpoint={endpoint}", credentials=CREDENTIALS, timeout_s=10))
        begun = time.monotonic()
        assert objects.size("pins/x") == 2
        assert time.monotonic() - begun < 10
        answering.join()


def test_a_configured_secret_is_in_no_message() -> None:
    text = f"""
[datastore]
name = "main"
backing = "/srv/backing"
mountpoint = "/srv/mount"
[store]
url = "s3://bucket/prefix"
access_key_id = "KEYID"
secret_access_key = "{SECRET}"
"""
    config = parse_config(text, origin="config.toml")
    assert StoreAt.of(config.store).credentials == CREDENTIALS
    assert SECRET not in repr(config)
    for wrong in (text.replace('access_key_id = "KEYID"', ""), f"{text}\nretries_max = '{SECRET}'"):
        with pytest.raises(ConfigError) as refused:
            parse_config(wrong, origin="config.toml")
        assert SECRET not in str(refused.value)


def test_the_shared_credentials_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "credentials"
    path.write_text("[default]\naws_access_key_id = A\naws_secret_access_key = %B\n[other]\naws_access_key_id = C\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert s3._known(S3Credentials()) == {"access_key_id": "A", "secret_access_key": "%B"}
    assert s3._known(CREDENTIALS) == {"access_key_id": "KEYID", "secret_access_key": SECRET}
    monkeypatch.setenv("AWS_PROFILE", "missing")
    assert s3._known(S3Credentials()) == {}
    monkeypatch.setenv("AWS_PROFILE", "default")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from the environment")
    assert s3._known(S3Credentials()) == {}


class Careless(FakeObjects):
    """Takes a conditional put for an ordinary one."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = True) -> None:
        super().put(key, data, if_absent=False)


def test_a_store_that_ignores_the_condition_of_a_put_is_refused() -> None:
    objects = Careless()
    with pytest.raises(Unsupported, match="conditional puts"):
        probe(RetryingObjects(objects))
    assert objects.contents == {}


def test_a_host_that_may_not_remove_is_told_so() -> None:
    objects = FakeObjects()

    def before(call: str, key: str) -> None:
        if call == "delete":
            raise StoreDenied("no")

    assert probe(objects)
    objects.before = before
    assert not probe(objects)
