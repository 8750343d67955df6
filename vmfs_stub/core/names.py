"""Names that vmfs-stub leaves on primary storage, and that no path of a guest's user may reach."""

from __future__ import annotations

PRIVATE_DIR = ".vmfs-stub"
"""Directory in the backing directory that holds private state; never shown, never a VM."""

XATTR_PREFIX = "trusted.vmfs-stub."
"""Every extended attribute of ours starts so; ``trusted.*`` needs CAP_SYS_ADMIN."""

VM_XATTR = XATTR_PREFIX + "vm"
"""Identity of a VM, on its top directory or top file."""

TOP_MODE_XATTR = XATTR_PREFIX + "mode"
"""Mode that the top directory shows through the mount, as octal digits; the backing directory itself stays 0700."""

PLACEHOLDER_XATTR = XATTR_PREFIX + "placeholder"
"""Record that makes a file a placeholder."""
