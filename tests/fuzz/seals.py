"""Makes the checksums of mutated structures right again, so that what lies behind them is reached.

Independent of the product's encoders, which would refuse to write what is wrong: only digests and magics are shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from blake3 import blake3
from xxhash import xxh3_128_digest

ENVELOPE_HEAD = 16
_DIGEST = 16
_PACK_TAIL = 76


def seal_envelope(data: bytes) -> bytes:
    """The last 16 bytes are the checksum, all between head and checksum is the body."""
    if len(data) < ENVELOPE_HEAD + _DIGEST:
        data = data.ljust(ENVELOPE_HEAD + _DIGEST, b"\0")
    head = data[:12] + struct.pack("<I", len(data) - ENVELOPE_HEAD - _DIGEST) + data[ENVELOPE_HEAD:-_DIGEST]
    return head + xxh3_128_digest(head)


def edit_envelope(data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """Edit the body; the checksum is left as it was."""
    return data[:ENVELOPE_HEAD] + edit(data[ENVELOPE_HEAD:-_DIGEST]) + data[-_DIGEST:]


def seal_document(data: bytes) -> bytes:
    """Everything before the last line is the body, as one line."""
    body, _, _ = data.rpartition(b'\n{"blake3"')
    line = (body or data).replace(b"\n", b" ")
    return line + b'\n{"blake3":"' + blake3(line).hexdigest().encode("ascii") + b'"}\n'


def edit_document(data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """Edit the first line."""
    line, end, rest = data.partition(b"\n")
    return edit(line) + end + rest


def seal_tail(data: bytes) -> bytes:
    """The last 32 bytes are the BLAKE3 of all before."""
    body = data[:-32]
    return body + blake3(body).digest()


def seal_pack(data: bytes) -> bytes:
    """The footer's checksum, over what the trailer says is the footer, and the magic."""
    if len(data) < _PACK_TAIL:
        return data
    trailer = data[-_PACK_TAIL : -_PACK_TAIL + 36]
    (offset,) = struct.unpack_from("<Q", trailer, 16)
    digest = blake3(data[min(offset, len(data)) : -_PACK_TAIL] + trailer).digest()
    return data[: -_PACK_TAIL + 36] + digest + b"vsPACK\r\n"
