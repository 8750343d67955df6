"""The sections ``[recall]`` and ``[hydration]``: how what is absent comes back."""

from __future__ import annotations

from pydantic import Field

from vmfs_stub.config.values import ByteCount, Section


class RecallConfig(Section):
    """Bringing absent bytes back while a guest waits."""

    recall_deadline_s: float = Field(default=25, gt=0, le=3600)
    recall_concurrency: int = Field(default=16, ge=1, le=1024)
    recall_bytes_max: ByteCount = 64 << 20
    recall_queue_max: int = Field(default=1024, ge=1, le=2048)
    store_timeout_s: float = Field(default=10, gt=0, le=3600)


class HydrationConfig(Section):
    """Bringing the rest back in the background; ``bytes_per_s_max`` of 0 is no limit."""

    enabled: bool = True
    bytes_per_s_max: ByteCount = 0
