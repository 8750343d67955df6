"""The daemon's control API as seen by the CLI: blocking calls that return messages and raise the daemon's errors.

Must not know what is printed.  Every request has a time limit; waiting for a job goes on as long as the daemon says
that it runs.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, TypeAdapter, ValidationError

from vmfs_stub.control import messages
from vmfs_stub.core.errors import DaemonUnreachable
from vmfs_stub.core.ids import JobId

T = TypeVar("T")

REPLY_BYTES_MAX: Final = 256 << 20
_PIECE_BYTES: Final = 1 << 16
_POLL_S_MIN, _POLL_S_MAX = 0.05, 1.0

_DISKS = TypeAdapter(list[messages.DiskRow])
_JOBS = TypeAdapter(list[messages.JobInfo])
_POLICY = TypeAdapter(list[messages.PolicyRow])


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    content: bytes


class _BoundedSocket(socket.socket):
    """Receives until a deadline for all of it, and no more than a bound: whoever answers need not be a daemon."""

    deadline_s = 0.0
    received = 0

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        """As of a socket; raises TimeoutError, OSError."""
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.settimeout(left_s)
        count = super().recv_into(*arguments, **options)
        self.received += count
        if self.received > REPLY_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, f"the answer is larger than {REPLY_BYTES_MAX} bytes")
        return count


class _UnixConnection(HTTPConnection):
    """HTTP over a unix socket; ``timeout_s`` is for the whole of an answer."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        super().__init__("vmfs-stub", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = sock = _BoundedSocket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.deadline_s = time.monotonic() + self._timeout_s
        sock.settimeout(self._timeout_s)
        sock.connect(str(self._path))


def _content(response: HTTPResponse) -> bytes:
    """The whole body; in pieces, since asked for at once it would be given as much memory as its length claims."""
    parts = []
    while part := response.read(_PIECE_BYTES):
        parts.append(part)
    if response.length:
        raise IncompleteRead(b"", response.length)
    return b"".join(parts)


