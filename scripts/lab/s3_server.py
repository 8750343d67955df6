"""A real S3 server on this machine: Ceph's RADOS gateway with one monitor and one object store daemon in a directory.

It persists: started again in the same directory, it has what was put, also after all of it was killed.  Several
processes can share one (`shared_s3`): a keeper, this module run as a program, ends it when the last of them is gone.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from scripts.lab.failure import LabError, run
from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.s3 import S3Credentials, open_s3

_OSD_BYTES: Final = 40 << 30
"""Sparse: what is put takes room, no more."""
_START_DEADLINE_S: Final = 90.0
_STEP_DEADLINE_S: Final = 60.0
_CONFIGURATION: Final = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{mon_port}/0]
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 0
mon osd nearfull ratio = 0.99
mon osd full ratio = 0.995
mon osd backfillfull ratio = 0.99
mon max pg per osd = 1000
ms bind ipv4 = true
run dir = {home}/run
admin socket = {home}/run/$name.$pid.asok
keyring = {home}/$name.keyring
log file = {home}/log/$name.log
[mon]
mon data = {home}/mon
[osd]
osd data = {home}/osd
osd objectstore = bluestore
bluestore block size = {osd_bytes}
osd memory target = 939524096
bluestore fsck quick fix on mount = false
osd class load list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {home}/rgw
rgw enable usage log = false
rgw thread pool size = 64
rgw gc obj min wait = 5
rgw gc processor period = 5
"""


@dataclass(frozen=True, slots=True)
class S3Account:
    """Where an S3 server answers, and for whom."""

    endpoint: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str = "default"


