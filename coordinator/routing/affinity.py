"""Which workers are likely to have a request's blocks, and the token by which clients name one.

    affinity token = tag of the process . tag of its model      (each 16 hexadecimal digits)

A client that resumes sends the token back, to this or another coordinator. The second tag tells
which model wrote the first part of the output: another one does not continue it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from coordinator.cluster.worker import ClusterView, Worker
from engine.base.types import Role

MANY_WAITING = 4  # requests more than elsewhere: cached blocks are not worth that queue
_TOKEN = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})")


@dataclass(slots=True)
class Affinity:
    """Workers that are likely to have a request's blocks, as incarnations; "": none.

    The choices of a request share one, so that they share the prompt's blocks.
    """

    decode: str = ""
    prefill: str = ""
    model: str = ""  # `model_tag` of what has written a part of the output


def affinity_token_of(worker: Worker) -> str:
    """The token of a worker's process and its model; nothing else follows from it."""
    return f"{_tag(worker.peer.incarnation)}.{model_tag(worker)}"


def model_tag(worker: Worker) -> str:
    """The part of the token that stands for the worker's model."""
    return _tag(worker.model.digest)


def affinity_of(cluster: ClusterView, token: str) -> Affinity:
    """What a client's token stands for in this cluster; nothing without a valid token."""
    found = _TOKEN.fullmatch(token)
    if not found:
        return Affinity()
    affinity = Affinity(model=found[2])
    for worker in cluster.ready(Role.DECODE):
        incarnation = worker.peer.incarnation
        if affinity_token_of(worker) == token and sticky(cluster, Role.DECODE, incarnation):
            affinity.decode = incarnation
    return affinity


def sticky(
    cluster: ClusterView, role: Role, incarnation: str, exclude: Collection[str] = ()
) -> Worker | None:
    """The ready worker of `role` that has a request's blocks, unless another one is better.

    That is so where it is degraded, or where many more requests wait there than elsewhere.
    """
    ready = [
        w
        for w in cluster.ready(role)
        if w.peer.incarnation not in exclude and not w.is_degraded(cluster.now_s)
    ]
    found = next((w for w in ready if w.peer.incarnation == incarnation), None)
    if found is None:
        return None
    fewest_waiting = min(w.load.num_waiting for w in ready)
    return None if found.load.num_waiting > fewest_waiting + MANY_WAITING else found


@lru_cache(maxsize=4096)
def _tag(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
