"""How messages and lists name the file of a disk."""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.names import printable


@dataclass(frozen=True, slots=True)
class DiskName:
    """The VM that a file belongs to ("" where that cannot be told), and its path below the backing directory.

    Both are printable.
    """

    vm: str
    path: str

    @classmethod
    def of(cls, path: str) -> DiskName:
        """The name of the file with that path below the backing directory."""
        path = printable(path)
        vm, slash, _ = path.partition("/")
        return cls(vm if slash else vm.rsplit(".", 1)[0], path)

    def __str__(self) -> str:
        return f"VM {self.vm}, disk {self.path}" if self.vm else self.path


def disk_label(path: str) -> str:
    """How messages name the file with that path below the backing directory."""
    return str(DiskName.of(path))
