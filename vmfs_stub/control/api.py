"""The control API as an ASGI application: HTTP on one side, a ControlTarget on the other.

Every reply is JSON but that of /metrics.  A failure is an ErrorInfo with a status of 4xx or 5xx; the client goes by
the class name in it, never by the status.  Every command that changes something is logged with its caller.
A request may name the backing directory that it is for, and is refused when this daemon serves another one: two
datastores can be configured to the same socket.
Must not know sockets: the caller's Peer is in the request's scope, put there by the server.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import unquote

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vmfs_stub.control import messages
from vmfs_stub.control.metrics import CONTENT_TYPE, Metrics
from vmfs_stub.control.peer import Peer
from vmfs_stub.control.target import ControlTarget
from vmfs_stub.core.errors import ConfigError, NotFound, OtherDatastore, Refused, VmfsStubError
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.wrapped_errors import unwrapped
from vmfs_stub.services.adoption_choice import Told

PEER_KEY = "vmfs_stub.peer"
REQUEST_BYTES_MAX = 16 << 20
WAIT_S_MAX = 10.0
USAGE_DAYS_MAX = 730

DISKS = TypeAdapter(list[messages.DiskRow])
JOBS = TypeAdapter(list[messages.JobInfo])
POLICY = TypeAdapter(list[messages.PolicyRow])

Endpoint = Callable[[Request], Awaitable[Response]]

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger(__name__)


class ControlApi:
    """Handlers of all routes; `application` makes the ASGI application.  ``backing`` is what ``target`` serves."""

    def __init__(self, target: ControlTarget, metrics: Metrics, *, backing: Path) -> None:
        self._target = target
        self._backing = messages.backing_name(backing)
        self._metrics = metrics
        self._requests = metrics.counter("control_requests", "Requests to the control socket", ("route", "outcome"))

    def application(self) -> Starlette:
        """All routes, each behind the error boundary."""
        get, post = ["GET"], ["POST"]
        routes: list[tuple[str, Endpoint, list[str]]] = [
            ("/v1/disks", self._disks, get),
            ("/v1/usage", self._usage, get),
            ("/v1/status", self._status, get),
            ("/v1/policy", self._policy, get),
            ("/v1/protect", self._protect, post),
            ("/v1/hold", self._hold, post),
            ("/v1/unhold", self._unhold, post),
            ("/v1/reload", self._reload, post),
            ("/v1/shutdown", self._shutdown, post),
            ("/v1/backup", self._backup, post),
            ("/v1/archive", self._archive, post),
            ("/v1/recall", self._recall, post),
            ("/v1/adopt", self._adopt, post),
            ("/v1/jobs", self._jobs, get),
            ("/v1/jobs/pause", self._pause, post),
            ("/v1/jobs/unpause", self._unpause, post),
            ("/v1/jobs/{job_id}", self._job, get),
            ("/v1/jobs/{job_id}/cancel", self._cancel, post),
            ("/metrics", self._metrics_text, get),
        ]
        return Starlette(routes=[Route(path, self._bounded(path, end), methods=how) for path, end, how in routes])

    def _bounded(self, route: str, endpoint: Endpoint) -> Endpoint:
        """Turn every failure of ``endpoint`` into a reply; nothing may reach, and stop, the daemon."""

        async def handle(request: Request) -> Response:
            try:
                await self._refuse_other(request)
                response = await endpoint(request)
            except ClientDisconnect:
                self._requests.labels(route, "disconnected").inc()
                return _NoReply()
            except Exception as exc:
                return self._failed(route, exc)
            self._requests.labels(route, "ok").inc()
            return response

        return handle

    async def _refuse_other(self, request: Request) -> None:
        named = request.headers.get(messages.BACKING_HEADER)
        if named is not None and named != self._backing:
            await _received(request)  # a client that still sends would not see the reply
            raise OtherDatastore(
                f"the daemon that answers serves {unquote(self._backing)}, not {unquote(named)}: give one of these two "
                "another datastore.runtime_dir"
            )

    def _failed(self, route: str, error: Exception) -> Response:
        cause = unwrapped(error)
        if isinstance(cause, VmfsStubError):
            self._requests.labels(route, type(cause).__name__).inc()
            return _json(messages.error_info(cause), status=_status_of(cause))
        log.error("control request %s failed unexpectedly", route, exc_info=error)
        self._requests.labels(route, "unexpected").inc()
        text = f"the daemon failed unexpectedly ({type(cause).__name__}: {cause}); its log has the traceback"
        return _json(messages.ErrorInfo(error=VmfsStubError.__name__, message=text), status=500)

    async def _disks(self, request: Request) -> Response:
        rows = await self._target.list_disks(request.query_params.get("vm"))
        return Response(DISKS.dump_json(rows), media_type="application/json")

    async def _usage(self, request: Request) -> Response:
        vm = request.query_params.get("vm")
        if vm is None:
            raise ConfigError("name a VM")
        return _json(await self._target.vm_usage(vm, days=_days(request)))

    async def _status(self, request: Request) -> Response:
        return _json(await self._target.status())

    async def _policy(self, request: Request) -> Response:
        return Response(POLICY.dump_json(await self._target.policy()), media_type="application/json")

    async def _protect(self, request: Request) -> Response:
        body = await _body(request, messages.ProtectRequest)
        _require_vms(body)
        peer = _logged(request, "protect", body.vms, protected=body.protected)
        await self._target.protect(body.vms, protected=body.protected, peer=peer)
        return Response(status_code=204)

    async def _hold(self, request: Request) -> Response:
        await self._target.hold(peer=_logged(request, "hold"))
        return Response(status_code=204)

    async def _unhold(self, request: Request) -> Response:
        await self._target.unhold(peer=_logged(request, "unhold"))
        return Response(status_code=204)

    async def _reload(self, request: Request) -> Response:
        return _json(messages.Reloaded(changed=await self._target.reload(peer=_logged(request, "reload"))))

    async def _shutdown(self, request: Request) -> Response:
        body = await _body(request, messages.ShutdownRequest)
        await self._target.shutdown(force=body.force, peer=_logged(request, "unmount", force=body.force))
        return Response(status_code=204)

    async def _backup(self, request: Request) -> Response:
        body = await _body(request, messages.JobRequest)
        flags = {"archive": body.archive, **({"rehearsal": True} if body.rehearsal else {})}
        peer = _logged(request, "backup", body.vms, **flags)
        return _started(await self._target.start_backup(body.vms, **flags, peer=peer))

    async def _archive(self, request: Request) -> Response:
        body = await _body(request, messages.JobRequest)
        _require_vms(body)
        return _started(await self._target.start_archive(body.vms, peer=_logged(request, "archive", body.vms)))

    async def _recall(self, request: Request) -> Response:
        body = await _body(request, messages.JobRequest)
        _require_vms(body)
        return _started(await self._target.start_recall(body.vms, peer=_logged(request, "recall", body.vms)))

    async def _adopt(self, request: Request) -> Response:
        body = await _body(request, messages.AdoptRequest)
        if bool(body.vms) == body.everything:
            raise ConfigError("name at least one VM, or all of them, and not both")
        told = Told(force=body.force, accept_loss=body.accept_loss)
        flags = {"everything": body.everything, "force": body.force, "accept_loss": body.accept_loss}
        peer = _logged(request, "adopt", body.vms, **flags)
        return _started(await self._target.start_adopt(body.vms, everything=body.everything, told=told, peer=peer))

    async def _jobs(self, request: Request) -> Response:
        return Response(JOBS.dump_json(await self._target.jobs()), media_type="application/json")

    async def _job(self, request: Request) -> Response:
        return _json(await self._target.job(JobId(request.path_params["job_id"]), wait_s=_wait_s(request)))

    async def _cancel(self, request: Request) -> Response:
        job_id = JobId(request.path_params["job_id"])
        await self._target.cancel_job(job_id, peer=_logged(request, "cancelling a job"))
        return Response(status_code=204)

    async def _pause(self, request: Request) -> Response:
        await self._target.pause_jobs(paused=True, peer=_logged(request, "pausing backup jobs"))
        return Response(status_code=204)

    async def _unpause(self, request: Request) -> Response:
        await self._target.pause_jobs(paused=False, peer=_logged(request, "unpausing backup jobs"))
        return Response(status_code=204)

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})


def _wait_s(request: Request) -> float:
    """How long an answer may wait for the job's end, in seconds.  Raises ConfigError."""
    text = request.query_params.get("wait_s", "0")
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s <= WAIT_S_MAX:
        raise ConfigError(f"wait_s must be a number from 0 to {WAIT_S_MAX:g}")
    return wait_s


