"""Imports go one way, and every failure has an exit code and an errno.

All imports are read from the syntax tree: those in functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vmfs_stub
from vmfs_stub.cli.exit_codes import EXIT_CODE_BY_TYPE, ExitCode, exit_code_of
from vmfs_stub.core import errors
from vmfs_stub.mount.errno_table import ERRNO_BY_TYPE, errno_of

PACKAGE = "vmfs_stub"
ROOT = Path(vmfs_stub.__file__).parent
ADAPTERS = frozenset({"store", "primary", "catalog", "inventory"})

# What each part may import of ours, besides itself: a part, or one module of a part.
ALLOWED: Mapping[str, frozenset[str]] = {
    "": frozenset(),
    "core": frozenset(),
    "directory_sync": frozenset(),
    "paced_io": frozenset(),
    **{adapter: frozenset({"core", "directory_sync", "paced_io"}) for adapter in ADAPTERS},
    "config": frozenset({"core"}),
    "services": frozenset({"core", "paced_io"}) | ADAPTERS,
    "mover": frozenset({"core", "paced_io", "primary", "services", "store"}),
    "mount": frozenset({"core", "config", "services"}),
    "control": frozenset({"core", "config", "services"}),
    "cli": frozenset({"core", "config", "directory_sync", "services", "store"})
    | {"control.client", "control.messages", "inventory.domain", "mount.mountpoint"},
}
WIRING = frozenset(
    {
        "daemon",
        "daemon_reload",
        "daemon_settings",
        "datastore",
        "datastore_backups",
        "datastore_jobs",
        "datastore_listing",
        "datastore_metrics",
        "datastore_monitoring",
        "datastore_policy",
        "datastore_rebuild",
        "datastore_recalls",
        "datastore_reports",
        "datastore_status",
        "datastore_usage",
        "settings",
    }
)
"""What puts the parts together: may import all but the CLI, and only `mount` may import it."""
STARTS_THE_DAEMON = ("cli/mount.py", "daemon")

ALSO_NOT_IN_CORE = frozenset({"trio", "os", "logging", "time", "socket", "sqlite3", "threading", "io", "subprocess"})


def part_of(path: Path, root: Path) -> str:
    """The part that a module belongs to: its folder, or its own name at the top."""
    relative = path.relative_to(root)
    part = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    return "" if part == "__init__" else part


def imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a module imports, ours without the package's name and with a leading dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *path.relative_to(root).parent.parts]
                base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name.removeprefix(PACKAGE) if name == PACKAGE or name.startswith(f"{PACKAGE}.") else name


def violations(root: Path) -> list[str]:
    """Every import that the rule forbids, as one line each."""
    found = []
    for path in sorted(root.rglob("*.py")):
        part = part_of(path, root)
        for name in imports(path, root):
            if part == "core" and name.split(".")[0] in ALSO_NOT_IN_CORE:
                found.append(f"{path.relative_to(root)} imports {name}: core is pure")
            if not name.startswith("."):
                continue
            target = name[1:].split(".")
            allowed = (frozenset(ALLOWED) - {"cli"} | WIRING if part in WIRING else ALLOWED[part]) | {part}
            starts = (str(path.relative_to(root)), target[0]) == STARTS_THE_DAEMON
            if not starts and target[0] not in allowed and ".".join(target[:2]) not in allowed:
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def leaves(error: type[errors.VmfsStubError] = errors.VmfsStubError) -> list[type[errors.VmfsStubError]]:
    """The classes that are raised: those of the tree without children."""
    children = [child for child in error.__subclasses__() if child.__module__ == errors.__name__]
    return [leaf for child in children for leaf in leaves(child)] if children else [error]


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("core/a.py", "import os", "core is pure"),
        ("core/a.py", "from vmfs_stub.store import objects", "core/a.py imports .store.objects"),
        ("store/a.py", "import vmfs_stub.primary.files", "imports .primary.files"),
        ("store/a.py", "from ..catalog import catalog", "imports .catalog.catalog"),
        ("store/a.py", "from .. import mount", "imports .mount"),
        ("services/a.py", "from vmfs_stub.control.jobs import Jobs", "imports .control.jobs.Jobs"),
        ("services/a.py", "def f():\n    from vmfs_stub import config", "imports .config"),
        ("mount/a.py", "from vmfs_stub.primary import files", "imports .primary.files"),
        ("control/a.py", "from vmfs_stub.catalog.catalog import Catalog", "imports .catalog.catalog.Catalog"),
        ("cli/a.py", "from vmfs_stub.control.server import open_control", "imports .control.server.open_control"),
        ("cli/a.py", "from vmfs_stub.mount import serving", "imports .mount.serving"),
        ("cli/a.py", "from vmfs_stub import daemon", "imports .daemon"),
        ("config/a.py", "from vmfs_stub.cli import main", "imports .cli.main"),
        ("daemon.py", "from vmfs_stub.cli import main", "imports .cli.main"),
        ("mount/a.py", "from vmfs_stub import datastore", "imports .datastore"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, module: str, line: str, complaint: str) -> None:
    planted = tmp_path / module
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(line)
    (found,) = violations(tmp_path)
    assert complaint in found


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    for module, line in {
        "services/a.py": "from vmfs_stub.store.store import Store",
        "cli/mount.py": "from vmfs_stub import daemon",
        "cli/b.py": "from vmfs_stub.control.client import ControlClient",
        "daemon.py": "from vmfs_stub.control import server\nfrom vmfs_stub import datastore",
        "datastore.py": "from vmfs_stub.catalog.catalog import Catalog",
        "store/b.py": "from . import objects",
    }.items():
        path = tmp_path / module
        path.parent.mkdir(exist_ok=True)
        path.write_text(line)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.__name__)
def test_every_failure_has_an_exit_code_and_an_errno(leaf: type[errors.VmfsStubError]) -> None:
    assert exit_code_of(leaf("m")) not in (ExitCode.DONE, ExitCode.FAILED)
    assert errno_of(leaf("m")) in set(ERRNO_BY_TYPE.values())


def test_exit_codes_are_told_apart_and_documented() -> None:
    assert len({*EXIT_CODE_BY_TYPE.values()}) == len(EXIT_CODE_BY_TYPE)
    source = (ROOT / "cli/exit_codes.py").read_text(encoding="utf-8")
    for code in ExitCode:
        assert f"\n    {code:<5}" in source.split('"""')[1]


def test_an_error_outside_the_tables_would_be_found() -> None:
    class Planted(errors.VmfsStubError):
        pass

    assert exit_code_of(Planted("m")) is ExitCode.FAILED
    assert errno_of(Planted("m")) is None
