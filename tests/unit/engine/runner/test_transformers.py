"""Logits equal transformers' in fp32, however a prompt is cut into steps and rows.

"Within 1e-4 relative": of the largest logit of the position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import transformers

from engine.checkpoint.config import read_config
from engine.checkpoint.shards import find_shards
from engine.checkpoint.source import resolve, weights
from engine.runner.loader import load_model
from engine.runner.torch_model import TorchModel
from tests.support import dense_models
from tests.support.paged import CPU, Bench
from tests.support.reference_model import default_model, logits_of

COMMON = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
Mixtral, Qwen2Moe, Qwen3Moe, GptOss, Glm4Moe = (
    transformers.MixtralConfig,
    transformers.Qwen2MoeConfig,
    transformers.Qwen3MoeConfig,
    transformers.GptOssConfig,
    transformers.Glm4MoeConfig,
)
Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 = (
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
    transformers.Gemma2Config,
    transformers.Gemma3TextConfig,
)
MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama, tied": Llama(**COMMON, tie_word_embeddings=True),
    "llama, llama3 rope, untied": Llama(**COMMON, rope_parameters=LLAMA3),
    "llama, linear rope, all biases": Llama(
        **COMMON, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True
    ),
    "llama, yarn rope": Llama(**COMMON, rope_parameters=YARN),
    "llama, one head each, wide heads": Llama(
        **COMMON | {"num_key_value_heads": 6}, head_dim=12, tie_word_embeddings=True
    ),
    "mistral, full attention": Mistral(**COMMON, sliding_window=None),
    "mistral, window of 13": Mistral(**COMMON, sliding_window=13),
    "qwen2, tied": Qwen2(**COMMON, tie_word_embeddings=True),
    "qwen2, untied, linear rope": Qwen2(**COMMON, rope_parameters=LINEAR),
    "qwen2, windows in some layers": Qwen2(
        **COMMON, use_sliding_window=True, sliding_window=13, max_window_layers=1
    ),
    "qwen3, tied": Qwen3(**COMMON, head_dim=12, tie_word_embeddings=True),
    "qwen3, untied, biases, windows in some layers": Qwen3(
        **COMMON,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=1,
    ),
    "gemma 2": Gemma2(**COMMON, head_dim=16, sliding_window=13, query_pre_attn_scalar=20),
    "gemma 3": Gemma3(
        **COMMON | {"num_hidden_layers": 7}, head_dim=12, sliding_window=13, use_cache=False
    ),
    "mixtral, window of 13": Mixtral(**COMMON, num_local_experts=5, sliding_window=13),
    "qwen2 moe, windows and plain layers": Qwen2Moe(
        **COMMON | EXPERTS,
        shared_expert_intermediate_size=56,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=1,
    ),
    "qwen3 moe, normalised, every second layer": Qwen3Moe(
        **COMMON | EXPERTS, head_dim=16, norm_topk_prob=True, decoder_sparse_step=2
    ),
    "gpt-oss": GptOss(
        **COMMON,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=13,
        swiglu_limit=0.7,
    ),
    "glm-4.5, groups": Glm4Moe(
        **COMMON,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        moe_intermediate_size=40,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        num_nextn_predict_layers=0,
    ),
    "glm-4.5, one group, no norms of heads": Glm4Moe(
        **COMMON,
        head_dim=16,
        moe_intermediate_size=40,
        n_routed_experts=5,
        n_shared_experts=2,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    ),
    **dense_models.MODELS,
}


def assert_equal_logits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == torch.float32
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 1e-4, f"relative error {error.max():.1e} at {int(error.argmax())}"


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, TorchModel]:
    """A random transformers model, and a TorchModel read from the folder that it wrote."""
    torch.manual_seed(3)
    reference = transformers.AutoModelForCausalLM.from_config(
        request.param, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        for name, buffer in reference.named_buffers():
            if "correction" in name:
                buffer.normal_(0.0, 0.15)
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder, max_shard_size="40KB")
    shards = find_shards(folder)
    assert len(shards) > 1
    config = read_config(folder)
    return reference, load_model(config, shards, torch.float32, CPU)


@pytest.fixture
def tokens() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(131) for _ in range(n)] for n in (90, 47, 16, 5)]


def test_a_whole_prompt(pair: tuple[torch.nn.Module, TorchModel], tokens: list[list[int]]) -> None:
    reference, model = pair
    for token_ids in tokens:
        bench = Bench(model)
        got = bench.step((bench.sequence(token_ids), len(token_ids), len(token_ids)))
        assert_equal_logits(got, logits_of(reference, token_ids))


def test_greedy_tokens(pair: tuple[torch.nn.Module, TorchModel], tokens: list[list[int]]) -> None:
    reference, model = pair
    bench = Bench(model)
    sequence, expected = bench.sequence(tokens[3], room=24), [*tokens[3]]
    while len(expected) < len(tokens[3]) + 24:
        count = len(sequence.token_ids) - sequence.num_cached
        sequence.token_ids.append(int(bench.step((sequence, count, 1))[0].argmax()))
        expected.append(int(logits_of(reference, expected)[-1].argmax()))
    assert sequence.token_ids == expected


def test_ragged_steps_of_chunks_drafts_and_single_tokens(
    pair: tuple[torch.nn.Module, TorchModel], tokens: list[list[int]]
) -> None:
    """Random steps over all requests at once; each position gives its logits exactly once."""
    reference, model = pair
    rng = random.Random(11)
    bench = Bench(model)
    sequences = [bench.sequence(token_ids) for token_ids in tokens]
    got: list[list[torch.Tensor]] = [[] for _ in tokens]
    while open_ones := [s for s in sequences if s.num_cached < len(s.token_ids)]:
        chosen = rng.sample(open_ones, rng.randint(1, len(open_ones)))
        counts = [rng.choice([1, 1, 3, 5, 20, 35]) for _ in chosen]
        work = [
            (s, min(n, len(s.token_ids) - s.num_cached))
            for s, n in zip(chosen, counts, strict=True)
        ]
        logits = bench.step(*((s, n, n) for s, n in work))
        for (s, n), part in zip(work, logits.split([n for _, n in work]), strict=True):
            assert part.shape[0] == n
            got[sequences.index(s)].append(part)
    for token_ids, parts in zip(tokens, got, strict=True):
        assert_equal_logits(torch.cat(parts), logits_of(reference, token_ids))


def test_decode_and_verify_rows_after_a_prompt_without_logits(
    pair: tuple[torch.nn.Module, TorchModel], tokens: list[list[int]]
) -> None:
    reference, model = pair
    bench = Bench(model)
    sequences = [bench.sequence(token_ids) for token_ids in tokens]
    prompts = [len(s.token_ids) - 4 for s in sequences]
    assert bench.step(*((s, n, 0) for s, n in zip(sequences, prompts, strict=True))).shape[0] == 0
    decoded = bench.step(*((s, 1, 1) for s in sequences))
    verified = bench.step(*((s, 3, 2) for s in sequences)).split(2)
    for i, token_ids in enumerate(tokens):
        expected = logits_of(reference, token_ids)
        assert_equal_logits(decoded[i : i + 1], expected[-4:-3])
        assert_equal_logits(verified[i], expected[-2:])


def test_rejected_drafts_leave_no_trace(
    pair: tuple[torch.nn.Module, TorchModel], tokens: list[list[int]]
) -> None:
    reference, model = pair
    bench = Bench(model)
    right = tokens[1]
    s = bench.sequence([*right[:20], *tokens[0][:8]])
    bench.step((s, 20, 0))
    bench.step((s, 8, 8))  # a draft that turns out wrong
    s.token_ids[20:] = right[20:28]
    s.num_cached = 20
    got = torch.cat([bench.step((s, 3, 3)), bench.step((s, 5, 5))])
    assert_equal_logits(got, logits_of(reference, right[:28])[20:])


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[torch.nn.Module, TorchModel]]:
    """The default model, and transformers' own reading of the same file."""
    checkpoint = resolve("smollm2")
    reference = default_model()
    shards = weights(checkpoint, "float32")
    yield reference, load_model(checkpoint.config, shards, torch.float32, CPU)


def test_the_default_model(smollm2: tuple[torch.nn.Module, TorchModel]) -> None:
    reference, model = smollm2
    rng = random.Random(2)
    tokens = [[rng.randrange(49152) for _ in range(n)] for n in (150, 70, 33)]
    bench = Bench(model, block_size=16, num_blocks=32)
    sequences = [bench.sequence(token_ids) for token_ids in tokens]
    parts = [
        bench.step(*((s, 28, 28) for s in sequences)).split(28),
        bench.step(*((s, 5, 5) for s in sequences)).split(5),
    ]
    expected = [logits_of(reference, token_ids) for token_ids in tokens]
    for i in range(3):
        assert_equal_logits(torch.cat([part[i] for part in parts]), expected[i][:33])
    rest = bench.step((sequences[0], 117, 117), (sequences[1], 37, 37)).split((117, 37))
    assert_equal_logits(rest[0], expected[0][33:])
    assert_equal_logits(rest[1], expected[1][33:])
