"""Tokens that a coordinator requires of workers and operators.

                           of workers             of operators
    --cluster-token-file   the file's token       the file's token
    local workers only     a random token         the same
    neither, on loopback   none; the log warns    a random token

Operators may call AdminService.DrainWorker, and see request ids in /debug/holds. A random token is
in a file in memory; local workers and commands of the same user read it there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.base.option_groups import AuthOptions, FrontOptions
from engine.rpc.auth import ClusterToken, token_for


@dataclass(frozen=True, slots=True)
class Trust:
    """The required tokens."""

    cluster: ClusterToken | None = None  # of calls between coordinators and workers
    operator: ClusterToken = field(default_factory=ClusterToken.random)

    @classmethod
    def of(cls, options: AuthOptions, front: FrontOptions, *, local_workers: bool) -> Trust:
        """Read the file, or make a token. Raises ConfigError."""
        if options.cluster_token_file or local_workers:
            file = options.cluster_token_file
            token = ClusterToken.load(file) if file else ClusterToken.random()
            return cls(token, token)
        if front.internal_listen:
            return cls(token_for(options, "--internal-listen", front.internal_listen))
        return cls(token_for(options, "--listen", front.listen))
