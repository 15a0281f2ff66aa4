from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from engine.attention.batch import Row
from engine.attention.torch_backend import TorchBackend
from engine.cache.kv_cache import KVCache
from engine.kernels import kernels
from engine.runner.layers import logits
from engine.runner.loader import random_model
from engine.runner.runner import Runner
from engine.runner.torch_model import TorchModel
from tests.support.backends import select_backend
from tests.support.paged import CPU, Bench, bfloat16_kv, layout_of, tiny_config
from tests.support.random_decoder import make

LIBRARY = kernels()
TOKENS = [int(t) for t in torch.randint(0, 101, (60,), generator=torch.Generator().manual_seed(1))]


def test_first_layers_share_weights_and_fill_the_same_cache() -> None:
    config = tiny_config(num_layers=4)
    model = random_model(config, 0)
    part = model.first_layers(2)
    assert part.config.num_layers == 2 and part.weights is model.weights
    layout = layout_of(config, 4)
    caches = [KVCache(layout, 16, CPU) for _ in range(2)]
    row = Row(TOKENS[:30], 0, list(range(8)), 30)
    out = [
        Runner(m, cache, TorchBackend(layout, config.num_heads)).run([row])
        for m, cache in zip((model, part), caches, strict=True)
    ]
    assert torch.equal(caches[0].pool[:, :, :2], caches[1].pool[:, :, :2])
    assert not caches[1].pool[:, :, 2:].any()
    assert not torch.allclose(out[0], out[1])
    with pytest.raises(ValueError, match="1 to 4"):
        model.first_layers(5)


@pytest.mark.parametrize("head_dim", [8, 12])
def test_two_models_in_the_same_blocks_do_not_disturb_each_other(head_dim: int) -> None:
    """Each gives, bit for bit, what it gives in blocks of its own."""
    target = random_model(tiny_config(), 1)
    draft = random_model(tiny_config(num_layers=1, num_kv_heads=1, head_dim=head_dim), 2)
    steps = [Row(TOKENS[:30], 0, list(range(10)), 3), Row(TOKENS[30:33], 30, list(range(10)), 3)]
    layout = dataclasses.replace(layout_of(target.config, 4), draft=layout_of(draft.config, 4))
    cache = KVCache(layout, 16, CPU)
    assert cache.draft
    runners, expected = [], []
    for model, view in ((target, cache), (draft, cache.draft)):
        view.pool.fill_(float("nan"))
        backend = select_backend(view, model.config)
        runners.append(Runner(model, view, backend))
        alone = Bench(model)
        expected.append([alone.runner.run([row]) for row in steps])
    for i, row in enumerate(steps):
        for runner, logits_of_steps in zip(runners, expected, strict=True):
            assert torch.equal(runner.run([row]), logits_of_steps[i])


def test_a_drafter_steps_between_the_targets_steps() -> None:
    """Two models with a cache each, interleaved, give what each gives alone."""
    target, drafter = random_model(tiny_config(), 1), random_model(tiny_config(num_layers=1), 2)
    expected = []
    for model in (target, drafter):
        bench = Bench(model)
        s = bench.sequence(TOKENS)
        expected.append(torch.cat([bench.step((s, 20, 1)), bench.step((s, 40, 40))]))
    benches = [Bench(target), Bench(drafter)]
    sequences = [bench.sequence(TOKENS) for bench in benches]
    got: list[list[torch.Tensor]] = [[], []]
    for count, num_logits in ((20, 1), (40, 40)):
        for i in (0, 1):
            got[i].append(benches[i].step((sequences[i], count, num_logits)))
    for i in (0, 1):
        assert torch.equal(torch.cat(got[i]), expected[i])


def test_half_precision_stays_near_fp32_and_answers_in_fp32() -> None:
    model = random_model(tiny_config(num_layers=3), 4)
    half = random_model(tiny_config(num_layers=3), 4, torch.bfloat16)
    out = []
    for m in (model, half):
        bench = Bench(m)
        out.append(bench.step((bench.sequence(TOKENS), 60, 60)))
    assert out[1].dtype == torch.float32
    error = (out[0] - out[1]).abs().amax(-1) / out[0].abs().amax(-1)
    assert error.max() < 0.1
    # Not rounded to bf16 on the way out: its 8 bits would be seen.
    assert not torch.equal(out[1], out[1].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 1000, 30000])
def test_the_head_is_exact_however_it_is_cut(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(0)
    x, head = torch.randn(3, 64).to(dtype), torch.randn(vocab, 64).to(dtype)
    got = logits(x, head)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ head.float().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(LIBRARY is None, reason="the random decoders are made for the kernels")
@pytest.mark.parametrize("seed", range(16))
def test_features_of_some_models_equal_doubles(seed: int) -> None:
    """Scales, caps, windows, activations, experts, sinks, and rotations by layer or of a part."""
    assert LIBRARY
    rng = random.Random(seed)
    decoder = make(rng, LIBRARY)
    # What a Llama does not have; "bias" is the head's.
    absent = ("q_norm", "k_norm", "out_norm", "down_norm", "bias")
    for name in [name for name in decoder.vectors if name.partition(".")[2] in absent]:
        del decoder.vectors[name]
    weights = {**decoder.values, **decoder.vectors}
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    for name in [name for name in tensors if name.endswith((".router", ".shared_gate"))]:
        tensors[name] = tensors[name].view(-1, decoder.config.hidden_size)
    text = [rng.randrange(decoder.config.vocab_size) for _ in range(70)]
    bench = Bench(TorchModel(decoder.config, tensors), block_size=16)
    with bfloat16_kv():
        got = bench.step((bench.sequence(text), len(text), len(text))).numpy()
    expected = decoder.logits(text)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 5e-3
