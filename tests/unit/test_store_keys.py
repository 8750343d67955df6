"""Key files and passphrases, the documents that they open, and their change; no secret is ever shown."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store_fakes import FakeObjects
from store_points import KEY_SOURCE, back_up

from vmfs_stub.core.errors import (
    AlreadyExists,
    ConfigError,
    CorruptStoreObject,
    KeyMissing,
    NotFound,
    Refused,
    StoreUnavailable,
    UnknownFormat,
    VmfsStubError,
    WrongKey,
)
from vmfs_stub.store import documents, key_documents, key_wrapping, keyring
from vmfs_stub.store.format import StoreDescription, decode_description, encode_description
from vmfs_stub.store.key_documents import (
    SCRYPT_MEMORY_MAX,
    KeyDocument,
    Scrypting,
    decode_key_document,
    encode_key_document,
)
from vmfs_stub.store.key_sources import KeyKind, KeySource, new_key_file, read_source
from vmfs_stub.store.key_wrapping import unwrap
from vmfs_stub.store.keyring import add_key, decode_seen, look_at, remove_key
from vmfs_stub.store.keys import KEYS, STORE_KEY, key_key
from vmfs_stub.store.store import Store

PASSPHRASE = KeySource(KeyKind.PASSPHRASE, "passphrase file test", b"correct horse battery staple")
USUAL = Scrypting(b"")
OTHER_KEY = KeySource(KeyKind.KEY_FILE, "key file other", b"o" * 32)


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And scrypt is quick."""
    monkeypatch.setattr(key_documents.Scrypting.__init__, "__defaults__", (1 << 14, 8, 1))
    caplog.set_level(logging.DEBUG)
    yield
    assert PASSPHRASE.secret.decode() not in caplog.text


def _keys(objects: FakeObjects) -> list[str]:
    return [key for key in objects.contents if key.startswith("keys/")]


def _document(objects: FakeObjects) -> tuple[str, KeyDocument]:
    (key,) = _keys(objects)
    return key, decode_key_document(objects.contents[key], key)


