"""What rows share."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.cluster import Cluster
from tests.faults.oracle import Oracle
from tests.faults.skew import Skew


@dataclass(frozen=True, slots=True)
class Bench:
    """A healthy cluster and what it answers undisturbed."""

    cluster: Cluster
    oracle: Oracle
    skew: Skew | None = None  # its processes' wall clock; None without a C compiler
