"""The client of the commands, and how they report errors."""

from __future__ import annotations

import logging
import sys

from coordinator.client import Client, RetryPolicy, describe
from engine.base.errors import Unavailable

_RETRY_POLICY = RetryPolicy(give_up_s=5.0)  # a user is waiting


def connect(server: str) -> Client:
    """A client of `server`. Lost calls are reported with the usage, not logged within the text."""
    logging.getLogger("coordinator.client").setLevel(logging.ERROR)
    return Client(server, retry_policy=_RETRY_POLICY)


def print_error(server: str, error: Exception) -> int:
    """Print an error of a call to stderr; returns the exit status."""
    unavailable = isinstance(error, Unavailable) and not error.num_emitted
    if unavailable and "connect" in describe(error).lower():
        print(f"coordinator: no coordinator answers at {server}; is it started?", file=sys.stderr)
    else:
        print(f"coordinator: {describe(error)}", file=sys.stderr)
    return 1
