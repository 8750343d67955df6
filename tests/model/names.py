"""Which names lead to which files: now, and what a kill or a power loss may leave of the latest changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.medium import Key
from tests.model.contents import Contents, Wrong

Changes = dict[str, Contents | None]
"""Path below the backing directory → what it is from then on."""


class Names:
    """``now`` is what is there."""

    def __init__(self) -> None:
        self.now: dict[str, Contents] = {}
        self._since_sync: dict[str, list[Contents | None]] = {}
        """What each name was since its directory was last synced."""
        self._begun: list[Changes] = []
        """Changes that were cut short: made or not, each as a whole."""

    def everything(self) -> list[Contents]:
        """Every file that has a name or may have one after a power loss, once."""
        histories = [contents for history in self._since_sync.values() for contents in history if contents is not None]
        return list(dict.fromkeys([*self.now.values(), *histories]))

    def paths_of(self, contents: Contents) -> list[str]:
        return [path for path, found in self.now.items() if found is contents]

    @contextmanager
    def changing(self, changes: Changes) -> Iterator[None]:
        """Within the block the changes are made; if it is left by an exception, perhaps they were not."""
        for path, contents in changes.items():
            self._history(path).append(contents)
        self._begun.append(changes)
        yield
        self._begun.remove(changes)
        self._apply(changes)

    def not_done(self) -> None:
        """What was begun and failed has not happened."""
        self._begun.clear()

    def made(self, path: str, contents: Contents) -> None:
        """A file is there, durably, where none was: what was begun and took the name away has been done."""
        for changes in [changes for changes in self._begun if path in self.now and changes.get(path, contents) is None]:
            self._begun.remove(changes)
            self._apply(changes)
        self.now[path] = contents
        self._since_sync[path] = [contents]

    def synced(self, directory: str) -> None:
        """All names in a directory are durable."""
        for path in self._since_sync:
            if path.rpartition("/")[0] == directory:
                self._since_sync[path] = [self.now.get(path)]

    def settle(self, found: Mapping[str, Key], *, power_lost: bool) -> None:
        """Go on with what was found, if that is possible.  Raises Wrong."""
        self._recognise_made(found)
        by_key = {contents.key: contents for history in self._since_sync.values() for contents in history if contents}
        there: dict[str, Contents] = {}
        for path, key in found.items():
            if key not in by_key:
                raise Wrong(f"{path} is a file that nobody made")
            there[path] = by_key[key]
        if power_lost:
            for path, history in self._since_sync.items():
                if there.get(path) not in history:
                    raise Wrong(f"{path} is nothing that it was since its directory was synced")
            self._since_sync = {path: [there.get(path)] for path in self._since_sync}
        else:
            self._settle_begun(there)
        self._begun.clear()
        self.now = there

    def _settle_begun(self, there: dict[str, Contents]) -> None:
        possible = [self.now]
        for changes in self._begun:
            possible += [_changed(before, changes) for before in possible]
        if there not in possible:
            raise Wrong(f"the names are {sorted(there)}, which they never were")

    def _recognise_made(self, found: Mapping[str, Key]) -> None:
        """A creation that was cut short made an inode that nobody has looked at yet."""
        known = {contents.key for history in self._since_sync.values() for contents in history if contents}
        for changes in self._begun:
            for path, contents in changes.items():
                if contents is not None and contents.key is None and path in found and found[path] not in known:
                    contents.key = found[path]

    def _history(self, path: str) -> list[Contents | None]:
        return self._since_sync.setdefault(path, [self.now.get(path)])

    def _apply(self, changes: Changes) -> None:
        self.now = _changed(self.now, changes)


def _changed(names: dict[str, Contents], changes: Changes) -> dict[str, Contents]:
    after: dict[str, Contents | None] = {**names, **changes}
    return {path: contents for path, contents in after.items() if contents is not None}
