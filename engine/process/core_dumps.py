"""Disables core dumps by default: memory contains prompts, outputs and the token.

Two limits, which child processes inherit:

    RLIMIT_CORE, soft      0: the kernel writes no file; but it still runs a handler behind a pipe
    coredump_filter        0: the dump that a handler gets contains no memory

Not PR_SET_DUMPABLE: it would also deny /proc/PID/fd and process_vm_readv to the same user.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_FILTER = Path("/proc/self/coredump_filter")


def forbid_core_dumps() -> None:
    """Set both limits to 0."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with suppress(OSError):  # not Linux, or no /proc
        _FILTER.write_text("0")
