"""Names: those that vmfs-stub leaves on primary storage, and how those that users choose are shown."""

from __future__ import annotations

PRIVATE_DIR = ".vmfs-stub"
"""Directory in the backing directory that holds private state; never shown, never a VM."""

LOCK_FILE = "lock"
"""File in it that the serving daemon has locked."""

MAPS_DIR = "maps"
"""Directory in it, and in the runtime directory, with the residency maps of placeholders."""

ORPHANS_DIR = "orphans"
"""Directory in it with a link to each open file whose last name is gone."""

ADOPTING_DIR = "adopting"
"""Directory in it where VMs are made that come from the store alone, before they have their place."""

FROZEN_DIR = "frozen"
"""Directory in it for what is kept of disks as they were at one moment, while they are backed up and used."""

CHANGES_DIR = "changes"
"""Directory in it, and in the runtime directory, with what changed since the last backups."""

DATASTORE_FILE = "datastore"
"""File in it that says which datastore this is."""

CLAIMS_DIR = "claims"
"""Directory in it with a note of each claim that the datastore holds."""

STOPPED_DIR = "stopped"
"""Directory in it with a note of each guest that a job has asked to stop."""

THAWS_DIR = "thaws"
"""Directory in it with a note of each guest whose filesystems a backup has frozen, and has to thaw."""

RESERVE_FILE = "reserve"
"""File in it that keeps space back."""

XATTR_PREFIX = "trusted.vmfs-stub."
"""Every extended attribute of ours starts so; ``trusted.*`` needs CAP_SYS_ADMIN."""

VM_XATTR = XATTR_PREFIX + "vm"
"""Identity of a VM, on its top directory or top file."""

PROTECTED_XATTR = XATTR_PREFIX + "protected"
"""On the top directory or top file of a VM that must never be archived; its value is no matter."""

RECALLED_XATTR = XATTR_PREFIX + "recalled"
"""On a file that was a placeholder: when it became an ordinary file again, nanoseconds since the epoch in digits."""

TOP_MODE_XATTR = XATTR_PREFIX + "mode"
"""Mode that the top directory shows through the mount, as octal digits; the backing directory itself stays 0700."""

PLACEHOLDER_XATTR = XATTR_PREFIX + "placeholder"
"""Record that makes a file a placeholder."""


def printable(name: str) -> str:
    """``name`` with bytes that are not UTF-8, and control characters, written as escapes; what is printable stays."""
    text = name.encode("utf-8", "surrogateescape" if _is_of_bytes(name) else "backslashreplace")
    shown = text.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


def _is_of_bytes(name: str) -> bool:
    """Whether every lone surrogate stands for a byte, as in file names."""
    return not any("\ud800" <= char < "\udc80" or "\udcff" < char <= "\udfff" for char in name)
