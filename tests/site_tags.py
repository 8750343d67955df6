"""Reads from the source which file calls carry a site tag, which do not, and which tags there are.

A *file function* is one that can wait for a filesystem or be told by it that something failed.  Every mention of one
(a call, or the function itself as an argument) has to be inside the arguments of a tagged call, as in
``files.call("archive.punch", punch_hole, …)``, or inside a function that is itself only called so: then the whole
function is what fails.  Names are compared without types, so what is told apart by type only counts as untagged.

Not file functions, because there is nothing to fail or to wait for:
* ``close``: the descriptor is gone whatever it says, and what had to be on the disk was synced before;
* ``fstat``, ``fstatvfs``, ``dup`` and the identity ioctls of an open file: they ask memory;
* F_GETLEASE and giving up a lease: the same;
* ``/proc`` and ``/sys``: no filesystem is behind them;
* finding a name in the kernel's cache of names alone (``open_path_cached``): it asks memory.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import vmfs_stub

ROOT = Path(vmfs_stub.__file__).parent

_OS = """
access chdir chflags chmod chown copy_file_range fallocate fchmod fchown fdatasync fsync ftruncate getxattr link
listdir listxattr lseek lstat makedirs mkdir mkfifo mknod open posix_fadvise posix_fallocate pread preadv pwrite
pwritev read readlink readv remove removexattr rename renames replace rmdir scandir sendfile setxattr stat statvfs
symlink sync truncate unlink utime walk write writev
"""
_PATHLIB = """
exists glob hardlink_to is_dir is_file is_mount is_symlink iterdir lchmod lstat mkdir read_bytes read_text readlink
rename resolve rglob rmdir samefile stat symlink_to touch unlink write_bytes write_text
"""
OS_FUNCTIONS = frozenset(_OS.split())
PATH_METHODS = frozenset(_PATHLIB.split())
"""Of pathlib, as far as nothing else has methods of that name."""
LIBC_FUNCTIONS = frozenset(("fallocate", "syncfs", "fchownat", "utimensat", "renameat2", "sync_file_range"))
OTHERS = frozenset((("mmap", "mmap"), ("sqlite3", "connect"), ("shutil", "rmtree"), ("shutil", "move")))
BARE = frozenset(("open", "_openat2"))
TAG = re.compile(r"[a-z]+\.[a-z_]+\Z")
MODE = re.compile(r"[rwxa][bt+]{0,2}\Z")
CALLERS = frozenset(("call", "_run", "run", "now"))
"""Names of what takes a site and a function."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A file function at a place; ``inside`` are the functions around it, innermost first."""

    path: str
    line: int
    what: str
    inside: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what} without a site tag"


@dataclass(slots=True)
class _Module:
    path: str
    tree: ast.Module