class CephS3:
    """One server in ``home``, an existing directory with a path of at most 60 characters (its sockets lie there)."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._processes: list[subprocess.Popen[bytes]] = []
        self.account = S3Account("", "", "")

    def start(self) -> None:
        """Start it, made anew where there is none yet; returns when it answers.  Raises LabError."""
        settings = self._home / "account.json"
        is_new = not settings.exists()
        if is_new:
            fsid, (port, mon_port) = str(uuid.uuid4()), _free_ports(2)
            for name in ("run", "log", "mon", "osd", "rgw"):
                (self._home / name).mkdir()
            text = _CONFIGURATION.format(fsid=fsid, mon_port=mon_port, port=port, home=self._home, osd_bytes=_OSD_BYTES)
            (self._home / "ceph.conf").write_text(text)
            self._make_monitor(fsid, mon_port)
        try:
            self._launch("ceph-mon", "-i", "a")
            if is_new:
                self._make_osd()
            self._launch("ceph-osd", "-i", "0")
            if is_new:
                ring = str(self._home / "client.rgw.keyring")
                self._ceph("auth", "get-or-create", "client.rgw", "mon", "allow rw", "osd", "allow rwx", "-o", ring)
            self._launch("radosgw", "-n", "client.rgw")
            if is_new:
                user = json.loads(self._run("radosgw-admin", "user", "create", "--uid=vmfs", "--display-name=vmfs"))
                keys = user["keys"][0]
                account = S3Account(f"http://127.0.0.1:{port}", keys["access_key"], keys["secret_key"])
                settings.write_text(json.dumps([account.endpoint, account.access_key_id, account.secret_access_key]))
            self.account = S3Account(*json.loads(settings.read_text()))
            self._wait_answers()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End all of it at once, as a crash does."""
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()

    # Its parts

    def _make_monitor(self, fsid: str, port: int) -> None:
        home = self._home
        rings = home / "mon.keyring", home / "client.admin.keyring"
        self._tool(rings[0], "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        caps = [word for part in ("mon", "osd", "mds", "mgr") for word in ("--cap", part, "allow *")]
        self._tool(rings[1], "--create-keyring", "--gen-key", "-n", "client.admin", *caps)
        self._tool(rings[0], "--import-keyring", str(rings[1]))
        address = f"[v2:127.0.0.1:{port}]"
        command = ["monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, f"{home}/monmap"]
        run(command, deadline_s=_STEP_DEADLINE_S)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{home}/monmap", "--keyring", str(rings[0]))

    def _make_osd(self) -> None:
        self._ceph("config", "set", "mon", "auth_allow_insecure_global_id_reclaim", "false")
        number, secret = str(uuid.uuid4()), _cephx_secret()
        secrets_path = self._home / "osd.0.json"
        secrets_path.write_text(json.dumps({"cephx_secret": secret}))
        self._ceph("osd", "new", number, "-i", str(secrets_path))
        self._tool(self._home / "osd.0.keyring", "--create-keyring", "-n", "osd.0", "--add-key", secret)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number)
        self._ceph("osd", "crush", "add", "osd.0", "1.0", "host=localhost")

    def _launch(self, program: str, *words: str) -> None:
        log = (self._home / "log" / f"{program}.out").open("ab")
        with log:
            command = ["setpriv", "--pdeathsig", "KILL", program, "-c", f"{self._home}/ceph.conf", *words, "-f"]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def _tool(self, ring: Path, *words: str) -> None:
        run(["ceph-authtool", ring, *words], deadline_s=_STEP_DEADLINE_S)

    def _run(self, program: str, *words: str) -> str:
        return run([program, "-c", f"{self._home}/ceph.conf", *words], deadline_s=_STEP_DEADLINE_S)

    def _ceph(self, *words: str) -> None:
        self._run("ceph", "--connect-timeout", "30", *words)

    def _wait_answers(self) -> None:
        until_s = time.monotonic() + _START_DEADLINE_S
        while True:
            if gone := [process.args for process in self._processes if process.poll() is not None]:
                raise LabError(f"{gone} ended at its start; its log is in {self._home}/log")
            try:
                with urllib.request.urlopen(self.account.endpoint, timeout=5):
                    return
            except urllib.error.HTTPError:
                return
            except OSError:
                if time.monotonic() > until_s:
                    raise LabError(f"the S3 server does not answer after {_START_DEADLINE_S:g} s") from None
            time.sleep(0.1)


def _cephx_secret() -> str:
    """A key as ceph-authtool writes it: type, time of creation, length, 16 bytes."""
    now_s = time.time()
    return base64.b64encode(
        struct.pack("<hIIh", 1, int(now_s), int(now_s % 1 * 1e9), 16) + secrets.token_bytes(16)
    ).decode()


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def ceph_s3(home: Path) -> Iterator[CephS3]:
    """A server within the block; killed at its end."""
    server = CephS3(home)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def shared_s3(home: Path) -> Iterator[S3Account]:
    """One server for all processes that name this directory, which is made and removed; see the module."""
    users = _lock_shared(home)
    try:
        with (home / "starting").open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            if not (home / "ready").exists():
                _launch_keeper(home)
        yield S3Account(*json.loads((home / "account.json").read_text()))
    finally:
        os.close(users)


def _lock_shared(home: Path) -> int:
    while True:
        home.mkdir(exist_ok=True)
        fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if home.exists() and os.fstat(fd).st_ino == home.stat().st_ino:
            return fd
        os.close(fd)  # its keeper has just removed it


def _launch_keeper(home: Path) -> None:
    until_s = time.monotonic() + 2 * _START_DEADLINE_S
    command = [sys.executable, "-m", "scripts.lab.s3_server", str(home)]
    with (home / "keeper.log").open("ab") as log:
        keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    while not (home / "ready").exists():
        if keeper.poll() is not None or time.monotonic() > until_s:
            raise LabError(f"the S3 server did not start:\n{(home / 'keeper.log').read_text()[-2000:]}")
        time.sleep(0.05)
    keeper.returncode = 0  # it outlives this process, and nobody waits for it


def _keep(home: Path) -> None:
    """Run the server of a directory until nobody holds a lock on it any more, however they ended; then remove it."""
    with ceph_s3(home):
        (home / "ready").touch()
        fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    shutil.rmtree(home)


def add_key(home: Path) -> S3Account:
    """Another key of the account of the server in ``home``."""
    known = S3Account(*json.loads((home / "account.json").read_text()))
    access_key_id, secret = secrets.token_hex(10), secrets.token_hex(20)
    _administer(home, "key", "create", f"--access-key={access_key_id}", f"--secret-key={secret}")
    return replace(known, access_key_id=access_key_id, secret_access_key=secret)


def remove_key(home: Path, account: S3Account) -> None:
    """Take a key that was added away; the server may go on to take it for a moment."""
    _administer(home, "key", "rm", f"--access-key={account.access_key_id}")


def _administer(home: Path, *words: str) -> None:
    command = ["radosgw-admin", "-c", f"{home}/ceph.conf", *words, "--uid=vmfs", "--key-type=s3"]
    run(command, deadline_s=_STEP_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket on an S3 server."""

    account: S3Account
    name: str

    def url(self, prefix: str = "") -> str:
        """Its URL, as an operator writes it."""
        return f"s3://{self.name}/{prefix}?endpoint={self.account.endpoint}&region={self.account.region}"

    @property
    def credentials(self) -> S3Credentials:
        """Who may use it."""
        return S3Credentials(self.account.access_key_id, self.account.secret_access_key)

    def objects(self, prefix: str = "", *, timeout_s: float = 20) -> RemoteObjects:
        """What is in it, without retries."""
        return open_s3(self.url(prefix), self.credentials, timeout_s=timeout_s, transfer_timeout_s=3 * timeout_s)

    def through(self, endpoint: str) -> Bucket:
        """The same, asked at another endpoint: that of a proxy."""
        return replace(self, account=replace(self.account, endpoint=endpoint))


def new_bucket(account: S3Account) -> Bucket:
    """Make a bucket of its own, empty."""
    bucket = Bucket(account, f"bucket-{secrets.token_hex(8)}")
    # In the virtual-hosted style an endpoint is a bucket, so that a put of a name at the server's own makes one.
    url = f"s3://{bucket.name}/?endpoint={account.endpoint}&region={account.region}&path_style=false"
    with suppress(StoreUnavailable):  # it answers without an ETag
        open_s3(url, bucket.credentials, timeout_s=_STEP_DEADLINE_S, transfer_timeout_s=_STEP_DEADLINE_S).put(
            bucket.name, b"", if_absent=False
        )
    return bucket


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
