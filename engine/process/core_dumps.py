"""No core dumps unless the operator asks for them: memory holds prompts, answers and the token.

Two limits, both inherited by processes that this one starts:

    RLIMIT_CORE, soft      0: the kernel writes no file; a handler behind a pipe is run all the same
    coredump_filter        0: what a handler gets has no memory in it

Not PR_SET_DUMPABLE: it would take /proc/PID/fd and process_vm_readv from the same user too.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_FILTER = Path("/proc/self/coredump_filter")


def forbid_core_dumps(*, allowed: bool = False) -> None:
    """Lower both limits, unless dumps are `allowed`; then the system's own hold."""
    if allowed:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with suppress(OSError):  # no Linux, or no /proc
        _FILTER.write_text("0")
