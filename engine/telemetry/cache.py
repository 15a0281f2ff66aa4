"""Counts damaged cache entries of the whole process.

The count is global because files are checked before there is a registry, and by code without one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

_KINDS = ("digests", "models", "native", "packed", "weights")
_damaged: Counter[str] = Counter()


def count_damaged(kind: str) -> None:
    """Count an entry of `kind` that was damaged and is made again."""
    _damaged[kind] += 1


class CacheMetrics(Collector):
    """`diptych_cache_damaged_total` of this process, by kind."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counter, with a sample for each kind."""
        help = "Entries of the cache on disk that were damaged and made again."
        family = CounterMetricFamily("diptych_cache_damaged", help, labels=("kind",))
        for kind in _KINDS:
            family.add_metric((kind,), _damaged[kind])
        yield family
