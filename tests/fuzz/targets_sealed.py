"""What is read from an encrypted store by who has its key: hostile until proven otherwise, all the same."""

from __future__ import annotations

import struct

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from xxhash import xxh3_128_digest

from tests.fuzz.target import Target, check_types, require
from tests.fuzz.targets_store import CHUNK, NOISE, PACK, PLAIN, DocumentTarget, FrameTarget
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptStoreObject, UnknownFormat
from vmfs_stub.core.ids import ChunkId, StoreId
from vmfs_stub.store import frames
from vmfs_stub.store.aes_sealing import AesSealing
from vmfs_stub.store.format import FRAME_HEADER, FRAME_LENGTH_MAX, PACK_ENTRY, StoreDescription
from vmfs_stub.store.key_documents import (
    SCRYPT_MEMORY_MAX,
    KeyDocument,
    Scrypting,
    decode_key_document,
    encode_key_document,
)
from vmfs_stub.store.key_sources import KeyKind, KeySource
from vmfs_stub.store.key_wrapping import unwrap, wrap
from vmfs_stub.store.keyring import SeenStore, decode_seen
from vmfs_stub.store.keys import key_key, writer_of
from vmfs_stub.store.sealing import StoreKey

SECRET = StoreKey(bytes(range(32)))
SEALING = AesSealing(SECRET)
SOURCE = KeySource(KeyKind.KEY_FILE, "key file", b"k" * 32)
DESCRIPTION = StoreDescription(StoreId("7a" * 16), CHUNK, is_encrypted=True)
KEY_ID = "8b" * 16
_CONTEXT = "vmfs-stub 2026 store key: "
_JOB_KEY = blake3(
    writer_of(PACK).encode(), key=blake3(SECRET.secret, derive_key_context=f"{_CONTEXT}frames").digest()
).digest()
_OBJECTS_KEY = blake3(SECRET.secret, derive_key_context=f"{_CONTEXT}objects").digest(length=64)


class SealedFrameTarget(FrameTarget):
    """An encrypted frame, read by a reference as a footer has it."""

    name = "sealed-frame"

    def seeds(self) -> list[bytes]:
        return [self._seed(raw) for raw in (PLAIN, NOISE, PLAIN[:5], NOISE[:700])]

    def _seed(self, raw: bytes) -> bytes:
        room = memoryview(bytearray(FRAME_LENGTH_MAX))
        made = frames.encode(
            memoryview(raw), SEALING.chunk_id(raw), into=room, seal=SEALING.frame_seal(writer_of(PACK))
        )
        return PACK_ENTRY.pack(made.chunk_id, 0, len(made.frame), len(raw), made.checksum) + bytes(made.frame)

    def call(self, data: bytes) -> object:
        reference = data[: PACK_ENTRY.size].ljust(PACK_ENTRY.size, b"\0")
        chunk_id, offset, length, raw_length, checksum = PACK_ENTRY.unpack(reference)
        ref = FrameRef(ChunkId(chunk_id), PACK, offset, length, raw_length, checksum)
        raw = frames.decode(memoryview(data[PACK_ENTRY.size :]), ref, SEALING.frame_seal(writer_of(PACK)))
        require(len(raw) == raw_length and xxh3_128_digest(raw) == checksum, "a frame of other bytes than referred to")
        return raw

    def reseal(self, data: bytes) -> bytes:
        """As who has the key: the payload is what the damaged one decrypts to, and all else fits it."""
        at = PACK_ENTRY.size
        frame = data[at:]
        if len(frame) < FRAME_HEADER.size + 16:
            return data
        nonce = frame[16:28]
        payload = Cipher(AES(_JOB_KEY), CTR(nonce + b"\0\0\0\2")).decryptor().update(frame[FRAME_HEADER.size : -16])
        plain = super().reseal(data[:at] + frame[: FRAME_HEADER.size] + payload)
        raw_length, checksum = struct.unpack_from("<I", plain, 40)[0], plain[44:60]
        header = frame[:8] + struct.pack("<II", raw_length, len(payload) + 16) + frame[16 : FRAME_HEADER.size]
        entry = data[:36] + struct.pack("<II", len(frame), raw_length) + checksum
        return entry + header + AESGCM(_JOB_KEY).encrypt(nonce, payload, header + data[:32] + checksum)


class SealedObjectTarget(Target):
    """A whole object of an encrypted store."""

    name = "sealed-object"
    permitted = (CorruptStoreObject, UnknownFormat)
    is_checked = True

    def seeds(self) -> list[bytes]:
        return [SEALING.seal(data, "pins/1") for data in (PLAIN, NOISE, b"x", b"")]

    def call(self, data: bytes) -> object:
        opened = SEALING.open(data, "pins/1")
        require(SEALING.seal(opened, "pins/1") == data, "a sealed object does not read back")
        return opened

    def reseal(self, data: bytes) -> bytes:
        header = data[:12].ljust(12, b"\0")
        return header + AESSIV(_OBJECTS_KEY).encrypt(data[12:], [header, b"pins/1"])


def sample_keys() -> list[KeyDocument]:
    """A key file's document and a passphrase's."""
    own = wrap(SECRET, DESCRIPTION, SOURCE, key_id=KEY_ID, created_s=1_700_000_000.5)
    phrase = KeyDocument(
        KEY_ID, DESCRIPTION.store_id, KeyKind.PASSPHRASE, 0.0, bytes(12), bytes(48), Scrypting(bytes(16))
    )
    return [own, phrase]


class KeyDocumentTarget(DocumentTarget):
    """A wrapped copy of the store's key."""

    name = "key-document"
    tokens = (*DocumentTarget.tokens, b'"scrypt_n":', b'"passphrase"', b'"key-file"', b"4294967296")

    def seeds(self) -> list[bytes]:
        return [encode_key_document(document) for document in sample_keys()]

    def call(self, data: bytes) -> object:
        key = key_key(KEY_ID)
        document = decode_key_document(data, key)
        check_types(document)
        if document.scrypting is not None:
            cost = 128 * document.scrypting.n * document.scrypting.r
            require(cost <= SCRYPT_MEMORY_MAX and document.scrypting.p <= 2, "a passphrase that costs too much to try")
        require(unwrap(document, DESCRIPTION, SOURCE) in (None, SECRET), "another key than the store's")
        require(decode_key_document(encode_key_document(document), key) == document, "a key does not read back")
        return document


class SeenStoreTarget(DocumentTarget):
    """What a host keeps of a store, to start while that is away."""

    name = "seen-store"

    def seeds(self) -> list[bytes]:
        keys = tuple(sample_keys())
        return [SeenStore(DESCRIPTION, keys[:count]).encode() for count in range(3)]

    def call(self, data: bytes) -> object:
        seen = decode_seen(data)
        check_types(seen.description)
        require(decode_seen(seen.encode()) == seen, "what is kept of a store does not read back")
        return seen
