"""Metrics of one daemon, in the text format that Prometheus scrapes.

The registry is the daemon's own, not the library's global one.  Services do not know this module: the daemon gives
them plain callables (``metrics.counter(...).inc``) or lets a gauge read their state when it is scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vmfs_stub.services.recall_waits import Waits

_PREFIX = "vmfs_stub_"

CONTENT_TYPE = CONTENT_TYPE_LATEST

Labelled = Mapping[tuple[str, ...], float]
"""Values by those of the labels, in their order."""


class Metrics:
    """Makes metrics and renders them; names get the prefix ``vmfs_stub_``.

    What ``read`` functions tell they must know: none may wait for anything.
    """

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
        self._register(lambda: CounterMetricFamily(_PREFIX + name, what, value=read()))

    def maybe(self, name: str, what: str, read: Callable[[], float | None]) -> None:
        """A gauge that is left out while nobody knows its value: None."""

        def collect() -> Metric:
            family = GaugeMetricFamily(_PREFIX + name, what)
            if (value := read()) is not None:
                family.add_metric((), value)
            return family

        self._register(collect)

    def gauges(self, name: str, what: str, labels: tuple[str, ...], read: Callable[[], Labelled]) -> None:
        """Numbers told apart by ``labels``; who reads bounds how many."""
        self._register(lambda: _filled(GaugeMetricFamily(_PREFIX + name, what, labels=labels), read()))

    def totals(self, name: str, what: str, labels: tuple[str, ...], read: Callable[[], Labelled]) -> None:
        """The same, of numbers that only grow."""
        self._register(lambda: _filled(CounterMetricFamily(_PREFIX + name, what, labels=labels), read()))

    def histogram(self, name: str, what: str, read: Callable[[], Waits]) -> None:
        """How long things took, in seconds."""

        def collect() -> Metric:
            waits = read()
            bounds = [*map(str, waits.bounds_s), "+Inf"]
            buckets = list(zip(bounds, accumulate(waits.counts), strict=True))
            return HistogramMetricFamily(_PREFIX + name, what, buckets=buckets, sum_value=waits.sum_s)

        self._register(collect)

    def render(self) -> bytes:
        """All of them as text."""
        return generate_latest(self._registry)

    def _register(self, collect: Callable[[], Metric]) -> None:
        self._registry.register(_Read(collect))


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Labelled) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


class _Read(Collector):
    """A metric whose value lies elsewhere."""

    def __init__(self, collect: Callable[[], Metric]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return [self._collect()]
