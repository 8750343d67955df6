"""libvirt's binding: whether it is there, its event loop, its errors.

It is an extra (``vmfs-stub[libvirt]``), and imported here alone, when it is first needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from vmfs_stub.core.errors import HypervisorAway

_SOCKETS: Final = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
"""Of the one libvirtd, and of the daemon for QEMU alone that newer hosts have."""

_loop_lock = threading.Lock()
_loop_runs = False


def has_binding() -> bool:
    """Whether the extra is installed."""
    try:
        import libvirt  # noqa: F401
    except ImportError:
        return False
    return True


def sockets_of(uri: str) -> tuple[Path, ...]:
    """Where libvirt of this URI may have its socket; empty for one that has none here (``qemu+ssh:``, say)."""
    parts = urlsplit(uri)
    named = parse_qs(parts.query).get("socket")
    if named:
        return (Path(named[0]),)
    return _SOCKETS if parts.scheme in ("qemu", "qemu+unix") and parts.path == "/system" and not parts.netloc else ()


def has_socket(uri: str) -> bool:
    """Whether libvirt of this URI has its socket here, or somebody who starts it when it is asked."""
    return any(socket.exists() for socket in sockets_of(uri))


def the_binding() -> Any:
    """The binding, silenced: what goes wrong is raised, and not printed as well."""
    try:
        import libvirt
    except ImportError as exc:
        raise HypervisorAway(
            "the libvirt binding is not installed: pip install 'vmfs-stub[libvirt]', or set [libvirt] enabled = false"
        ) from exc
    return libvirt


def run_event_loop(libvirt: Any) -> None:
    """libvirt's own event loop, once for the process, in a thread that ends with it."""
    global _loop_runs  # noqa: PLW0603 - so is libvirt's
    with _loop_lock:
        if _loop_runs:
            return
        libvirt.registerErrorHandler(_say_nothing, None)
        libvirt.virEventRegisterDefaultImpl()

        def turn() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=turn, name="libvirt events", daemon=True).start()
        _loop_runs = True


def _say_nothing(_context: object, _error: object) -> None:
    pass


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise HypervisorAway, which begins with ``what`` was tried, for libvirt's own errors."""
    libvirt = the_binding()
    try:
        yield
    except libvirt.libvirtError as exc:
        raise HypervisorAway(f"{what}: {said(exc)}") from exc


def said(exc: Any) -> str:
    """What libvirt says of an error of its own."""
    return str(exc.get_error_message() or exc)