class ControlClient:
    """Commands for the daemon at ``socket_path``; each makes a connection of its own, which costs nothing here.

    With ``backing``, a daemon that serves another directory refuses them all (OtherDatastore).

    Every method raises DaemonUnreachable, and what the daemon raised.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        backing: Path | None = None,
        timeout_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = socket_path
        self._headers = {"connection": "close"}
        if backing is not None:
            self._headers[messages.BACKING_HEADER] = messages.backing_name(backing)
        self._timeout_s = timeout_s
        self._sleep = sleep

    def list_disks(self, vm: str | None = None) -> list[messages.DiskRow]:
        """Rows of all disks, or of those of one VM."""
        query = "" if vm is None else "?" + urlencode({"vm": vm}, errors="replace")
        return self._parsed(_DISKS, self._send("GET", f"/v1/disks{query}"))

    def usage(self, vm: str, *, days: int) -> messages.VmUsage:
        """How a VM was used in the last ``days``."""
        query = urlencode({"vm": vm, "days": days}, errors="replace")
        return self._parsed(TypeAdapter(messages.VmUsage), self._send("GET", f"/v1/usage?{query}"))

    def status(self) -> messages.Status:
        """What the daemon knows about itself."""
        return self._parsed(TypeAdapter(messages.Status), self._send("GET", "/v1/status"))

    def policy(self) -> list[messages.PolicyRow]:
        """What a backup job's policy would do now with each VM."""
        return self._parsed(_POLICY, self._send("GET", "/v1/policy"))

    def protect(self, vms: Sequence[str], *, protected: bool) -> None:
        """Never archive these VMs, or allow it again."""
        self._send("POST", "/v1/protect", messages.ProtectRequest(vms=list(vms), protected=protected))

    def hold(self) -> None:
        """Refuse new recalls."""
        self._send("POST", "/v1/hold")

    def unhold(self) -> None:
        """Allow recalls again."""
        self._send("POST", "/v1/unhold")

    def reload(self) -> list[str]:
        """Let the daemon read its configuration again; returns the keys that changed."""
        return self._parsed(TypeAdapter(messages.Reloaded), self._send("POST", "/v1/reload")).changed

    def shutdown(self, *, force: bool) -> None:
        """Unmount and stop the daemon; when this returns it is unmounted, but the process may still be ending."""
        self._send("POST", "/v1/shutdown", messages.ShutdownRequest(force=force))

    def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False) -> JobId:
        """Start a backup of these VMs, or of all; with ``rehearsal`` the job only says what it would do."""
        return self._start("/v1/backup", messages.JobRequest(vms=list(vms), archive=archive, rehearsal=rehearsal))

    def start_archive(self, vms: Sequence[str]) -> JobId:
        """Start to make placeholders of these VMs."""
        return self._start("/v1/archive", messages.JobRequest(vms=list(vms)))

    def start_recall(self, vms: Sequence[str]) -> JobId:
        """Start to bring these VMs back in full."""
        return self._start("/v1/recall", messages.JobRequest(vms=list(vms)))

    def start_adopt(
        self, vms: Sequence[str], *, everything: bool = False, force: bool = False, accept_loss: bool = False
    ) -> JobId:
        """Start to make placeholders of these VMs of the store, or of all that are not here."""
        request = messages.AdoptRequest(vms=list(vms), everything=everything, force=force, accept_loss=accept_loss)
        return self._start("/v1/adopt", request)

    def job(self, job_id: JobId, *, wait_s: float = 0) -> messages.JobInfo:
        """State of one job when it has ended, or after so many seconds."""
        path = f"/v1/jobs/{quote(job_id, safe='')}?{urlencode({'wait_s': wait_s})}"
        return self._parsed(TypeAdapter(messages.JobInfo), self._send("GET", path))

    def jobs(self) -> list[messages.JobInfo]:
        """Running and recent jobs, newest first."""
        return self._parsed(_JOBS, self._send("GET", "/v1/jobs"))

    def cancel_job(self, job_id: JobId) -> None:
        """Tell a running job to end where it is."""
        self._send("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel")

    def pause_jobs(self, *, paused: bool) -> None:
        """Pause backup jobs, or let them go on."""
        self._send("POST", f"/v1/jobs/{'pause' if paused else 'unpause'}")

    def metrics(self) -> str:
        """The daemon's metrics as text."""
        return self._send("GET", "/metrics").content.decode("utf-8", "replace")

    def wait_job(self, job_id: JobId, on_progress: Callable[[messages.JobInfo], None]) -> messages.JobInfo:
        """Return when the job is no longer running; ``on_progress`` sees how far it is now and then.

        A failed job is returned.
        """
        poll_s = _POLL_S_MIN
        while True:
            asked_s = time.monotonic()
            info = self.job(job_id, wait_s=poll_s)
            on_progress(info)
            if info.state != "running":
                return info
            self._sleep(max(0.0, asked_s + poll_s - time.monotonic()))  # of a daemon that does not know how to wait
            poll_s = min(poll_s * 1.5, _POLL_S_MAX)

    def _start(self, path: str, request: BaseModel) -> JobId:
        reply = self._send("POST", path, request)
        return self._parsed(TypeAdapter(messages.JobStarted), reply).typed()

    def _send(self, method: str, path: str, body: BaseModel | None = None) -> _Reply:
        connection = _UnixConnection(self._path, timeout_s=self._timeout_s)
        try:
            content = None if body is None else body.model_dump_json().encode()  # text it would send as Latin-1
            connection.request(method, path, body=content, headers=self._headers)
            with connection.getresponse() as response:
                reply = _Reply(response.status, _content(response))
        except TimeoutError as exc:
            raise DaemonUnreachable(
                f"the daemon on {self._path} gave no answer within {self._timeout_s:g} s; look at its log"
            ) from exc
        except PermissionError as exc:
            raise DaemonUnreachable(f"{self._path} cannot be opened ({exc.strerror}); be root") from exc
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise DaemonUnreachable(
                f"no daemon answers on {self._path} ({exc.strerror}); start it with `vmfs-stub mount`"
            ) from exc
        except (OSError, HTTPException) as exc:
            raise DaemonUnreachable(f"the daemon on {self._path} broke off ({exc}); look at its log") from exc
        finally:
            connection.close()
        if 200 <= reply.status < 300:
            return reply
        raise messages.error_of(self._parsed(TypeAdapter(messages.ErrorInfo), reply))

    def _parsed(self, adapter: TypeAdapter[T], reply: _Reply) -> T:
        try:
            return adapter.validate_json(reply.content)
        except ValidationError as exc:
            raise DaemonUnreachable(
                f"what answers on {self._path} does not speak this version's API (status {reply.status}); "
                "restart the daemon after an upgrade"
            ) from exc
