"""What scenarios share."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.clock_skew import ClockSkew
from tests.faults.oracle import Oracle
from tests.support.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Bench:
    """A healthy cluster and what it answers undisturbed."""

    cluster: Cluster
    oracle: Oracle
    skew: ClockSkew | None = None  # its processes' wall clock; None without a C compiler