@dataclass
class Source:
    """All modules of a package below ``root``."""

    root: Path = ROOT
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Modules, folders (``cli/``) and functions (``a.py:function``) that need no tags, and why."""
    _mentions: list[Mention] = field(default_factory=list)
    _uses: dict[str, list[tuple[str, ...] | None]] = field(default_factory=dict)
    """By key of a function: where it is mentioned, as keys of the functions around; None: in a tagged call."""

    def __post_init__(self) -> None:
        stems = {Path(module.path).stem for module in self._modules}
        for module in self._modules:
            if not any(module.path.startswith(where) for where in self.exempt if ":" not in where):
                _Reader(module.path, self._mentions, self._uses, self._takers, stems).visit(module.tree)

    @cached_property
    def _modules(self) -> list[_Module]:
        return [
            _Module(str(path.relative_to(self.root)), ast.parse(path.read_text(encoding="utf-8")))
            for path in sorted(self.root.rglob("*.py"))
        ]

    @cached_property
    def _takers(self) -> dict[str, int]:
        """Functions of ours with a parameter ``site``, and at which place a caller gives it; -1: by its name only."""
        found: dict[str, int] = {}
        for module in self._modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg != "self"]
                    if "site" in names:
                        found[node.name] = names.index("site")
                    elif "site" in [arg.arg for arg in node.args.kwonlyargs]:
                        found[node.name] = -1
        return found

    @cached_property
    def tags(self) -> dict[str, list[str]]:
        """Every tag, with the places that have it.  Raises ValueError for a site that is no plain text."""
        found: dict[str, list[str]] = {}
        for module in self._modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call) and (given := _site_of(node, self._takers)) is not None:
                    place = f"{module.path}:{node.lineno}"
                    if isinstance(given, ast.Constant) and isinstance(given.value, str) and _is_tag(given):
                        found.setdefault(given.value, []).append(place)
                    elif not (isinstance(given, ast.Name) and given.id == "site") and _name(node.func) != "run":
                        raise ValueError(f"{place}: a site that is not written out")
        return found

    def untagged(self) -> list[Mention]:
        """File functions that are used neither in a tagged call nor in a function that is only used in such."""
        behind: set[str] = set()
        while True:
            more = {
                name
                for name, uses in self._uses.items()
                if name not in behind and all(use is None or behind.intersection(use) for use in uses)
            }
            if not more:
                return [m for m in self._mentions if not behind.intersection(m.inside) and not self._is_exempt(m)]
            behind |= more

    def _is_exempt(self, mention: Mention) -> bool:
        return any(f"{mention.path}:{key.partition(' ')[2]}" in self.exempt for key in mention.inside)


class _Reader(ast.NodeVisitor):
    """Collects mentions of file functions that are not in a tagged call, and where names are used."""

    def __init__(
        self,
        path: str,
        mentions: list[Mention],
        uses: dict[str, list[tuple[str, ...] | None]],
        takers: dict[str, int],
        modules: set[str],
    ) -> None:
        self._path = path
        self._modules = modules
        self._mentions = mentions
        self._uses = uses
        self._takers = takers
        self._inside: list[str] = []
        self._in_class = False
        self._tagged = False
        self._awaited: ast.AST | None = None

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        in_class, self._in_class = self._in_class, False
        self._inside.insert(0, f"{'method' if in_class else 'function'} {node.name}")
        for statement in node.body:
            self.visit(statement)
        self._inside.pop(0)
        self._in_class = in_class

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = before

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name that ast gives it

    def visit_Await(self, node: ast.Await) -> None:
        self._awaited = node.value
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        site = _site_of(node, self._takers)
        name = _name(node.func)
        if site is None and not (name in CALLERS and _passes_site_on(node)):
            if isinstance(node.func, ast.Attribute) and node is not self._awaited:
                self._look_at_method(node, node.func)
            self.generic_visit(node)
            return
        self.visit(node.func)
        before = self._tagged
        self._tagged = before or name in CALLERS or _hands_on(node, self._takers) is not None
        for argument in (*node.args, *node.keywords):
            self.visit(argument)
        self._tagged = before

    def _look_at_method(self, node: ast.Call, function: ast.Attribute) -> None:
        receiver = function.value
        if isinstance(receiver, ast.Name) and receiver.id == "os":
            return  # seen as an attribute
        if isinstance(receiver, ast.Name) and receiver.id.startswith("_libc") and function.attr in LIBC_FUNCTIONS:
            self._mention(node, f"{receiver.id}.{function.attr}")
        opens = function.attr == "open" and _is_mode(node.args[:1])
        if (opens or function.attr in PATH_METHODS) and not any(_is_proc(part) for part in ast.walk(receiver)):
            self._mention(node, f"{function.attr}()")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            owner = node.value.id
            if (owner == "os" and node.attr in OS_FUNCTIONS) or (owner, node.attr) in OTHERS:
                self._mention(node, f"{owner}.{node.attr}")
        of_module = isinstance(node.value, ast.Name) and node.value.id in self._modules
        if not (isinstance(node.value, ast.Name) and node.value.id == "os"):
            self._use(f"{'function' if of_module else 'method'} {node.attr}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            if node.id in BARE and self._inside:
                self._mention(node, node.id)
            self._use(f"function {node.id}")

    def _use(self, name: str) -> None:
        self._uses.setdefault(name, []).append(None if self._tagged else tuple(self._inside))

    def _mention(self, node: ast.expr, what: str) -> None:
        if not self._tagged:
            self._mentions.append(Mention(self._path, node.lineno, what, tuple(self._inside)))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_mode(given: list[ast.expr]) -> bool:
    """Tells ``path.open("rb")`` from whatever else is opened."""
    return bool(given) and isinstance(given[0], ast.Constant) and MODE.match(str(given[0].value)) is not None


def _is_proc(part: ast.AST) -> bool:
    if isinstance(part, ast.Constant):
        return isinstance(part.value, str) and part.value.startswith(("/proc", "/sys"))
    return isinstance(part, ast.Name) and part.id == "proc_path"


def _site_of(node: ast.Call, takers: dict[str, int]) -> ast.expr | None:
    """What is given as the site by a call of something that takes one, or that hands it on to such."""
    handed = _hands_on(node, takers)
    if handed is not None:
        return handed
    place = 0 if _name(node.func) in CALLERS else takers.get(_name(node.func))
    if place is None:
        return None
    named = next((keyword.value for keyword in node.keywords if keyword.arg == "site"), None)
    if named is not None or place < 0 or place >= len(node.args):
        return named
    given = node.args[place]
    # `run` and `call` are also what other things are called.
    return given if _is_tag(given) or _name(node.func) not in CALLERS or _passes_site_on(node) else None


def _hands_on(node: ast.Call, takers: dict[str, int]) -> ast.expr | None:
    """The site in ``threads.files(files.call, "archive.read", …)``."""
    for at, function in enumerate(node.args):
        called = isinstance(function, ast.Attribute) and function.attr == "call"
        place = 0 if called else takers.get(_name(function), -1)
        given = node.args[at + 1 + place] if 0 <= place < len(node.args) - at - 1 else None
        if given is not None and _is_tag(given):
            return given
    return None


def _is_tag(given: ast.expr) -> bool:
    return isinstance(given, ast.Constant) and isinstance(given.value, str) and TAG.match(given.value) is not None


def _passes_site_on(node: ast.Call) -> bool:
    return bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == "site"


STORE_CALLS = frozenset(("get", "get_range", "put", "list", "delete", "size"))


def store_calls(root: Path = ROOT) -> list[tuple[str, int, int]]:
    """Where the store package calls an object store: path, first and last line."""
    found = []
    for path in sorted((root / "store").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in STORE_CALLS:
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name in ("objects", "_objects", "stored"):
                    found.append((str(path.relative_to(root)), node.lineno, node.end_lineno or node.lineno))
    return found