def _days(request: Request) -> int:
    """How many days are asked for.  Raises ConfigError."""
    text = request.query_params.get("days", "14")
    days = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(USAGE_DAYS_MAX)) else 0
    if not 1 <= days <= USAGE_DAYS_MAX:
        raise ConfigError(f"days must be a whole number from 1 to {USAGE_DAYS_MAX}")
    return days


def _logged(request: Request, command: str, vms: Sequence[str] = (), **options: bool) -> Peer:
    """The caller, after logging what it commands."""
    peer = cast(Peer, request.scope[PEER_KEY])
    details = "".join(f" {name}={value}" for name, value in options.items())
    names = f" of {', '.join(map(repr, vms))}" if vms else ""
    log.info("%s%s%s commanded by uid %d (pid %d)", command, names, details, peer.uid, peer.pid)
    return peer


class _NoReply(Response):
    """Sends nothing: the client is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


async def _received(request: Request) -> bytes:
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > REQUEST_BYTES_MAX:
            raise ConfigError(f"the request is larger than {REQUEST_BYTES_MAX} bytes")
    return bytes(received)


async def _body(request: Request, model: type[M]) -> M:
    content = await _received(request) or b"{}"
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        raise ConfigError(f"the request cannot be used: {exc.errors()[0]['msg']}") from exc


def _require_vms(body: messages.JobRequest | messages.ProtectRequest) -> None:
    if not body.vms:
        raise ConfigError("name at least one VM")


def _json(message: BaseModel, *, status: int = 200) -> Response:
    return Response(message.model_dump_json(), status_code=status, media_type="application/json")


def _started(job_id: JobId) -> Response:
    return _json(messages.JobStarted(job_id=job_id), status=202)


def _status_of(error: VmfsStubError) -> int:
    if isinstance(error, NotFound):
        return 404
    if isinstance(error, Refused):
        return 409
    return 400 if isinstance(error, ConfigError) else 500
