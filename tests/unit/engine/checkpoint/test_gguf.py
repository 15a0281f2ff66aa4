"""GGUF files -> Hugging Face layout: names, row order, precisions, metadata, refusals."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import structlog
import torch
from gguf.quants import dequantize as gguf_dequantize
from safetensors import safe_open
from tokenizers import Tokenizer

from coordinator.text.tokenizer import Tokenizer as Served
from engine.base.errors import CheckpointError
from engine.checkpoint import source
from engine.checkpoint.config import read_config
from engine.checkpoint.gguf import config_json, llama3_divisors, open_gguf
from engine.checkpoint.gguf_weights import cast, write_weights
from engine.checkpoint.packaged import packaged_file
from engine.checkpoint.source import Checkpoint, resolve, weights
from tests.support import tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.Tensor]:
    (path,) = weights(checkpoint, dtype)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("arch", "bias", "untied"),
    [("llama", False, False), ("llama", True, True), ("qwen2", True, False), ("qwen2", True, True)],
)
def test_tensors_come_back_in_hugging_face_order(
    tmp_path: Path, arch: str, bias: bool, untied: bool
) -> None:
    expected = tiny_gguf.tiny(tmp_path / "m.gguf", arch=arch, bias=bias, untied=untied)
    checkpoint = resolve(str(tmp_path / "m.gguf"))
    for dtype in ("float32", "bfloat16", "float16"):
        found = load(checkpoint, dtype)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(found[name], torch.from_numpy(values).to(getattr(torch, dtype))), (
                name
            )
    config = checkpoint.config
    assert config.tie_word_embeddings is not untied
    assert config.attention_bias is bias
    assert config.output_bias is (bias and arch == "llama")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 10000.0)


def test_quantised_rows_are_unpermuted_before_they_are_dequantised(tmp_path: Path) -> None:
    names = frozenset({"token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight"})
    expected = tiny_gguf.tiny(tmp_path / "m.gguf", quantized=names)
    found = load(resolve(str(tmp_path / "m.gguf")), "float32")
    for name, values in expected.items():
        error = np.abs(found[name].numpy() - values).max()
        assert error < 0.02, name
    exact = "model.layers.0.self_attn.k_proj.weight"
    assert np.array_equal(found[exact].numpy(), expected[exact])


def test_default_model_equals_transformers(tmp_path: Path) -> None:
    """Tensors of each kind of the real file, bit by bit, against transformers' own GGUF reader."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    path = packaged_file("smollm2")
    file = open_gguf(path)
    (tmp_path / "config.json").write_text(json.dumps(config_json(file)))
    config = read_config(tmp_path)
    assert (config.num_layers, config.vocab_size, config.head_dim) == (30, 49152, 64)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)  # no tokenizer beside it
    assert source.resolve("smollm2").config.eos_token_ids == (2, 0)
    packed = file.packed(config)
    assert len(packed) == 272
    chosen = [t for t in packed if re.search(r"layers\.(0|29)\.|embed_tokens|model\.norm", t.name)]
    assert len(chosen) == 20
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    theirs = {
        t.name: torch.from_numpy(
            LlamaTensorProcessor(heads)
            .process(gguf_dequantize(raw.data, raw.tensor_type), raw.name)
            .weights.copy()
        )
        for t, raw in zip(packed, file.tensors, strict=True)
        if any(t is c for c in chosen)
    }
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.safetensors"
        write_weights(out, chosen, dtype, source=path)
        with safe_open(out, "pt") as found:
            for name, tensor in theirs.items():
                expected = tensor.to(getattr(torch, dtype))
                assert torch.equal(found.get_tensor(name), expected), name


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000001, 0x7F800000, 0xFF800000])
    values = np.concatenate([bits, halves.astype(np.uint32)]).view(np.float32)
    ours = torch.from_numpy(cast(values, "bfloat16", "").view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0))


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="float16"):
        cast(np.array([1e6], np.float32), "float16", "m.gguf")


