"""Whom a coordinator believes to be of its cluster.

                           asked of workers       asked of operators
    --cluster-token-file   its token              its token
    local workers alone    one of our own         the same
    neither, on loopback   none; the log warns    one of our own

What operators may do: AdminService.DrainWorker, and request ids in /debug/holds. A token of our own
is in a file in memory; local workers and commands of the same user read it there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.base.options import FrontOptions, TrustOptions
from engine.rpc.trust import ClusterToken, token_for


@dataclass(frozen=True, slots=True)
class Trust:
    """The tokens that are asked for."""

    cluster: ClusterToken | None = None  # of calls between coordinators and workers; None: none is
    operator: ClusterToken = field(default_factory=ClusterToken.random)

    @classmethod
    def of(cls, options: TrustOptions, front: FrontOptions, *, local_workers: bool) -> Trust:
        """Read the file, or make a token. Raises ConfigError."""
        if options.cluster_token_file:
            token = ClusterToken.load(options.cluster_token_file)
            return cls(token, token)
        if local_workers:
            token = ClusterToken.random()
            return cls(token, token)
        if front.internal_listen:
            return cls(token_for(options, "--internal-listen", front.internal_listen))
        return cls(token_for(options, "--listen", front.listen))
