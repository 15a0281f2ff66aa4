"""Pauses of the interpreter that a token would wait for: garbage collection, and threads in turn.

A worker's modules are some 200,000 objects, which live as long as it does. A full collection looks
at all of them: 100 ms, between two tokens of everybody's. Frozen they are not looked at.
"""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005


def hand_over_soon() -> None:
    """Let a thread that computes hand the interpreter over in time. The default is 5 ms: as long as
    a step, and an event loop waits several times a message.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def put_off_collections() -> None:
    """While a process starts, nearly nothing that is made is garbage."""
    gc.disable()


def freeze_heap() -> None:
    """Leave everything that is here by now out of collections, and have them from now on."""
    gc.collect()
    gc.freeze()
    gc.enable()
