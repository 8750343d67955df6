"""Metrics of one daemon, in the text format that Prometheus scrapes.

The registry is the daemon's own, not the library's global one.  Services do not know this module: the daemon gives
them plain callables (``metrics.counter(...).inc``) or lets a gauge read their state when it is scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_PREFIX = "vmfs_stub_"

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Makes metrics and renders them; names get the prefix ``vmfs_stub_``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
        """A number that only grows."""
        return Counter(_PREFIX + name, what, labels, registry=self._registry)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A number that ``read`` tells at each scrape; it must not block."""
        Gauge(_PREFIX + name, what, registry=self._registry).set_function(read)

    def total(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A number that only grows and that somebody else keeps: ``read`` tells it at each scrape, without blocking."""
        self._registry.register(_Total(_PREFIX + name, what, read))

    def render(self) -> bytes:
        """All of them as text."""
        return generate_latest(self._registry)


class _Total(Collector):
    """A counter whose value lies elsewhere."""

    def __init__(self, name: str, what: str, read: Callable[[], float]) -> None:
        self._name = name
        self._what = what
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily]:
        return [CounterMetricFamily(self._name, self._what, value=self._read())]
