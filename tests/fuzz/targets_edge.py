"""What operators, clients, the kernel and SQLite's files say to the program."""

from __future__ import annotations

import json
import logging
import re
import socket
import sqlite3
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import trio

from tests.fuzz.target import Bound, Edit, Target, Violation, check_types, require
from tests.fuzz.targets_store import sample_pack
from tests.unit.control_fakes import BACKING, FakeHistory, FakeTarget
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.cli.init import _config_text
from vmfs_stub.cli.output import bytes_text
from vmfs_stub.config import load_config
from vmfs_stub.config.policy import RULES_MAX
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.jobs import open_jobs
from vmfs_stub.control.messages import DiskRow, JobInfo, PolicyRow
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.server import ControlServer
from vmfs_stub.core.errors import (
    ConfigError,
    NoSpace,
    PrimaryIOError,
    UnknownFormat,
    Unsupported,
    VmfsStubError,
)
from vmfs_stub.core.ids import ChunkId, JobId, PackId, StoreId, VmId
from vmfs_stub.core.times import time_text
from vmfs_stub.core.usage import DAY_S, Counters, GuestState, Reading, Sample, apart
from vmfs_stub.mount import handshake
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.store.chunk_index import ChunkIndex


class ConfigTarget(Target):
    """The configuration file."""

    name = "config"
    permitted = (ConfigError,)
    bound = Bound(base_bytes=4 << 20, per_byte=300)
    tokens = (
        b"[", b"{a=", b"'", b'"""', b"\\u0000", b"nan", b"inf", b"-1", b"9" * 5_000, b'"9 TiB"', b"/../",
        b"\n[store]\n",
        b"[[recall]]", b"=", b"#", b"recall.", b"1979-05-27T07:32:00Z", b"true", b'"1        "', b" " * 200, b"\r\n",
        b"\n[datastore.x]", b"runtime_dir", b'url = "file:///x"', b"x = [\n[ ", b"\xff",
        b"\n[[policy.rules]]\n", b"\n[policy.rules.idle]\n", b'"14d"', b"idle = {", b"'a.b'.\"c\" = 1",
        b'names = ["*", ',
    )  # fmt: skip

    def seeds(self) -> list[bytes]:
        plain = _config_text(
            name="vms", backing=Path("/srv/b"), mountpoint=Path("/srv/m"), runtime_dir=None, store="file:///srv/store"
        )
        lines = [line.partition(" # ")[0] for line in plain.splitlines()]
        plain = "\n".join(line for line in lines if not line.startswith("# ") or " = " in line or "[[" in line)
        full = "\n".join(line.removeprefix("# ") for line in plain.splitlines())
        return [plain.encode(), full.encode()]

    def call(self, data: bytes) -> object:
        path = self.place / "config.toml"
        path.write_bytes(data)
        try:
            config = load_config(path)
        except ConfigError as exc:
            check_places(str(exc), path, data)
            raise
        check_config_paths(config.private_dir, config.socket_path, config.log_path, config.datastore.mountpoint)
        require(config.private_dir.parent == config.datastore.backing, "private state lies elsewhere")
        for section in config:
            for key, value in section[1] or ():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    require(0 <= value < 2**63, f"{section[0]}.{key} is out of all bounds")
        require(all(isinstance(text, str) for text in config.warnings), "warnings")
        require(0 < len(config.archive_policy.rules) <= RULES_MAX, "rules")
        return None


def check_places(message: str, path: Path, data: bytes) -> None:
    """Each place that an error names is one of the file."""
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    for line, column in re.findall(rf"^{re.escape(str(path))}:([0-9]+):([0-9]+): ", message, re.MULTILINE):
        require(0 < int(line) <= len(lines), "a line that the file does not have", line)
        require(0 < int(column) <= len(lines[int(line) - 1]) + 1, "a column that the line does not have", column)


def check_config_paths(*paths: Path) -> None:
    """Absolute, plain, and such that a call can take them."""
    for path in paths:
        require(path.is_absolute() and "\0" not in str(path) and ".." not in path.parts, "a path", f"{path!r:.80}")


