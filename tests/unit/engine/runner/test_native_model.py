"""The C decoder computes what torch computes, and the same bits whatever else is in a step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from engine.attention.batch import Row
from engine.cache.kv_cache import KVCache
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve, weights
from engine.kernels import kernels
from engine.kernels.decoder import why_not_decoder
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support import dense_models
from tests.support.paged import CPU, Bench, bfloat16_kv, layout_of, tiny_config

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512 and VNNI"
)
COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 131,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 = (
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
    transformers.Gemma2Config,
    transformers.Gemma3TextConfig,
)
Mixtral, Qwen2Moe, Qwen3Moe, GptOss, Glm4Moe = (
    transformers.MixtralConfig,
    transformers.Qwen2MoeConfig,
    transformers.Qwen3MoeConfig,
    transformers.GptOssConfig,
    transformers.Glm4MoeConfig,
)
EXPERTS = {"num_experts": 20, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
QWEN2 = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 192}
MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama, tied": Llama(**COMMON, tie_word_embeddings=True),
    "llama, untied, all biases": Llama(**COMMON, attention_bias=True, mlp_bias=True),
    "llama, one head each, head of 96": Llama(
        **COMMON | {"num_key_value_heads": 6, "head_dim": 96}
    ),
    "llama, head of 128": Llama(**COMMON | {"head_dim": 128}),
    "mistral, window of 13": Mistral(**COMMON, sliding_window=13),
    "mistral, window of 300": Mistral(**COMMON, sliding_window=300),
    "qwen2": Qwen2(**QWEN2),
    "qwen2, windows in some layers": Qwen2(
        **QWEN2, use_sliding_window=True, sliding_window=13, max_window_layers=1
    ),
    "qwen3, tied": Qwen3(**COMMON, tie_word_embeddings=True),
    "qwen3, untied, biases, head of 64, windows in some layers": Qwen3(
        **COMMON | {"head_dim": 64},
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=1,
    ),
    "gemma 2": Gemma2(**COMMON, sliding_window=13, query_pre_attn_scalar=20),
    "gemma 3": Gemma3(**COMMON, sliding_window=13, query_pre_attn_scalar=20),
    **dense_models.MODELS,
    "mixtral": Mixtral(**COMMON, num_local_experts=5),
    "qwen2 moe, plain first layer": Qwen2Moe(
        **QWEN2 | EXPERTS, shared_expert_intermediate_size=96, mlp_only_layers=[0]
    ),
    "qwen3 moe": Qwen3Moe(**COMMON | EXPERTS, norm_topk_prob=True),
    "gpt-oss": GptOss(
        **COMMON,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=300,
        swiglu_limit=0.7,
    ),
    "glm-4.5": Glm4Moe(
        **COMMON | {"head_dim": 64},
        attention_bias=True,
        use_qk_norm=True,
        moe_intermediate_size=64,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        num_nextn_predict_layers=0,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def native(folder: Path | str, choice: str) -> NativeModel:
    assert LIBRARY
    checkpoint = resolve(str(folder))
    path = packed_file(checkpoint, choice)
    return NativeModel(checkpoint.config, read_packed(path, checkpoint.config), LIBRARY)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchModel, NativeModel]:
    """A random model with bfloat16 weights: in torch in fp32, and in C."""
    torch.manual_seed(3)
    source = transformers.AutoModelForCausalLM.from_config(request.param, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        for name, buffer in source.named_buffers():
            if "correction" in name:
                buffer.normal_(0.0, 0.15)
    folder = tmp_path_factory.mktemp("model")
    source.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # a folder without one is refused
    checkpoint = resolve(str(folder))
    paths = weights(checkpoint, "float32")
    exact = load_model(checkpoint.config, paths, torch.float32, CPU)
    return exact, native(folder, "bf16")


def tokens(count: int, vocab: int = 131, seed: int = 5) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def whole(model: TorchModel | NativeModel, prompt: list[int]) -> torch.Tensor:
    bench = Bench(model, block_size=16)
    return bench.step((bench.sequence(prompt), len(prompt), len(prompt)))


def in_pieces(model: NativeModel, prompts: list[list[int]], seed: int) -> list[torch.Tensor]:
    """Logits of every position of every prompt, computed in ragged steps of random chunks."""
    rng = random.Random(seed)
    bench = Bench(model, block_size=16, seed=seed)
    sequences = [bench.sequence(prompt) for prompt in prompts]
    out: list[list[torch.Tensor]] = [[] for _ in prompts]
    while unfinished := [i for i, s in enumerate(sequences) if s.num_cached < len(s.token_ids)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        work = []
        for i in chosen:
            s = sequences[i]
            count = min(rng.choice((1, 1, 2, 3, 5, 8, 17, 64)), len(s.token_ids) - s.num_cached)
            work.append((s, count, count))
        pieces = bench.step(*work).split([count for _, count, _ in work])
        for i, piece in zip(chosen, pieces, strict=True):
            out[i].append(piece)
    return [torch.cat(pieces) for pieces in out]


def test_logits_are_those_of_torch(pair: tuple[TorchModel, NativeModel]) -> None:
    """Up to values of K and V that another order of sums rounds the other way."""
    exact, native_model = pair
    prompt = tokens(400)
    with bfloat16_kv():
        expected = whole(exact, prompt)
    error = (whole(native_model, prompt) - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 3e-3 and error.min() < 5e-6, (error.max(), error.min())


def test_a_tokens_logits_are_the_same_bits_in_any_step(
    pair: tuple[TorchModel, NativeModel],
) -> None:
    _, native_model = pair
    prompts = [tokens(n, seed=n) for n in (1, 5, 16, 47, 90, 333, 700)]
    alone = [whole(native_model, prompt) for prompt in prompts]
    for seed in (1, 2):
        for got, expected in zip(in_pieces(native_model, prompts, seed), alone, strict=True):
            assert torch.equal(got, expected)


def test_first_layers_beside_the_target_in_the_same_blocks(
    pair: tuple[TorchModel, NativeModel],
) -> None:
    """Weights are shared; the draft's bits are those of blocks of its own, and so the target's."""
    _, native_model = pair
    draft = native_model.first_layers(1)
    prompt = tokens(70)
    layout, draft_layout = (
        layout_of(each.config, 16, "bfloat16", by_window=False) for each in (native_model, draft)
    )
    layout = dataclasses.replace(layout, draft=draft_layout)
    cache = KVCache(layout, 8, CPU)
    assert cache.draft
    for view in (cache, cache.draft):
        view.pool.fill_(float("nan"))
    row = Row(prompt, 0, [5, 2, 7, 0, 1], len(prompt))
    got = [m.forward([row], view) for m, view in ((draft, cache.draft), (native_model, cache))]
    assert torch.equal(got[0], whole(draft, prompt))
    assert torch.equal(got[1], whole(native_model, prompt))
    assert torch.equal(cache.draft.pool[:, :, 0].nan_to_num(), cache.pool[:, :, 0].nan_to_num())
    with pytest.raises(ValueError, match=f"1 to {native_model.config.num_layers}"):
        native_model.first_layers(0)


@pytest.fixture(scope="module")
def text() -> tuple[list[int], torch.Tensor]:
    """A prompt for the default model, and its logits in fp32."""
    checkpoint = resolve("smollm2")
    paths = weights(checkpoint, "float32")
    exact = load_model(checkpoint.config, paths, torch.float32, CPU)
    words = "A frame joins two panels, and so the left one can show what the right one hides. "
    prompt = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).encode(words * 6).ids
    return prompt, whole(exact, prompt)


@pytest.mark.parametrize("choice", ["auto", "bf16", "int8", "int4"])
def test_the_default_model_in_every_packing(
    choice: str, text: tuple[list[int], torch.Tensor]
) -> None:
    """The same bits in any step, and near to fp32: mean KL divergence over a text's positions."""
    native_model, (prompt, expected) = native("smollm2", choice), text
    got = whole(native_model, prompt)
    for pieces in in_pieces(native_model, [prompt], 3):
        assert torch.equal(pieces, got)
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(got, -1)
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    print(f"{choice}: KL divergence {divergence:.2e} nats a token")
    assert divergence < {"auto": 2e-4, "bf16": 2e-3, "int8": 2e-2, "int4": 2e-2}[choice]


def test_which_models_the_kernels_take() -> None:
    fits = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    assert why_not_decoder(tiny_config(**fits)) == ""
    assert "widths" in why_not_decoder(tiny_config(**fits | {"hidden_size": 80}))
    assert "widths" in why_not_decoder(tiny_config(**fits | {"intermediate_size": 90}))
    assert "widths" in why_not_decoder(tiny_config(**fits | {"head_dim": 48}))
