"""Seeds of requests and choices. No torch here: the coordinator resolves them.

The sampler's noise is a function of (seed, position, token), so two answers differ only if their
seeds do: a request without a seed gets one from its id (a retry of the same request draws the same
tokens), and choice i of n gets one from the request's.
"""

from __future__ import annotations

import hashlib


def _seed(person: bytes, data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def default_seed(request_id: str) -> int:
    """The seed (unsigned 64 bits) of a request that brings none: BLAKE2b-64 of its id."""
    return _seed(b"diptych-request", request_id.encode())


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: for 0 the request's own, else BLAKE2b-64 of (seed, index)."""
    if index == 0:
        return seed
    return _seed(b"diptych-choice", seed.to_bytes(8, "little") + index.to_bytes(4, "little"))
