from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.base.errors import CheckpointError
from engine.models.architecture import architecture_of
from engine.models.config import ModelConfig
from engine.runner.loader import load_model, random_model
from engine.runner.torch_model import TorchModel
from tests.support.paged import CPU, tiny_config

UNTIED = tiny_config(tie_word_embeddings=False, attention_bias=True, output_bias=True)
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {s.hf_name: s.shape for s in architecture_of(config).tensors(config)}


def tensors_of(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(UNTIED).items()
    }


def write(folder: Path, tensors: Tensors, num_shards: int = 1) -> list[Path]:
    names = sorted(tensors)
    paths = []
    for i in range(num_shards):
        path = folder / f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names[i::num_shards]}, path)
        paths.append(path)
    return paths


def load(paths: list[Path], dtype: torch.dtype = torch.float32) -> TorchModel:
    return load_model(UNTIED, paths, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_lands_in_its_place(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tensors_of()
    model = load(write(tmp_path, tensors, num_shards=3), dtype)
    assert (model.dtype, model.device) == (dtype, CPU)
    t = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    w = model.weights
    assert torch.equal(w["embedding"], t["model.embed_tokens.weight"])
    assert torch.equal(w["head"], t["lm_head.weight"])
    assert torch.equal(w["norm"], t["model.norm.weight"])
    assert len(w) == 3 + 2 * 8
    for i in range(2):
        at = f"model.layers.{i}"
        qkv = [f"{at}.self_attn.{x}_proj" for x in "qkv"]
        gate_up = [f"{at}.mlp.{x}_proj.weight" for x in ("gate", "up")]
        assert torch.equal(w[f"{i}.qkv"], torch.cat([t[f"{n}.weight"] for n in qkv]))
        assert torch.equal(w[f"{i}.qkv.bias"], torch.cat([t[f"{n}.bias"] for n in qkv]))
        assert torch.equal(w[f"{i}.out"], t[f"{at}.self_attn.o_proj.weight"])
        assert torch.equal(w[f"{i}.out.bias"], t[f"{at}.self_attn.o_proj.bias"])
        assert torch.equal(w[f"{i}.gate_up"], torch.cat([t[n] for n in gate_up]))
        assert torch.equal(w[f"{i}.down"], t[f"{at}.mlp.down_proj.weight"])
        assert torch.equal(w[f"{i}.input_norm"], t[f"{at}.input_layernorm.weight"])
        assert torch.equal(w[f"{i}.mlp_norm"], t[f"{at}.post_attention_layernorm.weight"])


def without_up(t: Tensors) -> None:
    del t[UP]


def with_another(t: Tensors) -> None:
    t["model.layers.2.mlp.up_proj.weight"] = t[UP].clone()


def transposed(t: Tensors) -> None:
    t[UP] = t[UP].t().contiguous()


def integers(t: Tensors) -> None:
    t[UP] = t[UP].to(torch.int32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_up, f"tensor {UP} is missing"),
        (with_another, "unexpected tensor model.layers.2.mlp.up_proj.weight in a LlamaForCausalLM"),
        (transposed, rf"tensor {UP} has shape \[48, 80\], expected \[80, 48\]"),
        (integers, f"tensor {UP} has type torch.int32"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    tmp_path: Path, spoil: Callable[[Tensors], None], message: str
) -> None:
    tensors = tensors_of()
    spoil(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(write(tmp_path, tensors))
    assert str(tmp_path / "model-0.safetensors") in caught.value.message


def test_a_missing_a_truncated_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path, tensors_of())
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        load([path.with_name("gone.safetensors")])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"not a tensor in sight"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model-0\.safetensors: not a readable"):
            load([path])
    with pytest.raises(CheckpointError, match="no files"):
        load([])


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of()
    paths = write(tmp_path, tensors)
    save_file({UP: tensors[UP]}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=f"twice.safetensors: tensor {UP} is in"):
        load([*paths, tmp_path / "twice.safetensors"])


def test_a_tied_head_is_the_embedding_even_where_the_file_repeats_it(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    model = load_model(config, write(tmp_path, tensors), torch.float32, CPU)
    assert model.head is model.weights["embedding"]


def test_random_weights_follow_from_the_seed_alone() -> None:
    a, b = random_model(UNTIED, 7), random_model(UNTIED, 7)
    other, half = random_model(UNTIED, 8), random_model(UNTIED, 7, torch.bfloat16)
    assert torch.equal(a.weights["1.qkv"], b.weights["1.qkv"])
    assert not torch.equal(a.weights["1.qkv"], other.weights["1.qkv"])
    assert torch.equal(a.weights["1.qkv"].bfloat16(), half.weights["1.qkv"])
