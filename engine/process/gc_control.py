"""Avoids interpreter pauses that delay tokens: garbage collection and slow thread switches.

The modules of a worker have some 200,000 objects, which live as long as the process. A full
collection visits all of them and takes 100 ms, in which no request gets a token. Frozen objects are
not visited.
"""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005


def shorten_switch_interval() -> None:
    """Make threads release the GIL sooner. The default of 5 ms is as long as a step, and the event
    loop waits several times for one message.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def disable_collections() -> None:
    """Disable garbage collection during start-up, which creates almost no garbage."""
    gc.disable()


def freeze_heap() -> None:
    """Exclude all current objects from garbage collection, and enable it."""
    gc.collect()
    gc.freeze()
    gc.enable()
