"""Counts damaged cache entries of the whole process.

The count is global because files are checked before there is a registry, and by code without one.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

_KINDS = ("digests", "models", "native", "packed", "weights")
_DAMAGED = Counter(
    "diptych_cache_damaged",
    "Entries of the cache on disk that were damaged and made again.",
    ("kind",),
    registry=None,
)
for _kind in _KINDS:
    _DAMAGED.labels(_kind)  # shown from the start, as 0


def count_damaged(kind: str) -> None:
    """Count an entry of `kind` that was damaged and is made again."""
    _DAMAGED.labels(kind).inc()


def show_damaged(registry: CollectorRegistry) -> None:
    """Add `diptych_cache_damaged_total` of this process, by kind, to a registry."""
    registry.register(_DAMAGED)
