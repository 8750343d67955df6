"""Telling the service manager that the datastore is served (sd_notify(3)); where there is none, nothing is told."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def tell_ready(environment: Mapping[str, str] = os.environ) -> None:
    """Say READY=1; does not wait, and failing is worth a warning only."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(b"READY=1", address)
    except OSError as exc:
        log.warning("the service manager at %s cannot be told that the datastore is served: %s", address, exc)
