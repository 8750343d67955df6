"""What can be set for a mount."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSettings:
    """Limits and times of one mount; ``name`` is the datastore's and appears in the list of mounts.

    ``attr_timeout_s`` may be long, since only the daemon changes the backing directory; a placeholder's st_blocks
    changes while it is recalled, so its attributes are kept for ``placeholder_attr_timeout_s``.  ``requests_max``
    are answered at once; it must be well above the recalls that may wait, or a wait for them stops `stat`.  Beyond
    ``nodes_wanted_max`` inodes, and beyond a quarter of the descriptors, the kernel is made to forget those that nobody
    uses.
    """

    name: str = "vmfs-stub"
    allow_other: bool = True
    attr_timeout_s: float = 3600.0
    placeholder_attr_timeout_s: float = 1.0
    max_background: int = 1024
    max_write_bytes: int = 1024 * 1024
    readahead_bytes: int = 1024 * 1024
    requests_max: int = 4096
    nodes_wanted_max: int = 1 << 19
    start_timeout_s: float = 10.0
    shutdown_grace_s: float = 5.0