@pytest.mark.parametrize(
    ("numbers", "meta", "expected"),
    [
        ({}, {}, ("default", 1.0, 0)),
        ({"rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "linear"}, ("linear", 4.0, 0)),
        ({"rope.scaling.factor": 4.0}, {}, ("linear", 4.0, 0)),
        ({"rope.scale_linear": 2.0}, {}, ("linear", 2.0, 0)),
        ({"rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "none"}, ("default", 1.0, 0)),
        (
            {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"llama.rope.scaling.type": "yarn"},
            ("yarn", 4.0, 128),
        ),
    ],
)
def test_rope_scaling_keys(
    tmp_path: Path, numbers: dict, meta: dict, expected: tuple[str, float, int]
) -> None:
    tiny_gguf.tiny(tmp_path / "m.gguf", numbers=numbers, meta=meta)
    scaling = resolve(str(tmp_path / "m.gguf")).config.rope_scaling
    found = (scaling.kind, scaling.factor, scaling.original_max_position_embeddings)
    assert found == expected


@pytest.mark.parametrize(
    ("numbers", "context", "attention"),
    [
        ({"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}, 2048, 0.0),
        ({"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}, 512, 0.0),
        ({"rope.scaling.factor": 4.0}, 2048, 0.0),
        ({"rope.scaling.original_context_length": 128}, 512, 0.0),
        ({"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5}, 2048, 1.70794),
    ],
)
def test_the_context_of_a_yarn_file(
    tmp_path: Path, numbers: dict, context: int, attention: float
) -> None:
    meta = {"llama.rope.scaling.type": "yarn"}
    tiny_gguf.tiny(tmp_path / "m.gguf", numbers=numbers, meta=meta)
    config = resolve(str(tmp_path / "m.gguf")).config
    assert config.context == context
    assert config.rope_scaling.factor == 4.0
    assert config.rope_scaling.attention_factor == pytest.approx(attention, abs=1e-4)


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = llama3_divisors(500000.0, 16, 8.0, 1.0, 4.0, 8192).astype(np.float32)
    path = tmp_path / "m.gguf"
    numbers = {"rope.freq_base": 500000.0}
    tiny_gguf.tiny(path, numbers=numbers, extra={"rope_freqs.weight": divisors})
    checkpoint = resolve(str(path))
    scaling = checkpoint.config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("llama3", 8.0)
    assert scaling.original_max_position_embeddings == 8192
    config = LlamaConfig.from_pretrained(checkpoint.folder)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(theirs.numpy(), plain / divisors, rtol=1e-5)
    assert all("rope_freqs" not in name for name in load(checkpoint, "float32"))
    tiny_gguf.tiny(path, numbers=numbers, extra={"rope_freqs.weight": divisors * 1.1})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        resolve(str(path))


def test_every_end_token_of_the_metadata_ends_an_answer(tmp_path: Path) -> None:
    meta = {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 0}
    tiny_gguf.tiny(tmp_path / "m.gguf", meta=meta)
    assert resolve(str(tmp_path / "m.gguf")).config.eos_token_ids == (0, 2)


def test_control_tokens_end_an_answer_by_name_and_words_do_not(tmp_path: Path) -> None:
    more = [("<|im_end|>", 3), ("<|eot_id|>", 4), ("</s>", 1), ("<|im_start|>", 1)]
    tiny_gguf.tiny(tmp_path / "m.gguf", tokens_more=more)
    with structlog.testing.capture_logs() as lines:
        checkpoint = resolve(str(tmp_path / "m.gguf"))
        Served.load(checkpoint.folder)
    first = checkpoint.config.vocab_size - len(more)
    assert checkpoint.config.eos_token_ids == (0, first + 2, first + 1, first)
    log = str(lines)
    assert all(name in log for name in ("<|eot_id|>", "</s>", "<|im_start|>"))
    assert "<|im_end|>" not in log
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>t<|eot_id|></s>").ids
    assert [i for i in ids if i >= first] == [first + 3, first + 1, first + 2]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"arch": "falcon"}, "falcon"),
        ({"meta": {"split.count": 3, "split.no": 1}}, "part 2 of 3 of a split GGUF"),
        ({"meta": {"split.count": "x"}}, "split.count"),
        ({"pre": "klingon"}, "klingon"),
        ({"meta": {"tokenizer.ggml.eot_token_id": "x"}}, "eot_token_id names no token"),
        ({"meta": {"tokenizer.ggml.eot_token_id": True}}, "eot_token_id names no token"),
        ({"numbers": {"rope.scaling.factor": math.nan}}, "m.gguf: factor must be a number"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "attn_sinks"),
        ({"numbers": {"block_count": 3}}, "layers.2"),
        ({"numbers": {"attention.head_count": None}}, "attention.head_count"),
        ({"numbers": {"attention.kv_lora_rank": 8}}, "latent KV .* is not built"),
        ({"numbers": {"rope.dimension_count": 8}}, "rope.dimension_count"),
        (
            {
                "numbers": {"rope.scaling.factor": 2.0},
                "meta": {"llama.rope.scaling.type": "longrope"},
            },
            "longrope",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, cache: Path, kwargs: dict, named: str
) -> None:
    tiny_gguf.tiny(tmp_path / "m.gguf", **kwargs)
    hashed = mock.Mock(wraps=source.file_digests)
    with (
        pytest.raises(CheckpointError, match=named) as error,
        mock.patch.object(source, "file_digests", hashed),
    ):
        resolve(str(tmp_path / "m.gguf"))
    early = ("falcon", "klingon", "longrope", "split GGUF", "split.count", "latent")
    assert hashed.called is not any(name in named for name in early), "refused before it is hashed"
    assert "m.gguf" in error.value.message
    assert "\n" not in error.value.message
    assert list((cache / "models").glob("m-*/")) == []


def test_truncated_files_are_one_sentence(tmp_path: Path, cache: Path) -> None:
    tiny_gguf.tiny(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    r = random.Random(0)
    cuts = [0, 3, 4, 7, 8, 23, 24, 100, 5000, len(data) - 1]
    for cut in cuts + [r.randrange(len(data)) for _ in range(20)]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"cut\.gguf.*(truncated|not a GGUF file)"):
            resolve(str(path))
    assert not list((cache / "models").glob("cut-*/"))


def test_generation_and_tokenizer_files_are_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    meta = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": template}
    tiny_gguf.tiny(tmp_path / "m.gguf", meta=meta)
    folder = resolve(str(tmp_path / "m.gguf")).folder
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the<|im|>the")["input_ids"]
    the = tokenizer.convert_tokens_to_ids("the")
    assert ids == [1, the, 2, the]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<|im|>the"
    assert tokenizer.chat_template == template
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokenizer)
