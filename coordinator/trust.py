"""Whom a coordinator believes to be of its cluster.

    --cluster-token-file   internal services and DrainWorker ask for its token
    local workers alone    a token of our own, which they get in a file in memory
    neither, on loopback   nothing is asked for, and a line in the log says so

DrainWorker stands on the public port: where that can be reached from other machines and there is no
file, it asks for a token that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import FrontOptions, TrustOptions
from engine.rpc.trust import ClusterToken, stays_on_this_machine, token_for


@dataclass(frozen=True, slots=True)
class Trust:
    """The tokens that are asked for; None: none is."""

    cluster: ClusterToken | None = None  # of calls between coordinators and workers
    drain: ClusterToken | None = None  # of AdminService.DrainWorker

    @classmethod
    def of(cls, options: TrustOptions, front: FrontOptions, *, local_workers: bool) -> Trust:
        """Read the file, or make a token. Raises ConfigError."""
        token: ClusterToken | None
        if options.cluster_token_file:
            token = ClusterToken.load(options.cluster_token_file)
            return cls(token, token)
        if local_workers:
            token = ClusterToken.random()
        elif front.internal_listen:
            token = token_for(options, "--internal-listen", front.internal_listen)
        else:
            token = token_for(options, "--listen", front.listen)
        open_to_others = not stays_on_this_machine(front.listen)
        return cls(token, ClusterToken.random() if open_to_others else None)
