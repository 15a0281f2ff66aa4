"""The text model of checkpoints that also read pictures, and LongRoPE by the served length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.base.errors import CheckpointError
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve, weights
from engine.kernels import kernels
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support import dense_models
from tests.support.paged import CPU, Bench, bfloat16_kv
from tests.support.reference_model import logits_of

LIBRARY = kernels()
TEXT: dict[str, Any] = dense_models.COMMON | {"head_dim": 32}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _mistral3() -> torch.nn.Module:
    config = transformers.Mistral3Config(
        vision_config={"model_type": "pixtral", "head_dim": 16, **VISION},
        text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _gemma3() -> torch.nn.Module:
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "gemma3_text", "sliding_window": 13, **TEXT},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> torch.nn.Module:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "qwen2", **dense_models.COMMON},
        tie_word_embeddings=True,
    )
    return transformers.LlavaForConditionalGeneration(config)


WRAPPERS: dict[str, Callable[[], torch.nn.Module]] = {
    "Mistral3": _mistral3,
    "Gemma3": _gemma3,
    "Llava": _llava,
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def saved(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A random model with weights that bfloat16 holds, saved to `folder`."""
    torch.manual_seed(3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # a folder without one is refused
    return model


def logits(model: TorchModel | NativeModel, prompt: list[int]) -> torch.Tensor:
    bench = Bench(model, block_size=16)
    return bench.step((bench.sequence(prompt), len(prompt), len(prompt)))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def tokens(count: int) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(dense_models.COMMON["vocab_size"]) for _ in range(count)]


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({new_name(name): t for name, t in load_file(path).items()}, path)


def of_another_age(name: str) -> str:
    """The name in checkpoints of another age than those that transformers writes."""
    old, new = "language_model.model.", "model.language_model."
    if name.endswith("lm_head.weight"):
        return "lm_head.weight" if name != "lm_head.weight" else f"language_model.{name}"
    return name.replace(old, new) if name.startswith(old) else name.replace(new, old)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_text_is_read_as_the_wrapper_reads_it(name: str, tmp_path: Path) -> None:
    reference = saved(WRAPPERS[name](), tmp_path)
    prompt = tokens(60)
    expected = logits_of(reference, prompt)
    for new_name in (str, of_another_age):
        rename(tmp_path, new_name)
        checkpoint = resolve(str(tmp_path))
        exact = load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)
        assert error(logits(exact, prompt), expected) < 1e-4
    if LIBRARY is not None:
        packed = read_packed(packed_file(checkpoint, "bf16"), checkpoint.config)
        native = NativeModel(checkpoint.config, packed, LIBRARY)
        with bfloat16_kv():
            expected = logits(exact, prompt)
        assert error(logits(native, prompt), expected) < 3e-3


def test_a_tensor_of_the_text_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    saved(_mistral3(), tmp_path)
    rename(tmp_path, lambda name: name.replace("layers.0.mlp.up_proj", "layers.0.mlp.other"))
    checkpoint = resolve(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*layers\.0\.mlp\.other"):
        load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)


def test_longrope_by_the_longest_text_that_is_served(tmp_path: Path) -> None:
    """transformers chooses for each text: within the original context the short factors."""
    rope = dense_models.LONGROPE | {"original_max_position_embeddings": 64}
    config = transformers.Phi3Config(
        **dense_models.COMMON, original_max_position_embeddings=64, rope_parameters=rope
    )
    reference = saved(transformers.Phi3ForCausalLM(config), tmp_path)
    checkpoint = resolve(str(tmp_path))
    for length, prompt in ((64, tokens(64)), (65, tokens(65)), (0, tokens(200))):
        served = checkpoint.for_length(length)
        model = load_model(served.config, weights(served, "float32"), torch.float32, CPU)
        assert error(logits(model, prompt), logits_of(reference, prompt)) < 1e-4
        other = checkpoint.for_length(0 if length == 64 else 64)
        model = load_model(other.config, weights(served, "float32"), torch.float32, CPU)
        assert error(logits(model, prompt), logits_of(reference, prompt)) > 1e-3
