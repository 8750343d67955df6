"""What a hypervisor sees of files, but for what is in them: compared before and after they were placeholders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

Described = Mapping[str, object]


def described(path: Path) -> Described:
    """Owner, mode, size and modification time of a name, and its attributes or where it links to."""
    st = path.lstat()
    names = [] if path.is_symlink() else sorted(os.listxattr(path))
    return {
        "owner": (st.st_uid, st.st_gid),
        "mode": oct(st.st_mode),
        "size": 0 if path.is_dir() else st.st_size,
        "mtime_ns": st.st_mtime_ns,
        "links to": path.readlink() if path.is_symlink() else None,
        "xattrs": {name: os.getxattr(path, name) for name in names},
    }


def appearance(top: Path) -> dict[Path, Described]:
    """All that is below a directory, by the path from there."""
    return {path.relative_to(top): described(path) for path in sorted(top.rglob("*"))}