def _private(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("source", [KEY_SOURCE, PASSPHRASE], ids=["key-file", "passphrase"])
def test_a_store_opens_with_what_it_was_made_for_and_with_nothing_else(objects: FakeObjects, source: KeySource) -> None:
    made = Store.create(objects, source=source)
    assert Store.open(objects, source).key == made.key
    assert made.key is not None
    for wrong in (OTHER_KEY, replace(PASSPHRASE, secret=b"Correct horse battery staple"), replace(source, secret=b"")):
        with pytest.raises(WrongKey, match=wrong.origin) as told:
            Store.open(objects, wrong)
        assert not wrong.secret or wrong.secret.decode() not in str(told.value)
    with pytest.raises(KeyMissing, match=r"key_file or passphrase_file .* --key FILE or --passphrase FILE"):
        Store.open(objects)


def test_the_key_of_a_file_is_no_passphrase() -> None:
    """The same bytes open only what was wrapped for that kind."""
    objects = FakeObjects()
    Store.create(objects, source=replace(PASSPHRASE, secret=KEY_SOURCE.secret))
    with pytest.raises(WrongKey):
        Store.open(objects, KEY_SOURCE)


def test_a_plain_store_is_not_opened_with_a_key(objects: FakeObjects) -> None:
    """Who replaces the description by a plain one must not get what the host writes."""
    encrypted = Store.create(objects, source=KEY_SOURCE)
    objects.contents[STORE_KEY] = encode_description(replace(encrypted.description, is_encrypted=False))
    with pytest.raises(WrongKey, match="not encrypted"):
        Store.open(objects, KEY_SOURCE)
    with pytest.raises(WrongKey):
        Store.open_or_create(objects, source=KEY_SOURCE)


def test_a_description_that_was_changed_opens_no_more(objects: FakeObjects) -> None:
    store = Store.create(objects, source=KEY_SOURCE)
    for changed in ({"chunk_size": 1 << 17}, {"store_id": "e" * 32}):
        objects.contents[STORE_KEY] = encode_description(replace(store.description, **changed))
        with pytest.raises(WrongKey):
            Store.open(objects, KEY_SOURCE)


def test_two_hosts_that_make_a_store_at_once_get_the_same_one(objects: FakeObjects) -> None:
    first = Store.create(objects, source=KEY_SOURCE)
    with pytest.raises(AlreadyExists):
        Store.create(objects, source=KEY_SOURCE)
    assert len(_keys(objects)) == 1  # none is left of the one that lost
    assert Store.open_or_create(objects, source=KEY_SOURCE).key == first.key
    with pytest.raises(WrongKey):
        Store.open_or_create(objects, source=OTHER_KEY)


def test_there_never_is_a_store_that_nobody_can_open(objects: FakeObjects) -> None:
    order: list[str] = []
    objects.before = lambda call, key: order.append(f"{call} {key.split('/')[0]}")
    Store.create(objects, source=KEY_SOURCE)
    assert order == ["put keys", "get keys", f"put {STORE_KEY}"]


@pytest.mark.parametrize("how", ["damaged", "exchanged"])
def test_a_key_that_does_not_read_back_is_taken_away(
    objects: FakeObjects, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    Store.create(objects, source=KEY_SOURCE)
    seen, before = look_at(objects), dict(objects.contents)
    get = objects.get

    def other(key: str, *, size_max: int = 1 << 20) -> bytes:
        data = get(key, size_max=size_max)
        if key in before:
            return data
        whole_but_other = encode_key_document(replace(decode_key_document(data, key), wrapped=bytes(48)))
        return data[:-3] if how == "damaged" else whole_but_other

    monkeypatch.setattr(objects, "get", other)
    with pytest.raises(CorruptStoreObject):
        add_key(objects, seen, KEY_SOURCE, PASSPHRASE)
    assert objects.contents == before


def test_keys_are_changed(objects: FakeObjects) -> None:
    store = Store.create(objects, source=KEY_SOURCE)
    made = back_up(store, {"disk": b"x" * 100_000})
    first = look_at(objects).opened_by(KEY_SOURCE)
    assert first is not None
    added = add_key(objects, look_at(objects), KEY_SOURCE, PASSPHRASE)
    for source in (KEY_SOURCE, PASSPHRASE):
        assert Store.open(objects, source).key == store.key
    assert look_at(objects).opened_by(PASSPHRASE) == added.key_id
    with pytest.raises(Refused, match="you use now"):
        remove_key(objects, look_at(objects), KEY_SOURCE, first)
    with pytest.raises(NotFound):
        remove_key(objects, look_at(objects), PASSPHRASE, "f" * 32)
    with pytest.raises(NotFound):
        remove_key(objects, look_at(objects), PASSPHRASE, "../packs")
    with pytest.raises(WrongKey):
        remove_key(objects, look_at(objects), OTHER_KEY, first)
    remove_key(objects, look_at(objects), PASSPHRASE, first)
    with pytest.raises(WrongKey, match="was it removed"):
        Store.open(objects, KEY_SOURCE)
    with pytest.raises(Refused):  # the last one stays
        remove_key(objects, look_at(objects), PASSPHRASE, added.key_id)
    table = Store.open(objects, PASSPHRASE).open_point(made.vm_id, made.point_id).chunks(0)
    assert table.locate(0, 1)[0] is not None
    with pytest.raises(Refused, match="not encrypted"):
        add_key(objects, replace(look_at(objects), description=StoreDescription(store.id, 65536)), None, OTHER_KEY)  # type: ignore[arg-type]


def test_there_is_an_end_to_the_keys_of_a_store(objects: FakeObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEYS_MAX", 2)
    Store.create(objects, source=KEY_SOURCE)
    add_key(objects, look_at(objects), KEY_SOURCE, OTHER_KEY)
    with pytest.raises(Refused, match="2 keys already"):
        add_key(objects, look_at(objects), KEY_SOURCE, PASSPHRASE)
    for digit in "cdef":
        objects.contents[key_key(digit * 32)] = b"planted"
    assert Store.open(objects, KEY_SOURCE).key is not None, "whatever others have put there"
    with pytest.raises(Refused, match="6 keys already, and may have 2"):
        add_key(objects, look_at(objects), KEY_SOURCE, PASSPHRASE)


def test_of_too_many_keys_some_are_tried(objects: FakeObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    phrases = [replace(PASSPHRASE, secret=f"phrase {number}".encode()) for number in range(4)]
    store = Store.create(objects, source=KEY_SOURCE)
    for phrase in phrases:
        add_key(objects, look_at(objects), KEY_SOURCE, phrase)
    monkeypatch.setattr(keyring, "KEYS_MAX", 2)
    seen = look_at(objects)
    assert seen.unlock(KEY_SOURCE) == decode_seen(seen.encode()).unlock(KEY_SOURCE) == store.key
    opened = 0
    for phrase in phrases:
        try:
            assert seen.unlock(phrase) == store.key
            opened += 1
        except WrongKey as exc:
            assert "2 more were not tried" in str(exc)
    assert opened == 2
    monkeypatch.setattr(keyring, "KEYS_READ_MAX", 2)
    seen = look_at(objects)
    assert (len(seen.key_documents), seen.unread_count) == (2, 3)


@pytest.mark.parametrize("theirs_first", [True, False])
def test_two_who_remove_each_others_keys_both_keep_access(objects: FakeObjects, theirs_first: bool) -> None:
    store = Store.create(objects, source=KEY_SOURCE)
    add_key(objects, look_at(objects), KEY_SOURCE, OTHER_KEY)
    own, other = (key_key(str(look_at(objects).opened_by(source))) for source in (KEY_SOURCE, OTHER_KEY))
    seen = look_at(objects)

    class Meanwhile(FakeObjects):
        """The other one removes this one's key right before or after this one removes the other's."""

        def delete(self, key: str) -> None:
            if theirs_first:
                self.contents.pop(own)
            super().delete(key)
            self.contents.pop(own, None)

    racing = Meanwhile()
    racing.contents = objects.contents
    again = remove_key(racing, seen, KEY_SOURCE, other.removeprefix(KEYS))
    assert again is not None
    assert key_key(again.key_id) not in (own, other)
    assert Store.open(objects, KEY_SOURCE).key == store.key


def test_damaged_keys_hide_no_good_one_and_are_named_when_there_is_none(objects: FakeObjects) -> None:
    Store.create(objects, source=KEY_SOURCE)
    add_key(objects, look_at(objects), KEY_SOURCE, OTHER_KEY)
    own, other = (key_key(str(look_at(objects).opened_by(source))) for source in (KEY_SOURCE, OTHER_KEY))
    objects.contents[own] = objects.contents[own][:-9]
    assert Store.open(objects, OTHER_KEY).key is not None
    with pytest.raises(CorruptStoreObject, match=own):
        Store.open(objects, KEY_SOURCE)
    objects.contents["keys/foreign"] = b"whatever"  # not ours: left alone
    del objects.contents[other], objects.contents[own]
    with pytest.raises(CorruptStoreObject, match="keys/: is empty"):
        Store.open(objects, KEY_SOURCE)


def test_any_flipped_bit_of_a_key_document_is_found(objects: FakeObjects) -> None:
    Store.create(objects, source=PASSPHRASE)
    key, document = _document(objects)
    whole = objects.contents[key]
    assert decode_key_document(encode_key_document(document), key) == document
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptStoreObject):
            decode_key_document(bytes(damaged), key)
    with pytest.raises(CorruptStoreObject, match="under another name"):
        decode_key_document(whole, key_key("f" * 32))
    # one that is exchanged for another one, as a whole
    with pytest.raises(WrongKey):
        objects.contents[key] = encode_key_document(replace(document, wrapped=bytes(48)))
        Store.open(objects, PASSPHRASE)


@pytest.mark.parametrize(
    "change",
    [
        {"scrypt_n": 1 << 19},
        {"scrypt_n": (1 << 17) + 1},
        {"scrypt_n": 2},
        {"scrypt_n": 1 << 62},
        {"scrypt_r": 9},
        {"scrypt_r": 0},
        {"scrypt_p": 3},
        {"scrypt_salt": ""},
        {"scrypt_salt": "A" * 4096},
        {"nonce": "AAAA"},
        {"wrapped": "not base64"},
        {"kind": "ask me"},
        {"key_id": "../../etc"},
    ],
)
def test_what_a_hostile_store_asks_for_is_bounded(
    objects: FakeObjects, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.create(objects, source=PASSPHRASE)
    key, _ = _document(objects)
    body = json.loads(objects.contents[key].splitlines()[0])
    objects.contents[key] = documents.encode("vmfs-stub store key", 1, {**body, **change})
    monkeypatch.setattr(key_wrapping, "Scrypt", None)  # not even begun
    with pytest.raises(CorruptStoreObject, match=next(iter(change))):
        Store.open(objects, PASSPHRASE)


def test_the_bound_is_what_it_says() -> None:
    assert SCRYPT_MEMORY_MAX == 128 * (1 << 18) * 8
    assert SCRYPT_MEMORY_MAX >= 128 * USUAL.n * USUAL.r >= 64 << 20


def test_a_newer_key_document_is_told_from_a_wrong_key(objects: FakeObjects) -> None:
    Store.create(objects, source=KEY_SOURCE)
    key, _ = _document(objects)
    body = json.loads(objects.contents[key].splitlines()[0])
    objects.contents[key] = documents.encode("vmfs-stub store key", 2, {**body, "version": 2})
    with pytest.raises(UnknownFormat, match=key):
        Store.open(objects, KEY_SOURCE)


def test_keys_of_another_store_are_not_tried(objects: FakeObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was left by a creation that failed."""
    store = Store.create(objects, source=PASSPHRASE)
    _, document = _document(objects)
    monkeypatch.setattr(key_wrapping, "Scrypt", None)
    assert unwrap(replace(document, store_id=store.id[::-1]), store.description, PASSPHRASE) is None  # type: ignore[arg-type]


def test_what_is_kept_for_a_start_without_the_store(objects: FakeObjects) -> None:
    store = Store.create(objects, source=KEY_SOURCE)
    add_key(objects, look_at(objects), KEY_SOURCE, PASSPHRASE)
    seen = look_at(objects)
    kept = decode_seen(seen.encode())
    assert kept == seen
    assert kept.unlock(PASSPHRASE) == store.key
    plain = FakeObjects()
    Store.create(plain)
    assert look_at(plain).encode() == plain.contents[STORE_KEY]
    assert decode_description(plain.contents[STORE_KEY]) == decode_seen(plain.contents[STORE_KEY]).description
    for data in (b"", b"x", seen.encode()[:-3], seen.encode() + b"x\n"):
        with pytest.raises(CorruptStoreObject):
            decode_seen(data)


def test_a_store_that_is_away_while_it_is_opened(objects: FakeObjects) -> None:
    Store.create(objects, source=KEY_SOURCE)

    def fail(call: str, key: str) -> None:
        if key.startswith("keys/"):
            raise StoreUnavailable(key)

    objects.before = fail
    with pytest.raises(StoreUnavailable):
        Store.open(objects, KEY_SOURCE)


# Files


def test_a_new_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = new_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(base64.b64decode(path.read_bytes())) == 32
    assert read_source(key_file=path, passphrase_file=None) == made
    assert new_key_file(tmp_path / "other").secret != made.secret
    with pytest.raises(AlreadyExists):
        new_key_file(path)
    with pytest.raises(ConfigError, match="its directory does not exist"):
        new_key_file(tmp_path / "no/such/key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = _private(tmp_path / "key", base64.b64encode(b"k" * 32), mode)
    for names in ({"key_file": path, "passphrase_file": None}, {"key_file": None, "passphrase_file": path}):
        with pytest.raises(ConfigError, match="chmod 600"):
            read_source(**names)
    path.chmod(0o400)
    assert read_source(key_file=path, passphrase_file=None) is not None
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="chown"):
        read_source(key_file=path, passphrase_file=None)


@pytest.mark.parametrize("content", [b"", b"hunter2-hunter2", base64.b64encode(b"k" * 31), b"k" * 32, b"A" * 5000])
def test_what_is_no_key_file_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = _private(tmp_path / "key", content)
    with pytest.raises(ConfigError, match=str(path)) as told:
        read_source(key_file=path, passphrase_file=None)
    causes: list[BaseException | None] = [told.value, told.value.__cause__, told.value.__context__]
    for cause in causes:
        assert not content or content.decode() not in repr(cause)


def test_passphrases(tmp_path: Path) -> None:
    path = _private(tmp_path / "phrase", b"correct horse \n")
    found = read_source(key_file=None, passphrase_file=path)
    assert found is not None
    assert found.secret == b"correct horse "
    assert "horse" not in repr(found)
    for content in (b"", b"\n", b"x" * 1025):
        with pytest.raises(ConfigError, match="passphrase file"):
            read_source(key_file=None, passphrase_file=_private(path, content))
    with pytest.raises(ConfigError, match="leave one out"):
        read_source(key_file=path, passphrase_file=path)
    for strange in (tmp_path, Path("/dev/null"), tmp_path / "missing"):
        with pytest.raises(ConfigError):
            read_source(key_file=None, passphrase_file=strange)
    assert read_source(key_file=None, passphrase_file=None) is None


def test_every_error_of_keys_is_one_of_ours() -> None:
    assert issubclass(WrongKey, VmfsStubError)
    assert not issubclass(WrongKey, StoreUnavailable)
