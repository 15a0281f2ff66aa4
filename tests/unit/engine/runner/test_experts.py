"""The choice of experts, and files that hold all experts of a layer in one tensor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.base.errors import CheckpointError
from engine.base.option_groups import ModelOptions
from engine.checkpoint.config import read_config
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.shards import find_shards
from engine.checkpoint.source import resolve, weights
from engine.kernels import kernels
from engine.kernels.backend_selection import packing
from engine.models.config import ExpertSpec
from engine.runner.experts import route
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support import expert_models, gguf_of
from tests.support.paged import CPU, Bench, bfloat16_kv
from tests.support.reference_model import logits_of

SPEC = ExpertSpec(number=6, per_token=2, width=32, layers=(0,))
GPT_OSS = transformers.GptOssConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=131,
    max_position_embeddings=4096,
    num_local_experts=3,
    num_experts_per_tok=2,
    sliding_window=13,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)


def test_equal_scores_go_to_the_lowest_experts_and_ids_rise() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    ids, weights = route(scores, None, SPEC)
    assert ids.tolist() == [[1, 2], [0, 5]]
    assert torch.equal(weights, scores.softmax(-1).gather(-1, ids))
    assert route(torch.zeros(1, 6), None, SPEC)[0].tolist() == [[0, 1]]


def test_scores_that_a_softmax_rounds_to_nothing_still_have_an_order() -> None:
    scores = torch.tensor([[-900.0, -800.0, 100.0, -850.0, -700.0, -950.0]])
    assert route(scores, None, SPEC)[0].tolist() == [[2, 4]]


def test_a_correction_counts_in_the_choice_alone() -> None:
    spec = dataclasses.replace(SPEC, scoring="sigmoid", normalise=True, scale=3.0)
    scores = torch.tensor([[1.0, 0.5, 0.0, -1.0, -2.0, -3.0]])
    correction = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    ids, weights = route(scores, correction, spec)
    assert ids.tolist() == [[1, 5]]
    shares = scores.sigmoid().gather(-1, ids)
    assert torch.allclose(weights, 3.0 * shares / shares.sum())


def test_the_choice_stays_in_the_best_groups() -> None:
    spec = dataclasses.replace(SPEC, scoring="sigmoid", groups=3, chosen_groups=1)
    scores = torch.tensor([[5.0, -5.0, 2.0, 1.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert route(scores, None, spec)[0].tolist() == [[2, 3], [0, 1]]


def quantised(folder: Path) -> torch.nn.Module:
    """A random gpt-oss in `folder` as MXFP4, blocks and scales in two files; and its values."""
    torch.manual_seed(1)
    reference = transformers.AutoModelForCausalLM.from_config(
        GPT_OSS, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            parameter.copy_(parameter.bfloat16())
    reference.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    scales = {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16)).to(torch.uint8)
        scales[f"{name}_scales"] = torch.randint(120, 126, shape).to(torch.uint8)
        values = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], scales[f"{name}_scales"], dtype=torch.float32
        )
        with torch.no_grad():
            reference.get_parameter(name).copy_(values)
    weight_map = {}
    for file, content in (("a.safetensors", tensors), ("b.safetensors", scales)):
        save_file(content, folder / file)
        weight_map |= dict.fromkeys(content, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return reference


def test_mxfp4_experts_are_read_exactly(tmp_path: Path) -> None:
    reference = quantised(tmp_path)
    config = read_config(tmp_path)
    exact, half = (
        load_model(config, find_shards(tmp_path), dtype, CPU)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for i in range(2):
        experts = reference.get_submodule(f"model.layers.{i}.mlp.experts")
        gate_up = experts.gate_up_proj.transpose(1, 2)
        for name, part in (
            ("gate", gate_up[:, 0::2]),
            ("up", gate_up[:, 1::2]),
            ("down", experts.down_proj.transpose(1, 2)),
        ):
            expected = part.flatten(0, 1)
            assert torch.equal(exact.weights[f"{i}.{name}_experts"], expected)
            assert torch.equal(half.weights[f"{i}.{name}_experts"].float(), expected)
    prompt = list(range(5, 60))
    bench = Bench(exact)
    got = bench.step((bench.sequence(prompt), len(prompt), len(prompt)))
    expected = logits_of(reference, prompt)
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 1e-4


def test_mxfp4_experts_stay_packed_for_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values whichever way they are packed; a packed one takes a fraction of bfloat16."""
    library = kernels()
    if library is None:
        pytest.skip("needs a C compiler and a CPU with AVX512 and VNNI")
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    quantised(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")  # a folder without one is refused
    checkpoint = resolve(str(tmp_path / "m"))
    config, prompt = checkpoint.config, list(range(5, 60))

    def logits(model: TorchModel | NativeModel) -> torch.Tensor:
        bench = Bench(model, block_size=16)
        return bench.step((bench.sequence(prompt), len(prompt), len(prompt)))

    with bfloat16_kv():
        shards = find_shards(tmp_path / "m")
        expected = logits(load_model(config, shards, torch.float32, CPU))
    assert packing(checkpoint, ModelOptions()) == "auto"
    for choice, kind in (("auto", "mxfp4"), ("bf16", "bf16")):
        packed = read_packed(packed_file(checkpoint, choice), config)
        assert {m.kind for m in packed.matrices["1.down_experts"]} == {kind}
        native = NativeModel(config, packed, library)
        error = (logits(native) - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < 3e-3, choice
        assert error.median() < 3e-4, choice


def test_blocks_without_scales_are_missing_tensors(tmp_path: Path) -> None:
    quantised(tmp_path)
    config = read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight is missing"):
        load_model(config, [tmp_path / "a.safetensors"], torch.float32, CPU)


def test_another_quantisation_is_refused(tmp_path: Path) -> None:
    quantised(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 .* at most 4"),
        ({"n_group": 3}, "n_group 3 .* divisor of the 8 experts"),
        ({"topk_group": 5}, "topk_group 5 .* at most n_group, 4"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    config = transformers.Glm4MoeConfig(
        num_hidden_layers=2,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        architectures=["Glm4MoeForCausalLM"],
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_what_decides_a_choice_is_never_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Router, correction and the gate of the shared part are fp32 in a bfloat16 model, too."""
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    case = expert_models.CASES["glm-4.5, with a layer of MTP"]
    reference = gguf_of.random_file(tmp_path / "m.gguf", case, rounded=False)
    checkpoint = resolve(str(tmp_path / "m.gguf"))
    model = load_model(checkpoint.config, weights(checkpoint, "bfloat16"), torch.bfloat16, CPU)
    gate = reference.get_submodule("model.layers.1.mlp.gate")
    assert torch.equal(model.weights["1.router"], gate.get_parameter("weight"))
    assert torch.equal(model.weights["1.correction"], gate.get_buffer("e_score_correction_bias"))
    assert model.weights["1.gate_experts"].dtype == torch.bfloat16


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    config = expert_models.CASES["glm-4.5, with a layer of MTP"].config
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path
    )
    path = tmp_path / "model.safetensors"
    further = {"model.layers.3.eh_proj.weight": torch.ones(96, 192)}
    save_file(load_file(path) | further, path, {"format": "pt"})
    model = load_model(read_config(tmp_path), [path], torch.float32, CPU)
    assert len(model.layers) == 3