class FuseInitTarget(Target):
    """The first request of a FUSE connection, and the answer to it."""

    name = "fuse-init"
    permitted = (Unsupported,)

    def seeds(self) -> list[bytes]:
        offers = (handshake.WANTED, 2**64 - 1, sum(handshake.REQUIRED.values()))
        made = []
        for flags in offers:
            body = struct.pack("=IIIIII44x", 7, 41, 131072, flags & 0xFFFFFFFF, flags >> 32 & 0xFFFFFFFF, 0)
            made.append(struct.pack("=IIQQIIII", 40 + len(body), 26, 2, 0, 0, 0, 0, 0) + body)
        return made

    def call(self, data: bytes) -> object:
        init = handshake.parse_init(data)
        check_types(init)
        answer = handshake.answer_init(init, MountSettings())
        length, error, unique = struct.unpack_from("=IiQ", answer)
        major, minor, _, flags = struct.unpack_from("=IIII", answer, 16)
        require((length, error, unique) == (len(answer), 0, init.unique), "an answer that does not fit")
        require((major, len(answer)) == (7, 80) and minor <= init.minor, "an answer of another protocol")
        require(not flags & ~(init.flags & 0xFFFFFFFF), "the answer takes what was not offered")
        return init


class _Wire:
    """A daemon's end of the socket: records what is asked, answers what it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer = b""
        self.asked = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self.asked = _request(connection)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(1)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _request(connection: socket.socket) -> bytes:
    """One request, with the body that its head promises."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += connection.recv(1 << 16)
    head, _, body = asked.lower().partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    rest = int(found[1]) - len(body) if found else 0
    while rest > 0:
        asked += (part := connection.recv(1 << 16))
        rest -= len(part)
    return asked


Question = Callable[[ControlClient], object]
QUESTIONS: tuple[Question, ...] = (
    lambda client: client.status(),
    lambda client: client.list_disks(),
    lambda client: client.jobs(),
    lambda client: client.job(JobId("9" * 32)),
    lambda client: client.metrics(),
    lambda client: client.start_backup(["db", "w\u00e9b"], archive=True),
    lambda client: client.start_backup([], archive=False, rehearsal=True),
    lambda client: client.start_recall(["db"]),
    lambda client: client.cancel_job(JobId("9" * 32)),
    lambda client: client.pause_jobs(paused=True),
    lambda client: client.hold(),
    lambda client: client.reload(),
    lambda client: client.shutdown(force=True),
    lambda client: client.usage("db", days=14),
    lambda client: client.policy(),
    lambda client: client.protect(["db"], protected=True),
)
HTTP_TOKENS = (
    b"\r\n", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"content-length: 99999999999\r\n", b"ffffffff\r\n",
    b"content-length: -1\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 x\r\n", b"HTTP/1.1 500 x\r\n", b"%00",
    b"%ff", b"../", b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"?vm=", b"&", b"#", b"connection: keep-alive\r\n", b" ", b"\0", b"A" * 300, b"[", b'{"a":', b'"\\ud800"',
)  # fmt: skip


class _HttpTarget(Target):
    """HTTP with a JSON body whose length a header tells."""

    tokens = HTTP_TOKENS

    def reseal(self, data: bytes) -> bytes:
        head, gap, body = data.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
        return b"\r\n".join([*lines, b"content-length: %d" % len(body)]) + (gap or b"\r\n\r\n") + body

    def edit_json(self, data: bytes, edit: Edit) -> bytes | None:
        head, gap, body = data.partition(b"\r\n\r\n")
        return head + gap + edit(body) if body else None


class ControlRequestTarget(_HttpTarget):
    """What a client sends to the daemon; the daemon may refuse it, but nothing may fail unexpectedly."""

    name = "control-request"
    permitted = ()
    bound = Bound(base_bytes=8 << 20, per_byte=300, cpu_s=3.0)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._failures: list[str] = []
        handler = _Listener(self._failures)
        logging.getLogger("vmfs_stub.control").addHandler(handler)
        logging.getLogger("vmfs_stub.control").propagate = False

    def seeds(self) -> list[bytes]:
        wire = _Wire(self.place / "record.sock")
        made = []
        for question in QUESTIONS:
            try:
                question(ControlClient(wire.path, timeout_s=5))
            except VmfsStubError:
                made.append(wire.asked)
        wire.close()
        with_query = made[1].replace(b"/v1/disks", b"/v1/disks?vm=db%20x", 1)
        return [*made, with_query]

    def call(self, data: bytes) -> object:
        self._failures.clear()
        answer = trio.run(self._ask, data)
        if self._failures:
            raise Violation("the daemon failed unexpectedly", self._failures[0])
        require(not answer or answer.startswith(b"HTTP/1."), "an answer that is no HTTP")
        require(b"unexpectedly" not in answer, "the daemon failed unexpectedly")
        return answer[:12]

    async def _ask(self, data: bytes) -> bytes:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        answer = bytearray()
        with trio.fail_after(5):
            async with open_jobs(FakeHistory(), running_max=4, kept=10) as jobs, trio.open_nursery() as nursery:
                server = ControlServer(FakeTarget(jobs), Metrics(), backing=BACKING, connections_max=4, idle_s=0.05)
                client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                nursery.start_soon(server.handle, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))

                async def send() -> None:
                    try:
                        await client.send_all(data)
                        await client.send_eof()
                    except trio.BrokenResourceError:
                        pass

                nursery.start_soon(send)
                try:
                    while part := await client.receive_some():
                        answer += part
                except trio.BrokenResourceError:
                    pass
                nursery.cancel_scope.cancel()
        ours.close()
        return bytes(answer)


