"""Named places at which the program calls something that can fail.

A site says which call of which operation this is ("archive.punch", "recall.fill").  It costs nothing in production; in
tests a subclass makes exactly one site fail, and the outcome that is documented for it is checked.  A test refuses
file calls without a site (tests/site_tags.py), and the sweep over all sites refuses a site that it never meets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FileCalls:
    """Makes file calls; the seam at which tests inject failures."""

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function``; ``site`` names the place for fault injection.  Raises what the function raises."""
        return function(*args, **kwargs)


PLAIN: Final = FileCalls()
"""For whoever is not tested by failing calls."""
