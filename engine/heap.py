"""Garbage collection without the pause that a token would wait for.

A worker's modules are some 200,000 objects, which live as long as it does. A full collection looks
at all of them: 100 ms, between two tokens of everybody's. Frozen they are not looked at.
"""

from __future__ import annotations

import gc


def put_off_collections() -> None:
    """While a process starts, nearly nothing that is made is garbage."""
    gc.disable()


def freeze_heap() -> None:
    """Leave everything that is here by now out of collections, and have them from now on."""
    gc.collect()
    gc.freeze()
    gc.enable()