class _Listener(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self._failures.append(f"{type(cause).__name__}: {record.getMessage()}")


class ControlReplyTarget(_HttpTarget):
    """What a daemon answers to the client; the first byte says which question was asked."""

    name = "control-reply"
    permitted = (VmfsStubError,)
    bound = Bound(base_bytes=8 << 20, per_byte=300, cpu_s=3.0)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._wire = _Wire(place / "reply.sock")

    def close(self) -> None:
        self._wire.close()

    def seeds(self) -> list[bytes]:
        asked = ControlRequestTarget(self.place).seeds()
        made = []
        for number, request in enumerate(asked[: len(QUESTIONS)]):
            answer = trio.run(ControlRequestTarget(self.place)._ask, request)
            made.append(bytes([number]) + answer)
        refused = trio.run(ControlRequestTarget(self.place)._ask, asked[3])
        return [*made, b"\0" + refused]

    def call(self, data: bytes) -> object:
        if not data:
            return None
        self._wire.answer = data[1:]
        reply = QUESTIONS[data[0] % len(QUESTIONS)](ControlClient(self._wire.path, timeout_s=2))
        for row in reply if isinstance(reply, list) else []:
            if isinstance(row, DiskRow):
                bytes_text(row.size_bytes), bytes_text(row.resident_bytes), time_text(row.last_access)
            if isinstance(row, PolicyRow):
                require("\n" not in row.reason, "a reason of several lines")
                bytes_text(row.frees_bytes), f"{row.usable_s:.0f}"
            if isinstance(row, JobInfo):
                time_text(row.started), time_text(row.ended)
        return type(reply)

    def reseal(self, data: bytes) -> bytes:
        return data[:1] + super().reseal(data[1:])

    def edit_json(self, data: bytes, edit: Edit) -> bytes | None:
        edited = super().edit_json(data[1:], edit)
        return None if edited is None else data[:1] + edited


class _DatabaseTarget(Target):
    """A SQLite file; the input is the length of the file in 8 bytes, the file, and its write-ahead log."""

    bound = Bound(base_bytes=8 << 20, cpu_s=3.0)
    tokens = (b"CREATE TABLE", b"jobs", b"\xff", b"user_version", b"TEXT", b"BLOB", b"\0" * 8, b"CHECK", b"[", b"{")
    suffixes: ClassVar = ("", "-wal", "-shm", "-journal")

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.path = place / "one.sqlite"

    def clear(self) -> None:
        """Remove all files."""
        for path in self.place.iterdir():
            path.unlink()

    def put(self, data: bytes) -> None:
        """Make the files that the input says, and no others."""
        self.clear()
        length = int.from_bytes(data[:8], "little")
        self.path.write_bytes(data[8 : 8 + length])
        if log := data[8 + length :]:
            self.path.with_name(f"{self.path.name}-wal").write_bytes(log)

    def take(self) -> bytes:
        """The files as an input."""
        content, log = self.path.read_bytes(), self.path.with_name(f"{self.path.name}-wal")
        return len(content).to_bytes(8, "little") + content + (log.read_bytes() if log.exists() else b"")

    def reseal(self, data: bytes) -> bytes:
        """The log goes away, or the header's count of pages is that of the file: else little is read of it."""
        length = int.from_bytes(data[:8], "little")
        content = bytearray(data[8 : 8 + length])
        if len(content) >= 32:
            struct.pack_into(">I", content, 28, len(content) // 4096)
            content[92:96] = content[24:28]
        return len(content).to_bytes(8, "little") + bytes(content)


class CatalogTarget(_DatabaseTarget):
    """The catalog: a damaged one is set aside, and what is read of a whole one is what it may be."""

    name = "catalog"
    permitted = (PrimaryIOError, NoSpace, UnknownFormat)

    def seeds(self) -> list[bytes]:
        made = []
        for is_closed in (True, False):
            self.clear()
            catalog = Catalog.open(self.path)
            catalog.see_vms([(VmId(f"{number:032x}"), f"vm{number}") for number in range(60)], now=5.0)
            for number in range(30):
                job_id = JobId(f"{number:032x}")
                catalog.start_job(job_id, kind="backup", vms=["a", "b"], caller_uid=0, now=float(number))
                if number % 2:
                    report, error = {"vms": [{"vm": "a", "outcome": "done"}]}, {"error": "InUse", "message": "x"}
                    catalog.end_job(job_id, state="failed", report=report, error=error, now=9.0)
            catalog.record_access(VmId("0" * 32), "disk.raw", executable="/usr/bin/qemu", uid=0, now=7.0)
            used = [(VmId("0" * 32), _sample_at(DAY_S * 20_000 + 300 * number)) for number in range(40)]
            reading = Reading(5.0, GuestState.OFF, Counters(1.0, 2, 3, 4, 5))
            catalog.add_samples(used, readings={"1" * 32: reading}, uses={VmId("0" * 32): LastUse(5.0, 6.0)})
            if is_closed:
                catalog.close()
            made.append(self.take())
            if not is_closed:
                catalog.close()
        return made

    def call(self, data: bytes) -> object:
        self.put(data)
        catalog = Catalog.open(self.path)
        try:
            for value in (*catalog.jobs(count_max=100), *catalog.known_vms(), *catalog.accesses(VmId("0" * 32))):
                json.dumps(repr(value))
            catalog.last_accesses()
            catalog.start_job(JobId("f" * 32), kind="recall", vms=[], caller_uid=1, now=99.0)
            catalog.end_job(JobId("f" * 32), state="done", report={}, error=None, now=100.0)
            catalog.see_vms([(VmId("e" * 32), "new")], now=100.0)
            catalog.record_access(VmId("e" * 32), "d", executable=None, uid=0, now=1.0)
            catalog.forget_jobs(keep=5)
            self._use_samples(catalog)
        finally:
            catalog.close()
        return None

    def _use_samples(self, catalog: Catalog) -> None:
        """Whatever is damaged: no VM was off for longer than the time it is told for, and none twice at once."""
        for vm_id, samples in (
            *catalog.all_samples(0.0).items(),
            (VmId("0" * 32), catalog.samples(VmId("0" * 32), since_s=0.0, until_s=1e12)),
        ):
            require(len(vm_id) > 0, "samples of nobody")
            require(apart(samples) == samples, "samples that nobody can have measured")
        for value in (catalog.readings(), catalog.last_uses()):
            json.dumps(repr(value))
        catalog.add_samples([(VmId("e" * 32), _sample_at(DAY_S * 20_000))], uses={VmId("e" * 32): LastUse(1.0)})
        catalog.roll_samples(DAY_S * 20_003)
        catalog.forget_samples(after_s=DAY_S * 20_001)


def _sample_at(start_s: float) -> Sample:
    return Sample(start_s, start_s + 300, 100.0, 100.0, 1.0, 2.0, None, 3.0, 4, 5, 6, 7)


class ChunkIndexTarget(_DatabaseTarget):
    """The chunk index: a place that it names is right, or it names none."""

    name = "chunk-index"
    permitted = ()
    store_id: ClassVar = StoreId("5a" * 16)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._packs = {PackId(digit * 32): sample_pack(PackId(digit * 32), *_chunks(digit))[1] for digit in "123"}
        self._more = sample_pack(PackId("7" * 32), b"another chunk")[1]
        self._right = {ref.chunk_id: ref for refs in self._packs.values() for ref in refs}

    def seeds(self) -> list[bytes]:
        made = []
        for is_closed in (True, False):
            self.clear()
            index = ChunkIndex(self.path, self.store_id)
            for pack_id, refs in self._packs.items():
                index.add(pack_id, refs)
            with sqlite3.connect(self.path) as database:
                database.execute("INSERT OR IGNORE INTO objects (key) VALUES ('index/1')")
                database.execute("UPDATE packs SET object = 1")
            database.close()
            if is_closed:
                index.close()
            made.append(self.take())
            if not is_closed:
                index.close()
        return made

    def call(self, data: bytes) -> object:
        self.put(data)
        index = ChunkIndex(self.path, self.store_id)
        try:
            found = index.lookup([*self._right, ChunkId(bytes(32))])
            require(all(self._right.get(chunk_id) == ref for chunk_id, ref in found.items()), "a wrong place")
            pack_id = PackId("7" * 32)
            index.add(pack_id, self._more)
            index.forget_packs([pack_id, PackId("1" * 32)])
            still = index.lookup(list(self._right))
            require(all(ref.pack_id != "1" * 32 for ref in still.values()), "a pack that was forgotten")
        finally:
            index.close()
        return None


def _chunks(digit: str) -> list[bytes]:
    return [f"{digit} {number}".encode() * 20 for number in range(50)]
