"""Seeds of requests and choices. No torch here: the coordinator resolves them.

The sampler's noise is a function of (seed, position, token), so outputs of one prompt differ only
if their seeds differ. A request without a seed gets a hash of its id, so that a retry samples the
same tokens. Choice i of n gets a seed derived from the request's.
"""

from __future__ import annotations

import hashlib


def _seed(person: bytes, data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def default_seed(request_id: str) -> int:
    """The seed (unsigned 64 bits) of a request without one: BLAKE2b-64 of its id."""
    return _seed(b"diptych-request", request_id.encode())


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's for 0, else BLAKE2b-64 of (seed, index)."""
    if index == 0:
        return seed
    return _seed(b"diptych-choice", seed.to_bytes(8, "little") + index.to_bytes(4, "little"))
