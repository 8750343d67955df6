"""The list of commands in `--help`: each with the whole first sentence of its help, which the library would cut."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_WHOLE = 1000
"""Characters; longer than any."""


class CommandList(TyperGroup):
    """A group of commands whose summaries are wrapped."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, self.commands[name].get_short_help_str(_WHOLE)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
