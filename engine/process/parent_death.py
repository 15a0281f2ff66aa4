"""Ends a process with its parent, even after kill -9, by the kernel's parent-death signal.

Run as

    python -m engine.process.parent_death --parent PID [--nice N] [--env NAME=VALUE ...]
        MODULE [ARG ...]

it ties itself to PID, sets unset variables, and becomes `python -m MODULE ARG`. The kernel sends
the signal when the *thread* that forked ends, so a supervisor must fork on a thread that lives as
long as the process, such as the main thread.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import sys

from engine.base.options import set_default_env

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed when `parent_pid` ends; exit at once if it has ended already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # If the parent ended before the call above, this process has another parent now.
    if os.getppid() != parent_pid:
        os._exit(1)


def main() -> None:
    """Tie this process to its parent and run a module in it."""
    parser = argparse.ArgumentParser(prog="engine.process.parent_death", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--nice", type=int, default=0, help="added to the niceness")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("module")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    die_with_parent(options.parent)
    if options.nice:
        os.nice(options.nice)
    set_default_env(dict(item.split("=", 1) for item in options.env))
    sys.argv = [options.module, *options.args]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
