"""Gumbel noise as a function of (seed, position, token): no generator state to carry.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") is a
keyed bijection of 128-bit counters. The key is the seed's two halves; one counter serves four
tokens:

    counter  (token // 4, position low, position high, DOMAIN)  ->  words w0 w1 w2 w3
    token 4b + j:  u = (w[j] << 20 | w[(j + 1) % 4] >> 12) + 1/2, over 2**52   0 < u < 1, exact
                   G = -log(-log(u))                                      -3.61 < G < 36.74

52 bits, because 24 or 32 would cut the upper tail where the winners of a large vocabulary come
from. Each u is exactly uniform; that its low bits are a neighbour's high bits couples two tokens
only below 2**-32.

The arithmetic is written once, over 64-bit integers of numpy (CPU: half of torch's time) or torch
(CUDA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
_A = TypeVar("_A", Ints, torch.Tensor)

NUM_ROUNDS = 10
DOMAIN = 0  # the last counter word: another use of the same seeds would take another number
MIN_GUMBEL = -3.61  # below -log(-log(2**-53)) = -3.603
MAX_GUMBEL = 36.74  # above -log(-log(1 - 2**-53)) = 36.737
_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_SCALE = 2.0**-52


def philox4x32(counter: tuple[_A, _A, _A, _A], key: tuple[Any, Any]) -> tuple[_A, _A, _A, _A]:
    """Philox4x32-10 of int64 arrays that hold 32-bit words; shapes broadcast.

    `key` is two ints or arrays alike.

    Signed 64-bit products wrap, which leaves both halves right: the upper is masked after its
    shift. The words at 1 and 3 are only ever xored, so their upper halves may hold rubbish until
    the end.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _noise(high: Ints, low: Ints) -> Floats:
    """Noise from two 32-bit words; any shape. In doubles: floats have no room at u = 1."""
    bits = high << 20
    bits |= low >> 12
    u = bits + 0.5
    u *= _SCALE
    for _ in range(2):
        np.log(u, out=u)
        np.negative(u, out=u)
    return u.astype(np.float32)


def gumbel_row(seed: int, position: int, vocab_size: int) -> Floats:
    """Noise of all tokens at one position, float32 [vocab_size], on the CPU."""
    blocks = np.arange(-(-vocab_size // 4), dtype=np.int64)
    # Arrays of one element, not scalars: those warn of overflow. The first rounds stay that small.
    low, high = _halves([position])
    domain = np.array([DOMAIN], np.int64)
    words = np.stack(philox4x32((blocks, low, high, domain), (seed & _MASK, seed >> 32)))
    return np.ascontiguousarray(_noise(words, words[[1, 2, 3, 0]]).T).reshape(-1)[:vocab_size]


def gumbel_at(seeds: Sequence[int], positions: Sequence[int], rows: Ints, tokens: Ints) -> Floats:
    """Noise of token `tokens[i]` at `positions[rows[i]]` under `seeds[rows[i]]`, float32 [n], on
    the CPU.

    Some of the values that `gumbel_row` gives, for one counter each instead of a quarter.
    """
    key_low, key_high = (half[rows] for half in _halves(seeds))
    low, high = (half[rows] for half in _halves(positions))
    counter = (tokens >> 2, low, high, np.array([DOMAIN]))
    words = np.stack(philox4x32(counter, (key_low, key_high)))
    lane, column = tokens & 3, np.arange(len(tokens))
    return _noise(words[lane, column], words[(lane + 1) & 3, column])


def _halves(values: Sequence[int]) -> tuple[Ints, Ints]:
    """The low and the high halves of unsigned 64-bit integers, int64 [n] each."""
    whole = np.array(values, np.uint64)
    return (whole & _MASK).astype(np.int64), (whole >> 32).astype(np.int64)


def gumbel(
    seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device | str
) -> torch.Tensor:
    """Noise float32 [S, vocab_size]: row i is of (seeds[i], positions[i]), unsigned 64 bits.

    Computed by torch on any device.
    """
    columns = [
        torch.from_numpy(half).to(device).view(-1, 1)
        for values in (positions, seeds)
        for half in _halves(values)
    ]
    blocks = torch.arange(-(-vocab_size // 4), device=device).view(1, -1)
    domain = torch.full((1, 1), DOMAIN, device=device)
    low, high, *key = columns
    words = torch.stack(
        philox4x32((blocks, low, high, domain), (key[0], key[1])), dim=-1
    )  # [S, blocks, 4]
    u = (((words << 20) | (words.roll(-1, dims=-1) >> 12)).double() + 0.5) * _SCALE
    return (-(-u.log()).log()).float().flatten(1)[:, :vocab_size]
