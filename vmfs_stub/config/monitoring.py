"""The section ``[monitoring]``: where metrics are, and what counts as unhealthy."""

from __future__ import annotations

import ipaddress

from pydantic import Field, field_validator

from vmfs_stub.config.values import Section


class MonitoringConfig(Section):
    """What is told of this datastore, and when that is unhealthy; a limit of 0 is none.

    Without ``listen`` metrics are on the control socket alone.  Of more than ``vms_max`` VMs, those beyond share a
    series.
    """

    listen: str = ""
    connections_max: int = Field(default=16, ge=1, le=1024)
    vms_max: int = Field(default=1000, ge=0, le=100_000)
    backup_age_max_hours: float = Field(default=0, ge=0, le=876_000)
    recall_failure_hours: float = Field(default=1, ge=0, le=876_000)
    free_percent_min: float = Field(default=1, ge=0, lt=100)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value:
            listen_address(value)
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """IP address and port to listen on; None where there is none."""
        return listen_address(self.listen) if self.listen else None


def listen_address(text: str) -> tuple[str, int]:
    """IP address and port of ``"127.0.0.1:9640"`` or ``"[::1]:9640"``.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise ValueError('must be an IP address and a port from 1 to 65535, as in "127.0.0.1:9640" or "[::1]:9640"')
    is_bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if is_bracketed else host)
    except ValueError:
        raise ValueError(
            f"{host!r} is no IP address (names are not looked up): write one, as in 127.0.0.1:9640 or [::1]:9640"
        ) from None
    if is_bracketed != (address.version == 6) or "%" in host:
        raise ValueError("an IPv6 address, and no other, is written in brackets and without a zone, as in [::1]:9640")
    return str(address), int(port)
