"""The step in C over decoders of odd shapes: near to doubles, the same bits in any step and on any
number of threads; a NaN stays in its own request.
"""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from engine.attention.batch import Row
from engine.kernels import kernels
from tests.support.paths import ROOT
from tests.support.random_decoder import make

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512 and VNNI"
)


def test_odd_shapes_give_the_same_bits_on_any_number_of_threads() -> None:
    """Heads, windows, blocks and lengths around the borders of tiles and segments."""
    digests = set()
    for num_threads in (1, 2, 3, 8):
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.random_decoder", str(num_threads), "0", "10"],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_key_or_value_ruins_its_own_request_only(value: float, seed: int) -> None:
    assert LIBRARY
    rng = random.Random(seed)
    decoder = make(rng, LIBRARY)
    c = decoder.config
    pool = decoder.pool(16, 40)
    texts = [[rng.randrange(c.vocab_size) for _ in range(n)] for n in (3, 65, 300)]
    tables = [[0], [7, 2, 1, 9, 4], list(range(10, 30))]
    decoder.model.forward([Row(x[:-1], 0, t, 0) for x, t in zip(texts, tables, strict=True)], pool)
    last = [Row(x[-1:], len(x) - 1, t, 1) for x, t in zip(texts, tables, strict=True)]
    good = decoder.model.forward(last, pool).clone()
    window = c.attention[-1].window
    oldest = 65 - window if window else 0
    for plane in (0, 1):
        position = rng.randrange(max(0, oldest), 65)
        layer = pool.pool[tables[1][position // 16], :, c.num_layers - 1, plane]
        place = layer[rng.randrange(c.num_kv_heads), position % 16]
        kept = place.clone()
        place[rng.randrange(c.head_dim)] = value
        got = decoder.model.forward(last, pool)
        written_over = position == 64  # by the step itself
        assert written_over or got[1].isnan().all()
        assert torch.equal(got[[0, 2]], good[[0, 2]])
        place.copy_(kept)
    assert torch.equal(decoder.model.forward(last, pool), good)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    assert LIBRARY
    decoder = make(random.Random(1), LIBRARY)
    for token in (-1, decoder.config.vocab_size):
        with pytest.raises(ValueError, match="a token id"):
            decoder.model.forward([Row([0, token], 0, [0], 1)], decoder.pool(16, 1))
